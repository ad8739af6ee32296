"""The model card of a bundle, rendered from the template of its modality in `cards/`."""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from varitok import __version__
from varitok.codecs.lengths.distributions import ladder
from varitok.codecs.modalities.registry import MODALITIES

from .tiles import TiledParity

__all__ = ["card", "render"]

ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "cards"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
ORDER = {
    True: "It was trained to decode any prefix: the first k tokens give a coarser reconstruction.",
    False: "It was trained with all tokens kept: the first k decode too, but poorly.",
}


def card(config: Mapping[str, Any], formats: Sequence[str], tiles: TiledParity | None = None) -> str:
    """Render the README.md of a codec's bundle.

    Args:
        config: Contents of the bundle's config.json.
        formats: Names of the exported formats.
        tiles: The agreement of tiles with whole images, if measured.
    """
    rows = config["code_rows"]
    return render(
        config,
        formats,
        frame_size=config.get("frame_size"),
        later_tokens=config.get("later_tokens", 0),
        sampler=config.get("sampler"),
        graph=MODALITIES[config["modality"]].graph,
        bits=config["bits_per_token"],
        prices=_prices(config),
        some_codebooks=max(1, rows // 2) if config["codebook_sizes"] else rows,
        ranges=_ranges(config["codebook_sizes"]),
        order=ORDER[config["variable_length"]],
        ladder=ladder,
        tiles=tiles,
    )


def render(config: Mapping[str, Any], formats: Sequence[str], **more: Any) -> str:
    """Render the template of a bundle's modality, or `base.md.j2` if it has none.

    Args:
        config: Contents of the bundle's config.json, the template's variables.
        formats: Names of the exported formats.
        more: Further variables of the template.
    """
    template = ENVIRONMENT.select_template([f"{config['modality']}.md.j2", "base.md.j2"])
    return template.render({**config, **more}, formats=formats, version=__version__)


def _prices(config: Mapping[str, Any]) -> dict[int, float]:
    """Return the bits per token by number of kept codebooks."""
    sizes, rows = config["codebook_sizes"], config["code_rows"]
    each = [math.log2(size) / stride for size, stride in zip(sizes, config["codebook_strides"], strict=True)]
    rungs = ladder(len(sizes), config.get("codebook_layers", ()))
    return {codebook: sum(each[:codebook]) for codebook in rungs} if sizes else {rows: 32 * rows}


def _ranges(sizes: Sequence[int]) -> str:
    """Return the range of each codebook's codes."""
    if not sizes:
        return "continuous latents, any values"
    listed, first = [], 0
    for size, run in groupby(sizes):
        last = first + len(list(run)) - 1
        listed.append(f"codebook{f's {first} to {last}' if last > first else f' {first}'}: 0 to {size - 1}")
        first = last + 1
    return ", ".join(listed) + ("; a prefix of the codebooks decodes too, coarser" if len(sizes) > 1 else "")
