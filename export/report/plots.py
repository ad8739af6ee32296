"""Plots as SVG, with the colors of the page's style sheet in light and dark mode."""

import io
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from varitok.codecs.evaluation.figure import MARKERS, Curve, style_axes

__all__ = ["draw_progress", "draw_quality"]

COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#0e7490", "#a16207")
QUIET = ("#101010", "#606060", "#909090", "#b0b0b0")
RULE = "#e5e7eb"  # color of the grid in `style_axes`
# Variables of these colors in the page's style sheet.
NAMES = (
    {color: f"var(--line-{number})" for number, color in enumerate(COLORS)}
    | {grey: f"var(--quiet-{number})" for number, grey in enumerate(QUIET)}
    | {RULE: "var(--rule)", "#000000": "var(--ink)"}
)
POINTS = 400  # largest number of points per line
FEW = 20  # largest number of points with markers
SIZE = (4.3, 2.9)  # in inches of 72 units, as wide as a phone


def draw_quality(ours: Sequence[Curve], others: Sequence[Curve], metric: str, label: str, sizes: str) -> str:
    """Draw a metric over size (a logarithmic axis): ours in colors, others in greys.

    Args:
        ours: Curves that have the metric.
        others: Curves of classical codecs that have the metric.
        metric: Name of the metric in the curves.
        label: Label of the metric's axis.
        sizes: Label of the size axis.
    """
    figure, axes = _panel()
    style: dict[str, Any]
    for number, curve in enumerate(others):
        style = {"color": QUIET[number % 4], "marker": MARKERS[number % len(MARKERS)], "linestyle": "--"}
        axes.plot(curve.sizes, curve.values[metric], label=curve.name, markersize=3, linewidth=1, **style)
    for number, curve in enumerate(ours):
        color = COLORS[number % len(COLORS)]
        style = {"color": color, "marker": "o", "label": curve.name}
        axes.plot(curve.sizes, curve.values[metric], markersize=4, linewidth=1.8, zorder=3, **style)
        for word, x, y in zip(curve.labels, curve.sizes, curve.values[metric], strict=False):
            axes.annotate(word, (x, y), (0, 5), textcoords="offset points", ha="center", fontsize=8, color=color)
    style_axes(axes, label, sizes)
    return _svg(figure, axes, len(ours) + len(others) > 1)


def draw_progress(lines: Mapping[str, Mapping[int, float]], label: str) -> str:
    """Draw a logged quantity over a run's updates, as one line or several.

    Args:
        lines: Values by update, for the name of each line.
        label: Name of the quantity.
    """
    figure, axes = _panel()
    for number, (name, logged) in enumerate(lines.items()):
        values = _thin(logged)
        # If there are more lines than colors, dashes distinguish them.
        dashes = ("-", "--", ":")[number // len(COLORS) % 3]
        style: dict[str, Any] = {"color": COLORS[number % len(COLORS)], "linestyle": dashes}
        marker = "o" if len(values) <= FEW else None
        axes.plot(list(values), list(values.values()), label=name, linewidth=1.2, marker=marker, markersize=3, **style)
    style_axes(axes, label, "updates", logarithmic=False)
    return _svg(figure, axes, len(lines) > 1)


def _thin(values: Mapping[int, float]) -> dict[float, float]:
    """Average groups of neighbors, so that at most `POINTS` points remain."""
    group = -(-len(values) // POINTS)
    points = list(values.items())
    groups = (points[at : at + group] for at in range(0, len(points), group))
    return {fmean(update for update, _ in some): fmean(value for _, value in some) for some in groups}


def _panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Figure, axes: Axes, legend: bool) -> str:
    """Return a figure of one panel as an SVG element for a page."""
    axes.tick_params(labelsize=9)
    axes.xaxis.label.set_fontsize(9)
    axes.yaxis.label.set_fontsize(9)
    if legend:
        names = axes.get_legend_handles_labels()[1]
        # Place the legend above the panel, where it hides nothing.
        columns = 4 if max(map(len, names)) < 9 else 2 if max(map(len, names)) < 20 else 1
        style = {"handlelength": 1.4, "columnspacing": 1.0, "borderaxespad": 0.2}
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=columns, frameon=False, fontsize=8, **style)
    file = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "varitok"}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    # Keep the ids of reused shapes, which are hashes of their contents; drop others, which each plot would repeat.
    text = re.sub(r' id="[^"]*_\d+"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    return re.sub("|".join(NAMES), lambda found: NAMES[found[0]], text)
