"""The sections of a page, one for each run or bundle, as HTML; all external text is escaped."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from html import escape
from itertools import accumulate
from typing import Any

from omegaconf import OmegaConf

from varitok.codecs.evaluation.figure import Curve, label_of
from varitok.codecs.evaluation.table import Table
from varitok.codecs.implicit.codec import ImplicitCodec
from varitok.codecs.metrics.metric import Column
from varitok.codecs.metrics.rate import USE
from varitok.codecs.modalities.registry import COLUMNS, METRICS, modality_of

from .classics import Classics, find_classics
from .plots import draw_progress, draw_quality
from .samples import Sample, Shown, summarize
from .subject import Subject

__all__ = ["comparison", "describe_rungs", "section"]

CODEBOOK = re.compile(r"health/codebook(\d+)/(\w+)")


def comparison(subjects: Sequence[Subject], classics: Sequence[Classics]) -> str:
    """Plot the subjects of each modality together; empty if no modality has two."""
    kinds: dict[str, list[Subject]] = {}
    for subject in subjects:
        kinds.setdefault(modality_of(subject.codec).kind, []).append(subject)
    return "".join(_joint(kind, alike, classics) for kind, alike in kinds.items() if len(alike) > 1)


def _joint(kind: str, alike: Sequence[Subject], classics: Sequence[Classics]) -> str:
    """Plot each metric that all subjects have over rate: bytes of signals of different sizes aren't comparable."""
    rate = modality_of(alike[0].codec).rate
    own = [_metrics(one.table) for one in alike]
    plots = []
    for metric in (name for name in own[0] if all(name in names for names in own)):
        curves = [Curve(one.name, one.table.column(rate.name), {metric: one.table.column(metric)}) for one in alike]
        plots.append(_plot(curves, _others(classics, alike[0], rate.name, metric), metric, rate.label))
    whole = [[escape(one.name), escape(summarize(one.table.rows[-1], _list_columns(one)))] for one in alike]
    signals = {one.table.header.get("dataset", "") + one.table.header.get("protocol", "") for one in alike}
    care = "<p>They were measured on different signals: compare them with care.</p>" if len(signals) > 1 else ""
    return f"""<section>
<h2>All {kind}s together</h2>
<div class="plots">{"".join(plots)}</div>
{care}
{_table(["", "at the highest rate"], whole, "facts")}
</section>
"""


def section(name: str, subject: Subject, shown: Sequence[Sample], classics: Sequence[Classics]) -> str:
    """Return the section of a subject.

    Args:
        name: Id of the HTML element.
        subject: The run or bundle.
        shown: Samples to show.
        classics: Tables of classical codecs; those in the subject's `evaluation/` are added.
    """
    header = {key: value for key, value in subject.table.header.items() if not key.startswith("column ")}
    groups = {key: value for key, value in subject.config.items() if isinstance(value, Mapping)}
    rest = {key: value for key, value in subject.config.items() if key not in groups}
    facts = [[escape(key), escape(value)] for key, value in (header | dict(subject.about)).items()]
    settings = [_fold(key, f"<pre>{escape(_yaml(value))}</pre>") for key, value in {**groups, "other": rest}.items()]
    return f"""<section id="{name}">
<h2>{escape(subject.name)}</h2>
<p class="note">{escape(subject.kind)} in {escape(str(subject.folder))}</p>
{_samples(subject, shown)}
<h3>Rate-distortion curves</h3>
{_quality(subject, classics)}
<h3>Rate-distortion table</h3>
{_bits(subject)}
<h3>Codebook usage</h3>
{_codebooks(subject)}
{_training(subject)}
<h3>Configuration</h3>
{_table([], facts, "facts")}
{"".join(settings)}
</section>
"""


def describe_rungs(subject: Subject) -> list[dict[str, str]]:
    """Return the name of each rung, with its mean size and quality."""
    plural = modality_of(subject.codec).plural
    average = f"mean of {subject.table.rows[0].get(plural, 0):.0f} {plural}"
    return [
        {"name": _rung(subject, keep), "told": f"{summarize(row, _list_columns(subject))} ({average})"}
        for keep, row in zip(subject.ladder.keeps, subject.table.rows, strict=True)
    ]


def _list_columns(subject: Subject) -> list[str]:
    """Return the columns of the one-line summary."""
    modality = modality_of(subject.codec)
    return [name for name in ("bytes", modality.rate.name, *modality.shown) if name in subject.table.rows[0]]


