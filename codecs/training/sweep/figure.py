"""Parallel coordinates plot of a sweep: a line for each run through its parameters and its metric."""

import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.visualization.matplotlib import plot_parallel_coordinate

from .results import Results

__all__ = ["draw_parallel"]

SPAN = 10.0  # ratio of largest to smallest value above which an axis is logarithmic


def draw_parallel(path: Path, results: Results) -> None:
    """Plot the runs that have a value to a PNG; better runs are darker."""
    runs = [run for run in results.runs if run.value is not None and math.isfinite(run.value)]
    names = list(results.runs[0].parameters)
    columns = [_column([run.parameters[name] for run in runs]) for name in names]
    distributions = {name: distribution for name, (_, distribution) in zip(names, columns, strict=True)}
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize" if results.maximize else "minimize")
    for row, run in enumerate(runs):
        drawn = {name: values[row] for name, (values, _) in zip(names, columns, strict=True)}
        study.add_trial(optuna.create_trial(params=drawn, distributions=distributions, value=run.value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optuna warns that the plot is experimental, and of constant columns
        axes = plot_parallel_coordinate(study, target_name=results.metric)
    goal = "higher" if results.maximize else "lower"
    axes.set_title(f"{len(runs)} runs, the best {runs[0].name} ({results.metric}: {goal} is better)" if runs else "")
    figure = plt.gcf()
    figure.set_size_inches(max(6.0, 2.1 * (len(names) + 2)), 4.6)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _column(texts: Sequence[str]) -> tuple[Sequence[float] | Sequence[str], BaseDistribution]:
    """Return a parameter's values, as numbers if all are, and their distribution."""
    try:
        numbers = [float(text) for text in texts]
        low, high = min(numbers), max(numbers)
        return numbers, FloatDistribution(low, high, log=0 < low * SPAN < high)
    except ValueError:
        return texts, CategoricalDistribution(sorted(set(texts)))
