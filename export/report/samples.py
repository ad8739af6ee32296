"""Signals that a page shows and plays, at each number of kept tokens or books, as `data:` addresses."""

import base64
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import matplotlib
import soundfile
import torch
from PIL import Image
from torch import Tensor

from varitok.codecs.modalities.media import decibels, principal_colours, write_mp4
from varitok.codecs.metrics.modality import Comparison, modality_of
from varitok.codecs.evaluation.table import PRINTED
from varitok.codecs.training.callbacks.samples import UNKNOWN_RATE
from varitok.data.batch import normalise

from .subject import Subject

__all__ = ["SIZES", "Sample", "Shown", "samples", "tell"]

SIZES = {"bytes": "bytes per {}", "kbps": "kbit/s", "bpp": "bits per pixel", "bpf": "bits per frame"}
"""Columns of a table that are sizes, and what is written below an axis of them; a signal's name goes into it."""

UNSEEKABLE = 3 * 4096  # samples; in a FLAC file of three blocks Chromium (156) finds no place but the beginning


class Shown(NamedTuple):
    """A signal as a page holds it.

    Attributes:
        picture: Address of an image; empty for clips.
        player: Address of a sound or a clip; empty for images.
        told: What it costs and how near it is to the original.
    """

    picture: str
    player: str
    told: str


class Sample(NamedTuple):
    """A signal and what comes back of it.

    Attributes:
        name: What it is called.
        sides: Height and width of its picture, pixels.
        original: The signal.
        decoded: What each rung gives back, upwards.
    """

    name: str
    sides: tuple[int, int]
    original: Shown
    decoded: list[Shown]

    @property
    def size(self) -> int:
        """Count the characters that it takes on a page."""
        shown = (self.original, *self.decoded)
        return sum(len(word) for one in shown for word in one)


@torch.inference_mode()
def samples(subject: Subject) -> Iterator[Sample]:
    """Code each of a subject's signals, once, and decode it at each rung."""
    codec, ladder = subject.codec, subject.ladder
    medium, cpu = modality_of(codec), torch.device("cpu")
    comparisons: dict[str, Comparison] = {name: medium.comparison(name, cpu) for name in medium.shown}
    for name, one in subject.signals:
        signal, lengths = normalise(one[None]), torch.tensor([one.shape[1]])
        code, real = ladder.encode(signal, lengths), medium.as_written(signal)
        fakes = [medium.as_written(ladder.decode(code, keep)) for keep in ladder.keeps]
        told = ["original"]
        for keep, fake in zip(ladder.keeps, fakes, strict=True):
            values = {"bytes": float(ladder.price(code, keep)[1])}
            values |= {key: float(compare(fake, real, lengths)) for key, compare in comparisons.items()}
            told.append(tell(values))
        pairs = zip(_addresses(subject, [real[0], *(fake[0] for fake in fakes)]), told, strict=True)
        original, *decoded = (Shown(*addresses, words) for addresses, words in pairs)
        sides = (1, 3) if codec.sample_rate is not None else (int(one.shape[-2]), int(one.shape[-1]))
        yield Sample(name, sides, original, decoded)


def tell(row: Mapping[str, float], names: Iterable[str] | None = None) -> str:
    """Say in one line what something costs and how good it is; what isn't finite is left out.

    Args:
        row: Values by the names of a table's columns.
        names: Those to tell; all where None.
    """
    words = []
    for name in row if names is None else names:
        title, form = PRINTED[name]
        if math.isfinite(row[name]):
            value = form.format(row[name])
            words.append(f"{value} {title}" if name in SIZES else f"{title} {value}")
    return " · ".join(words)


def _addresses(subject: Subject, signals: list[Tensor]) -> list[tuple[str, str]]:
    """Give the picture's and the player's address of each of a signal's versions, the original first."""
    rate = subject.codec.sample_rate
    if rate is not None:
        return [(_spectrogram(sound, rate), _sound(sound, rate)) for sound in signals]
    if signals[0].ndim == 3:
        return [(_webp(Image.fromarray(image.permute(1, 2, 0).numpy()), lossless=True), "") for image in signals]
    if not subject.codec.bounded:
        signals = [colours for _, (colours,) in principal_colours([("", [clip]) for clip in signals])]
    return [("", _mp4(clip, subject.codec.frame_rate or UNKNOWN_RATE)) for clip in signals]


def _address(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def _webp(image: Image.Image, *, lossless: bool) -> str:
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=80)
    return _address("image/webp", file.getvalue())


def _spectrogram(sound: Tensor, sample_rate: int) -> str:
    """Draw a sound's levels, the lowest frequency below; lossy, since nothing is measured on the picture."""
    levels = decibels(sound, sample_rate)[::-1]
    colours = matplotlib.colormaps["magma"](levels / 80 + 1, bytes=True)[..., :3]
    return _webp(Image.fromarray(colours.copy()), lossless=False)


def _sound(sound: Tensor, sample_rate: int) -> str:
    """Code a sound without loss: another codec's artefacts would be heard as ours."""
    kind = "FLAC" if sound.shape[1] > UNSEEKABLE else "WAV"
    file = io.BytesIO()
    soundfile.write(file, sound.T.numpy(), sample_rate, format=kind, subtype="PCM_16")
    return _address(f"audio/{kind.lower()}", file.getvalue())


def _mp4(clip: Tensor, frame_rate: float) -> str:
    return _address("video/mp4", _written(lambda path: write_mp4(path, clip, frame_rate), "clip.mp4"))


def _written(write: Callable[[Path], None], name: str) -> bytes:
    """Give what a function writes to a file of that name."""
    with TemporaryDirectory() as folder:
        write(Path(folder) / name)
        return (Path(folder) / name).read_bytes()
