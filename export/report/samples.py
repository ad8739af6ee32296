"""Original signals and their reconstructions at each rung of the ladder, as `data:` URLs for a page."""

import base64
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch

from varitok.codecs.modalities.registry import COLUMNS, METRICS, modality_of
from varitok.data.batch import normalize

from .subject import Subject

__all__ = ["Sample", "Shown", "samples", "summarize"]


class Shown(NamedTuple):
    """A signal as a page shows it.

    Attributes:
        picture: `data:` URL of an image; empty for clips.
        player: `data:` URL of audio or a clip; empty for images.
        told: Its size and quality in words, or "original".
    """

    picture: str
    player: str
    told: str


class Sample(NamedTuple):
    """A signal and its reconstructions.

    Attributes:
        name: Name in the page.
        sides: Height and width of its image, in pixels.
        original: The original signal.
        decoded: The reconstruction at each rung, in ascending order.
    """

    name: str
    sides: tuple[int, int]
    original: Shown
    decoded: list[Shown]

    @property
    def size(self) -> int:
        """Number of characters that it takes in a page."""
        shown = (self.original, *self.decoded)
        return sum(len(word) for one in shown for word in one)


@torch.inference_mode()
def samples(subject: Subject) -> Iterator[Sample]:
    """Encode each of a subject's signals once, and decode it at each rung."""
    codec, ladder = subject.codec, subject.ladder
    modality = modality_of(codec)
    comparisons = {name: modality.comparison(name, "cpu") for name in modality.shown}
    for name, one in subject.signals:
        signal, lengths = normalize(one[None]), torch.tensor([one.shape[1]])
        code, real = ladder.encode(signal, lengths), modality.as_written(signal)
        fakes = [modality.as_written(ladder.decode(code, keep)) for keep in ladder.keeps]
        told = ["original"]
        for keep, fake in zip(ladder.keeps, fakes, strict=True):
            values = {"bytes": float(ladder.price(code, keep)[1])}
            values |= {key: float(compare(fake, real, lengths)) for key, compare in comparisons.items()}
            told.append(summarize(values))
        exhibits = modality.exhibit([real[0], *(fake[0] for fake in fakes)])
        original, *decoded = (
            Shown(_address("image/webp", shown.picture), _address(shown.kind, shown.recording), words)
            for shown, words in zip(exhibits, told, strict=True)
        )
        sides = (int(one.shape[-2]), int(one.shape[-1])) if one.ndim > 2 else (1, 3)
        yield Sample(name, sides, original, decoded)


def summarize(row: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    """Summarize cost and quality in one line, leaving out values that aren't finite.

    Args:
        row: Values by the names of a table's columns.
        names: The columns to include; all if None.
    """
    words = []
    for name in row if names is None else names:
        column = COLUMNS[name]
        if math.isfinite(row[name]):
            value = column.form.format(row[name])
            words.append(f"{column.title} {value}" if name in METRICS else f"{value} {column.title}")
    return " · ".join(words)


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}" if data else ""