def _rung(subject: Subject, keep: int) -> str:
    many = "" if keep == 1 else "s"
    if isinstance(subject.codec, ImplicitCodec):
        return f"{keep} bit{many} per weight"
    if subject.ladder.axis == "codebooks":
        return f"{keep} codebook{many}" if subject.codec.bottleneck.codebook_sizes else "all channels"
    return f"{keep} token{many}{' per block' if len(subject.codec.downsample) == 3 else ''}"


def _samples(subject: Subject, shown: Sequence[Sample]) -> str:
    """Lay out the slider and the samples; the script fills in the reconstructions."""
    last = len(subject.ladder.keeps) - 1
    ticks = "".join(f"<span>{keep}</span>" for keep in subject.ladder.keeps)
    few = len(shown) < len(subject.signals)
    left = f'<p class="note">{len(shown)} of {len(subject.signals)} samples have room in the page.</p>' if few else ""
    return f"""<div class="kept"{"" if last else " data-single"}>
<label>Kept: <span class="name"></span><output></output>
<input type="range" min="0" max="{last}" step="1" value="{last}"{"" if last else " disabled"}></label>
<div class="ticks" aria-hidden="true">{ticks if last else ""}</div>
</div>
<div class="samples">{"".join(_figure(subject, sample) for sample in shown)}</div>
{left}"""


def _figure(subject: Subject, sample: Sample) -> str:
    """Lay out one sample: the original, and an empty element for the reconstruction."""
    name, (height, width) = escape(sample.name), sample.sides
    modality = modality_of(subject.codec)
    tag = modality.element
    form = "controls" if tag == "audio" else f'width="{width}" height="{height}" loop muted playsinline'
    sides = []
    for side, shown in (("original", sample.original), ("decoded", Shown("", "", ""))):
        picture, player = (f' src="{address}"' if address else "" for address in (shown.picture, shown.player))
        parts = [f"<p>{shown.told}</p>"]
        if sample.original.picture:
            alt = f'alt="{name}, {side}" data-name="{name}"'
            parts.append(f'<img{picture} width="{width}" height="{height}" {alt}>')
        if tag:
            parts.append(f'<{tag}{player} {form} preload="metadata" aria-label="{name}, {side}"></{tag}>')
        sides.append(f'<div class="{side}">{"".join(parts)}</div>')
    return f'<figure class="sample {modality.plural}"><figcaption>{name}</figcaption>{"".join(sides)}</figure>'


def _metrics(table: Table) -> list[str]:
    """Return the columns of metrics that have finite values."""
    names = (name for name in METRICS if name in table.rows[0])
    return [name for name in names if any(math.isfinite(value) for value in table.column(name))]


def _quality(subject: Subject, classics: Sequence[Classics]) -> str:
    """Plot each metric over size, beside classical codecs."""
    modality, table = modality_of(subject.codec), subject.table
    size = modality.size
    found = [*classics, *find_classics(subject.folder / "evaluation")]
    labels = [f"{keep:.0f}" for keep in table.column(table.axis)]
    plots = []
    for metric in _metrics(table):
        curve = Curve(subject.name, table.column(size.name), {metric: table.column(metric)}, labels)
        others = _others(found, subject, size.name, metric)
        plots.append(_plot([curve], others, metric, size.label.format(modality.noun)))
    used = [one for one in found if one.noun == modality.kind]
    notes = [
        " · ".join(["Classical codecs", *(one.header[key] for key in ("dataset", "protocol") if key in one.header)])
        for one in used
    ]
    told = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    return f'<div class="plots">{"".join(plots)}</div>{told}'


def _others(classics: Sequence[Classics], subject: Subject, size: str, metric: str) -> list[Curve]:
    """Return the curves of classical codecs for a subject's modality."""
    alike = (one for one in classics if one.noun == modality_of(subject.codec).kind)
    return [curve for one in alike for curve in one.curves(size, metric)]


def _plot(ours: Sequence[Curve], others: Sequence[Curve], metric: str, sizes: str) -> str:
    label = label_of(metric)
    return _drawn(draw_quality(ours, others, metric, label, sizes), f"{label} over {sizes}")


def _drawn(svg: str, label: str) -> str:
    named = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    return f"<figure>{named}</figure>"


