"""What differs between kinds of signals when they are measured: what a file would hold, distances, a rate's name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from varitok import UserError
from varitok.data.batch import to_uint8

from . import audio, frechet, image

__all__ = ["Comparison", "Images", "Medium", "Sounds", "medium_of"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(decoded, original, lengths) to one value for each signal, NaN where it has none."""


class Medium(ABC):
    """A kind of signal.

    Attributes:
        noun: What one signal is called.
        rounding: What is compared, in the words that go above a table.
        shown: The metrics that are measured while a run goes on, and drawn.
        rate: Name of the column of bits per `amount`.
        rate_meaning: What that is.
    """

    noun: str
    rounding: str
    shown: tuple[str, str]
    rate: str
    rate_meaning: str

    @abstractmethod
    def available(self) -> tuple[str, ...]:
        """List the metrics that can be computed on this machine: the basic ones, and those whose weights are found."""

    @abstractmethod
    def comparison(self, name: str, device: torch.device) -> Comparison:
        """Make the comparison of that name.

        Raises:
            UserError: The name is unknown, or what it needs isn't on this machine.
        """

    @abstractmethod
    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Say what metrics mean, of signals whose shortest side is `side`."""

    @abstractmethod
    def as_written(self, signal: Tensor) -> Tensor:
        """Give what a file would hold."""

    @abstractmethod
    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count what bits are divided by, over a batch."""

    def features(self, device: torch.device) -> frechet.Features:
        """Give the network on whose features "rfid" is taken.

        Raises:
            UserError: This kind has none.
        """
        raise UserError(f"metric 'rfid' is of images, and these are {self.noun}s")


class Images(Medium):
    """Images `(b, 3, h, w)`, compared as 8-bit values."""

    noun = "image"
    rounding = "both sides are compared as 8-bit values; decoded ones are clamped and rounded to the nearest"
    shown = ("psnr", "ssim")
    rate = "bpp"
    rate_meaning = "bits / pixels"

    def available(self) -> tuple[str, ...]:
        """List the metrics that can be computed on this machine: the basic ones, and those whose weights are found."""
        return image.available() + (("rfid",) if frechet.available() else ())

    def comparison(self, name: str, device: torch.device) -> Comparison:
        """Make the comparison of that name."""
        compare = image.comparison(name, device)
        return lambda fake, real, _: compare(fake, real)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Say what metrics mean."""
        meanings = {name: frechet.DEFINITION if name == "rfid" else image.DEFINITIONS[name] for name in names}
        if "ms_ssim" in meanings:
            meanings["ms_ssim"] = meanings["ms_ssim"].format(scales=image.scales(side, side))
        return meanings

    def as_written(self, signal: Tensor) -> Tensor:
        """Give 8-bit values."""
        return to_uint8(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count pixels."""
        return float(signal[:, 0].numel())

    def features(self, device: torch.device) -> frechet.Features:
        """Give Inception."""
        return frechet.inception(device)


class Sounds(Medium):
    """Sounds `(b, c, t)`, compared as 16-bit values.

    Args:
        sample_rate: In Hz.
    """

    noun = "sound"
    rounding = "both sides are compared as 16-bit values; decoded ones are clamped and rounded to the nearest"
    shown = ("mel", "si_sdr")
    rate = "kbps"
    rate_meaning = "bits / seconds / 1000"

    def __init__(self, sample_rate: int) -> None:
        self.sample_rate = sample_rate

    def available(self) -> tuple[str, ...]:
        """List the metrics that can be computed at this rate: the basic ones, and those whose package is installed."""
        return audio.available(self.sample_rate)

    def comparison(self, name: str, device: torch.device) -> Comparison:
        """Make the comparison of that name."""
        return audio.comparison(name, self.sample_rate, device)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Say what metrics mean."""
        return {name: audio.DEFINITIONS[name].format(rate=self.sample_rate) for name in names}

    def as_written(self, signal: Tensor) -> Tensor:
        """Give 16-bit values, as floats in [-1, 1)."""
        return audio.written(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count thousands of seconds."""
        return float(lengths.sum()) / self.sample_rate * 1000


def medium_of(codec: object) -> Medium:
    """Tell what a codec's signals are: sounds where it has a `sample_rate`."""
    sample_rate = getattr(codec, "sample_rate", None)
    return Images() if sample_rate is None else Sounds(sample_rate)
