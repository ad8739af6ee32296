"""What differs between kinds of signals when they are measured: what a file would hold, distances, a rate's name."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from varitok import UserError
from varitok.data.batch import to_uint8

from . import audio, feature, frechet, fvd, image, video

__all__ = ["Clips", "Comparison", "Features", "Images", "Medium", "Sounds", "medium_of"]

Comparison: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(decoded, original, lengths) to one value for each signal, NaN where it has none."""


class Medium(ABC):
    """A kind of signal.

    Attributes:
        noun: What one signal is called.
        rounding: What is compared, in the words that go above a table.
        shown: The metrics that are measured while a run goes on, and drawn.
        spreads: Those that compare all signals with all reconstructions: Fréchet distances.
        rate: Name of the column of bits per `amount`.
        rate_meaning: What that is.
    """

    noun: str
    rounding: str
    shown: tuple[str, str]
    spreads: tuple[str, ...] = ()
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

    def network(self, name: str, device: torch.device) -> frechet.Network:
        """Give the network on whose features one of `spreads` is taken.

        Raises:
            UserError: Its weights aren't on this machine.
        """
        raise UserError(f"metric {name!r} is not of {self.noun}s")


class Images(Medium):
    """Images `(b, 3, h, w)`, compared as 8-bit values."""

    noun = "image"
    rounding = "both sides are compared as 8-bit values; decoded ones are clamped and rounded to the nearest"
    shown = ("psnr", "ssim")
    spreads = ("rfid",)
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
        return _of_frames(image.DEFINITIONS | {"rfid": frechet.DEFINITION}, names, side)

    def as_written(self, signal: Tensor) -> Tensor:
        """Give 8-bit values."""
        return to_uint8(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count pixels."""
        return float(signal[:, 0].numel())

    def network(self, name: str, device: torch.device) -> frechet.Network:
        """Give Inception."""
        inception = frechet.inception(device)
        return frechet.Network(lambda images, _: inception(images), frechet.WIDTH)


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


class Clips(Medium):
    """Clips `(b, 3, t, h, w)`, compared as 8-bit values.

    Their rate is in bits a pixel, since what a second of them costs hangs on a frame rate that not every file tells.
    """

    noun = "clip"
    rounding = Images.rounding
    shown = Images.shown
    spreads = tuple(fvd.DEFINITIONS)
    rate = "bpp"
    rate_meaning = "bits / (pixels of a frame * frames)"

    def available(self) -> tuple[str, ...]:
        """List the metrics that can be computed on this machine: the basic ones, and those whose weights are found."""
        return video.available() + fvd.available()

    def comparison(self, name: str, device: torch.device) -> Comparison:
        """Make the comparison of that name."""
        return video.comparison(name, device)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Say what metrics mean."""
        return _of_frames(video.DEFINITIONS | fvd.DEFINITIONS, names, side)

    def network(self, name: str, device: torch.device) -> frechet.Network:
        """Give I3D, or its stand-in."""
        return fvd.network(name, device)

    def as_written(self, signal: Tensor) -> Tensor:
        """Give 8-bit values."""
        return to_uint8(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count pixels."""
        return float(lengths.sum()) * signal.shape[3] * signal.shape[4]


class Features(Medium):
    """Feature clips `(b, c, t, rows, columns)`, compared as they are."""

    noun = "clip"
    rounding = "none: features are compared as floats"
    shown = ("mse", "cosine")
    rate = "bpf"
    rate_meaning = "bits / frames"

    def available(self) -> tuple[str, ...]:
        """List the metrics."""
        return tuple(feature.DEFINITIONS)

    def comparison(self, name: str, device: torch.device) -> Comparison:
        """Make the comparison of that name."""
        return feature.comparison(name)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Say what metrics mean."""
        return {name: feature.DEFINITIONS[name] for name in names}

    def as_written(self, signal: Tensor) -> Tensor:
        """Give them as they are."""
        return signal.float()

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Count frames."""
        return float(lengths.sum())


def _of_frames(definitions: Mapping[str, str], names: Sequence[str], side: int) -> dict[str, str]:
    """Choose definitions; MS-SSIM's tells its scales."""
    scales = image.scales(side, side) if "ms_ssim" in names else 0
    return {name: definitions[name].replace("{scales}", str(scales)) for name in names}


def medium_of(codec: object) -> Medium:
    """Tell what a codec's signals are.

    Sounds where it has a `sample_rate`; clips where its `hop` has three axes, of features where they aren't `bounded`.
    """
    sample_rate = getattr(codec, "sample_rate", None)
    if sample_rate is not None:
        return Sounds(sample_rate)
    if len(getattr(codec, "hop", ())) != 3:
        return Images()
    return Clips() if getattr(codec, "bounded", True) else Features()
