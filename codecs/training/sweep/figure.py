"""The runs of a sweep as parallel coordinates: a line for each, through its parameters to what it came to."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray

from ...evaluation.figure import ACCENT, GREYS
from .results import Results
from .space import short

__all__ = ["draw_parallel"]

SPAN = 10.0  # the largest over the smallest of numbers, from which on an axis may be logarithmic
MARKS = 5  # on an axis


def draw_parallel(path: Path, results: Results) -> None:
    """Draw the runs that have a value to a PNG: the better, the darker, and the best in colour."""
    runs = [run for run in results.runs if run.value is not None]
    names = [*runs[0].parameters, results.metric]
    columns = [[run.parameters[name] for run in runs] for name in names[:-1]] + [[str(run.value) for run in runs]]
    figure = Figure(figsize=(max(5.0, 2.1 * len(names)), 4.6), layout="constrained")
    axes = figure.subplots()
    heights = np.array([_axis(axes, place, column) for place, column in enumerate(columns)])
    greys = LinearSegmentedColormap.from_list("greys", GREYS)
    for rank in reversed(range(len(runs))):  # the best above the others
        best = rank == 0
        color = ACCENT if best else greys(rank / max(1, len(runs) - 1))
        axes.plot(heights[:, rank], color=color, linewidth=2.4 if best else 1.1, alpha=1.0 if best else 0.8)
    axes.set_xlim(-0.15, len(names) - 0.55)
    axes.set_ylim(-0.04, 1.04)
    axes.set_xticks(range(len(names)), [_broken(name) for name in names], fontsize=9)
    axes.set_yticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    goal = "higher" if results.maximize else "lower"
    title = f"{len(runs)} runs, the best {runs[0].name} ({results.metric}: {goal} is better)"
    axes.set_title(title, fontsize=12, fontweight="bold", loc="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _axis(axes: Axes, place: int, column: Sequence[str]) -> list[float]:
    """Draw an upright axis with its marks; gives the heights of the runs on it, 0 to 1."""
    heights, marks = _scaled(column)
    axes.axvline(place, color="#e5e7eb", linewidth=1.0, zorder=0)
    for text, at in marks.items():
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        beside = axes.annotate(text, (place, at), (6, 0), textcoords="offset points", va="center", bbox=box, zorder=9)
        beside.set(fontsize=8, color=GREYS[0])
    return heights


def _scaled(column: Sequence[str]) -> tuple[list[float], dict[str, float]]:
    """Give the heights of numbers, or of words, and those of an axis's marks."""
    try:
        numbers = np.array([float(text) for text in column])
    except ValueError:
        words = sorted(set(column))
        places = {word: (index + 0.5) / len(words) for index, word in enumerate(words)}
        return [places[text] for text in column], places
    wide = numbers.min() > 0 and numbers.max() > SPAN * numbers.min()
    logarithmic = wide and _lean(np.log(numbers)) < _lean(numbers)
    scaled = np.log(numbers) if logarithmic else numbers
    low, span = scaled.min(), np.ptp(scaled) or 1.0
    heights = [float(height) for height in (scaled - low) / span]
    if len(set(column)) <= MARKS:
        return heights, {short(text): height for text, height in zip(column, heights, strict=True)}
    even = np.linspace(0, 1, MARKS)
    values = low + span * even
    return heights, {f"{v:.4g}": float(h) for v, h in zip(np.exp(values) if logarithmic else values, even, strict=True)}


def _lean(numbers: NDArray[np.float64]) -> float:
    """Tell how far the median is from the middle, in shares of the range."""
    return float(abs((np.median(numbers) - numbers.min()) / np.ptp(numbers) - 0.5))


def _broken(name: str) -> str:
    """Break a long key into lines at its points."""
    return name.replace(".", ".\n") if len(name) > 14 else name