def _bits(subject: Subject) -> str:
    """Return the table of each rung's size and quality, with the meanings of the columns."""
    table = subject.table
    printed = {table.axis: COLUMNS[table.axis], "bits": Column("bits", "bits", "{:,.1f}")} | COLUMNS
    columns = [column for name, column in printed.items() if name in table.rows[0]]
    rows = [[column.form.format(row[column.name]) for column in columns] for row in table.rows]
    means = [
        [escape(key.removeprefix("column ")), escape(value)]
        for key, value in table.header.items()
        if key.startswith("column ")
    ]
    meant = _fold("What the columns mean", _table([], means, "facts")) if means else ""
    return _table([column.title for column in columns], rows, numbered=True) + meant


def _codebooks(subject: Subject) -> str:
    """Return the table of each codebook's size and usage, with all kept; a layer of a hierarchy counts as one."""
    bottleneck, last = subject.codec.bottleneck, subject.table.rows[-1]
    sizes = list(bottleneck.codebook_sizes)
    if not sizes:
        return "<p>The codes are continuous: there are no codebooks. Each channel of a token counts as 32 bits.</p>"
    strides, layers = list(bottleneck.codebook_strides), subject.ladder.layers
    rows = []
    for codebook, (first, count) in enumerate(zip(accumulate(layers, initial=0), layers, strict=False)):
        size, stride = sizes[first], strides[first]
        used, entropy, perplexity = (
            last.get(f"{name}_{codebook}" if len(layers) > 1 else name, math.nan) for name in USE
        )
        each = math.log2(size)
        shares = [
            f'<meter max="1" value="{share:.4f}"></meter> {share:.1%}' if math.isfinite(share) else ""
            for share in (used, entropy / each if each else math.nan)
        ]
        bits = f"{entropy:.2f}" if math.isfinite(entropy) else ""
        worth = f"{perplexity:.1f}" if math.isfinite(perplexity) else ""
        rows.append([str(codebook), *shares, bits, worth, f"{size:,}", f"{each:.3f}", str(Fraction(stride, count))])
    total = sum(math.log2(size) / stride for size, stride in zip(sizes, strides, strict=True))
    heads = "codebook|used|normalized entropy|entropy|perplexity|entries|bits per code|tokens per code".split("|")
    return f"<p>A token with all codebooks has {total:.3f} bits before entropy coding.</p>{_table(heads, rows)}"


def _training(subject: Subject) -> str:
    """Plot the log of a run; empty for a bundle."""
    panels = _panels(subject.progress)
    if not panels:
        return ""
    plots = {name: _drawn(draw_progress(lines, name), f"{name} over updates") for name, lines in panels.items()}
    ahead = ("loss", *(f"val/{metric}" for metric in modality_of(subject.codec).shown), "health/used", "health/entropy")
    first = "".join(plots[name] for name in ahead if name in plots)
    rest = "".join(plot for name, plot in plots.items() if name not in ahead)
    more = _fold("Other logged values", f'<div class="plots">{rest}</div>') if rest else ""
    return f'<h3>Training</h3><div class="plots">{first}</div>{more}'


def _panels(progress: Mapping[str, Mapping[int, float]]) -> dict[str, dict[str, Mapping[int, float]]]:
    """Group logged values into plots: all rungs of a metric, and all codebooks of a usage measure."""
    panels: dict[str, dict[str, Mapping[int, float]]] = {}
    for name, values in progress.items():
        codebook = CODEBOOK.fullmatch(name)
        metric, _, keep = name.partition("@")
        panel, line = (
            (f"health/{codebook[2]}", f"codebook {codebook[1]}")
            if codebook
            else (metric, f"{keep} kept" if keep else "mean")
        )
        finite = {update: value for update, value in values.items() if math.isfinite(value)}
        if finite:
            panels.setdefault(panel, {})[line] = finite
    for lines in panels.values():
        if lines.keys() == {"codebook 0", "mean"}:  # of a single codebook, equal to the mean
            del lines["codebook 0"]
    return panels


def _yaml(value: Any) -> str:
    return OmegaConf.to_yaml(OmegaConf.create(value))


def _fold(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "", *, numbered: bool = False) -> str:
    """Return a table of HTML cells; without heads, the first cell of a row is its heading."""
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    body = []
    for number, (first, *cells) in enumerate(rows):
        lead = f"<td>{first}</td>" if heads and not kind else f'<th scope="row">{first}</th>'
        mark = f' data-rung="{number}"' if numbered else ""
        body.append(f"<tr{mark}>{lead}{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    top = f"<thead><tr>{head}</tr></thead>" if heads else ""
    table = f'<table class="{kind}">{top}<tbody>{"".join(body)}</tbody></table>'
    return f'<div class="wide" role="region" aria-label="Table" tabindex="0">{table}</div>'
