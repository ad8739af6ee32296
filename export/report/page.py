"""The page itself: one HTML file with everything in it, which asks nothing of a network."""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from varitok import UserError, __version__

from .classics import Classics
from .samples import Sample, samples
from .sections import comparison, describe_rungs, section
from .subject import Subject

__all__ = ["MOST_BYTES", "TITLE", "write_page"]

MOST_BYTES = 20_000_000
TITLE = "What each further token buys"
SHARE = 0.9  # of it, that samples may take; plots and tables take the rest
BESIDE = Path(__file__).parent  # style sheet and script


def write_page(path: Path, subjects: Sequence[Subject], classics: Sequence[Classics] = (), title: str = TITLE) -> None:
    """Write the report.

    Args:
        path: Where to.
        subjects: What it is about, at least one.
        classics: Tables of classical codecs, to be drawn beside those whose signals are of their kind.
        title: Its heading.

    Raises:
        UserError: The file can't be written, or would be too large.
    """
    budget = SHARE * MOST_BYTES / len(subjects)
    media: dict[str, Any] = {}
    parts = [comparison(subjects, classics)]
    for number, subject in enumerate(subjects):
        shown = _fitting(subject, budget)
        name = f"subject-{number}"
        parts.append(section(name, subject, shown, classics))
        decoded = [[list(one) for one in sample.decoded] for sample in shown]
        media[name] = {"rungs": describe_rungs(subject), "samples": decoded}
    text = _document(title, _contents(subjects) + "".join(parts), media)
    if len(text.encode()) > MOST_BYTES:
        raise UserError(f"{path}: would be of {len(text) / 1e6:.0f} MB, above {MOST_BYTES / 1e6:.0f}; name fewer runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


def _fitting(subject: Subject, budget: float) -> list[Sample]:
    """Take the first samples, as many as there is room for."""
    shown: list[Sample] = []
    for sample in samples(subject):
        budget -= sample.size
        if budget < 0:
            break
        shown.append(sample)
    if not shown:
        raise UserError(f"{subject.folder}: one sample alone has no room in the page; give fewer --seconds")
    return shown


def _contents(subjects: Sequence[Subject]) -> str:
    """List the page's contents, if there is more than one subject."""
    if len(subjects) == 1:
        return ""
    links = (f'<li><a href="#subject-{number}">{escape(one.name)}</a></li>' for number, one in enumerate(subjects))
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def _document(title: str, body: str, media: Mapping[str, Any]) -> str:
    """Put the page together; its policy lets nothing run but its own script, and nothing be asked for."""
    style, script = ((BESIDE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    )
    # No name in the data may end the element that contains it.
    data = json.dumps(media, separators=(",", ":")).replace("<", "\\u003c")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<p class="note">Written by varitok {escape(__version__)}.</p>
<noscript><p>Reconstructions need JavaScript, which this page runs from itself alone.</p></noscript>
</header>
<main>
{body}
</main>
<script type="application/json" id="media">{data}</script>
<script>{script}</script>
</body>
</html>
"""
