"""Quality over size, drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

__all__ = ["Curve", "draw_curves"]

ACCENT = "#c2410c"
GREYS = ("#1f2937", "#6b7280", "#9ca3af")
MARKERS = ("s", "^", "D")


class Curve(NamedTuple):
    """Points of quality over size.

    Attributes:
        name: For the legend.
        bytes: Mean size of an image.
        psnr: dB.
        ssim: In [-1, 1].
        labels: A word at each point, or nothing.
    """

    name: str
    bytes: Sequence[float]
    psnr: Sequence[float]
    ssim: Sequence[float]
    labels: Sequence[str] = ()


def draw_curves(path: Path, ours: Curve, others: Sequence[Curve] = (), title: str = "Quality per byte") -> None:
    """Draw PSNR and SSIM over bytes (a logarithmic axis) to a PNG: ours in colour, others in greys."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, field, label in ((left, "psnr", "PSNR (dB)"), (right, "ssim", "SSIM")):
        for index, curve in enumerate(others):
            style = {"color": GREYS[index % 3], "marker": MARKERS[index % 3], "linestyle": "--"}
            axes.plot(curve.bytes, getattr(curve, field), label=curve.name, markersize=4, linewidth=1.2, **style)
        values = getattr(ours, field)
        axes.plot(ours.bytes, values, color=ACCENT, marker="o", markersize=5, linewidth=2.2, label=ours.name, zorder=3)
        for word, x, y in zip(ours.labels, ours.bytes, values, strict=False):
            axes.annotate(word, (x, y), (0, 7), textcoords="offset points", ha="center", fontsize=8, color=ACCENT)
        _dress(axes, label)
    if others:
        left.legend(frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=12, fontweight="bold", x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _dress(axes: Axes, label: str) -> None:
    """Give a panel its axes, labels and grid."""
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes per image")
    axes.set_ylabel(label)
    axes.margins(y=0.12)
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
