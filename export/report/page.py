"""The report page: one HTML file that embeds all its data and works without a network."""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from varitok import UserError, __version__

from .classics import Classics
from .samples import Sample, samples
from .sections import comparison, describe_rungs, section
from .subject import Subject

__all__ = ["MOST_BYTES", "STYLE", "TITLE", "document", "embed", "write_page"]

MOST_BYTES = 20_000_000
TITLE = "Reconstruction quality by rate"
SHARE = 0.9  # largest share of these for samples; plots and tables take the rest
STYLE = Path(__file__).with_name("page.css")


def write_page(path: Path, subjects: Sequence[Subject], classics: Sequence[Classics] = (), title: str = TITLE) -> None:
    """Write the report.

    Args:
        path: Path of the HTML file.
        subjects: Runs and bundles to show, at least one.
        classics: Tables of classical codecs, drawn beside subjects of the same modality.
        title: Title of the page.

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
    body, data = _contents(subjects) + "".join(parts), embed("media", media)
    need = "Reconstructions need JavaScript; this page loads no script from elsewhere."
    sources = "img-src data:; media-src data:; style-src 'unsafe-inline'"
    text = document(title, need, body, data, [STYLE, STYLE.with_suffix(".js")], sources)
    if len(text.encode()) > MOST_BYTES:
        raise UserError(f"{path}: {len(text) / 1e6:.0f} MB are above {MOST_BYTES / 1e6:.0f} MB; name fewer runs")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror})") from error


def _fitting(subject: Subject, budget: float) -> list[Sample]:
    """Return the first samples that fit into `budget` characters."""
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
    """Return a table of contents; empty for a single subject."""
    if len(subjects) == 1:
        return ""
    links = (f'<li><a href="#subject-{number}">{escape(one.name)}</a></li>' for number, one in enumerate(subjects))
    return f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>'


def document(
    title: str, need: str, body: str, data: str, files: Sequence[Path], sources: str, note: str = "", wasm: bool = False
) -> str:
    """Return an HTML document with the style sheets and scripts of `files`, whose policy allows no network requests.

    `need` shows without JavaScript, `data` are further script elements, and `sources` belong to the policy.
    """
    style = "".join(path.read_text(encoding="utf-8") for path in files if path.suffix == ".css")
    script = "\n".join(path.read_text(encoding="utf-8") for path in files if path.suffix == ".js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    kind, also = (' type="module"', " blob: 'wasm-unsafe-eval'") if wasm else ("", "")
    policy = f"default-src 'none'; {sources}; script-src 'sha256-{digest}'{also}"
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
<p class="note">{note}Written by varitok {escape(__version__)}.</p>
<noscript><p>{need}</p></noscript>
</header>
<main>
{body}
</main>
{data}<script{kind}>{script}</script>
</body>
</html>
"""


def embed(name: str, value: Any) -> str:
    """Return a script element with JSON; "<" is escaped, so that no text in it can close the element."""
    text = json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>\n'
