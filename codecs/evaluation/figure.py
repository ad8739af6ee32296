"""Draw rate-distortion curves."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from ..modalities.registry import METRICS, lower_is_better

__all__ = ["ACCENT", "GREYS", "MARKERS", "Curve", "draw_curves", "label_of", "style_axes"]

ACCENT = "#c2410c"
GREYS = ("#1f2937", "#6b7280", "#9ca3af")
MARKERS = ("s", "^", "D", "v", "P")


class Curve(NamedTuple):
    """A rate-distortion curve.

    Attributes:
        name: Name in the legend.
        sizes: Mean size or bitrate of a signal at each point.
        values: Each metric's values at the points, by name.
        labels: Label of each point; empty for none.
    """

    name: str
    sizes: Sequence[float]
    values: Mapping[str, Sequence[float]]
    labels: Sequence[str] = ()


def label_of(name: str) -> str:
    """Return the axis label of a metric; of any other column, its name."""
    label = METRICS[name].label or METRICS[name].title if name in METRICS else name
    return label + (" (lower is better)" if lower_is_better(name) else "")


def draw_curves(
    path: Path,
    ours: Curve,
    others: Sequence[Curve] = (),
    title: str = "Quality per byte",
    sizes: str = "bytes per image",
) -> None:
    """Draw one panel per metric of `ours` over size (logarithmic) to a PNG: ours in color, others in greys."""
    figure = Figure(figsize=(5 * len(ours.values), 4.2), layout="constrained")
    panels = figure.subplots(1, len(ours.values), squeeze=False)[0]
    for axes, (metric, values) in zip(panels, ours.values.items(), strict=True):
        for index, curve in enumerate(others):
            style = {"color": GREYS[index % 3], "marker": MARKERS[index % len(MARKERS)], "linestyle": "--"}
            axes.plot(curve.sizes, curve.values[metric], label=curve.name, markersize=4, linewidth=1.2, **style)
        axes.plot(ours.sizes, values, color=ACCENT, marker="o", markersize=5, linewidth=2.2, label=ours.name, zorder=3)
        for word, x, y in zip(ours.labels, ours.sizes, values, strict=False):
            axes.annotate(word, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=ACCENT)
        style_axes(axes, label_of(metric), sizes)
    if others:
        panels[0].legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def style_axes(axes: Axes, label: str, sizes: str, logarithmic: bool = True) -> None:
    """Set labels, scale, grid and spines of a panel."""
    if logarithmic:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(sizes)
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
