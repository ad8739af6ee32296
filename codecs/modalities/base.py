"""What a modality is: how its signals are recognized, named, measured, drawn, played, read and described."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.data.batch import Splits

from ..codec import Codec
from ..metrics.metric import Column, Comparison, Metric
from ..metrics.rate import BYTES

__all__ = ["Exhibit", "GraphNames", "Modality", "Rows"]

Rows = Sequence[tuple[str, Sequence[Tensor]]]
"""A label and signals `(c, *grid)` for each row of a picture; the originals are first."""


class GraphNames(NamedTuple):
    """Names in a codec's ONNX graphs, as the ecosystem's libraries have them.

    Attributes:
        signal: Input of the encoder.
        codes: Output of the encoder and input of the decoder.
        back: Output of the decoder.
        axes: Free axes of a signal; the decoder's have the suffix `_out`.
        latent_axes: Free axes of its codes, if tokens are on a grid.
    """

    signal: str
    codes: str
    back: str
    axes: tuple[str, ...]
    latent_axes: tuple[str, ...]


class Exhibit(NamedTuple):
    """A signal on a page.

    Attributes:
        picture: A WebP file; empty if there is nothing to see.
        recording: A file to play; empty if there is none.
        kind: MIME type of the recording.
    """

    picture: bytes = b""
    recording: bytes = b""
    kind: str = ""


class Modality(ABC):
    """A kind of signal: all that training, evaluation and export know of it. Bundles have a face of their own.

    Args:
        sample_rate: Sample rate of the codec's signals, in Hz; 0 without one.
        frame_rate: Frame rate of the codec's signals; None if unknown.

    Attributes:
        name: In bundles and containers.
        noun: What one signal is called.
        plural: Plural of the noun; the column of their number.
        kind: The same for the headings of pages.
        file_noun: Noun for a file that holds a signal.
        suffixes: Suffixes of those files.
        grid: Letters of a signal's axes after the channels, for config.json.
        graph: Names in ONNX graphs.
        rounding: What is compared, for the header of a table.
        metrics: All that there are.
        shown: The two metrics that are measured while a run goes on, and drawn.
        rate: The column of bits per `amount`.
        size: The column over which quality is drawn.
        element: HTML element that plays an exhibit's recording; empty if there is none.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    plural: ClassVar[str]
    kind: ClassVar[str]
    file_noun: ClassVar[str] = "file"
    suffixes: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[str]
    graph: ClassVar[GraphNames]
    rounding: ClassVar[str]
    metrics: ClassVar[tuple[Metric, ...]]
    shown: ClassVar[tuple[str, str]]
    rate: ClassVar[Column]
    size: ClassVar[Column] = BYTES
    element: ClassVar[str] = ""

    def __init_subclass__(cls) -> None:
        cls.plural = f"{cls.noun}s"

    def __init__(self, sample_rate: int = 0, frame_rate: float | None = None) -> None:
        self.sample_rate = sample_rate
        self.frame_rate = frame_rate

    @classmethod
    @abstractmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec's signals are of this modality, by its `sample_rate`, `downsample` and `bounded`."""

    def available(self) -> tuple[str, ...]:
        """List the metrics that can be computed on this machine."""
        return tuple(metric.name for metric in self.metrics if metric.available(self.sample_rate))

    def metric(self, name: str) -> Metric:
        """Return the metric of a name.

        Raises:
            UserError: There is none.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        known = ", ".join(metric.name for metric in self.metrics)
        raise UserError(f"metric {name!r} is unknown; {self.plural} have {known}")

    def comparison(self, name: str, device: torch.device | str) -> Comparison:
        """Build a comparison of signals one by one.

        Raises:
            UserError: The metric is unknown or compares many signals at once, or what it needs isn't on this machine.
        """
        build = self.metric(name).build
        if build is None:
            raise UserError(f"{name} compares many signals at once; one has none")
        return build(torch.device(device), self.sample_rate)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Return what metrics mean, for signals whose shortest side is `side`."""
        facts = self.facts(side)
        return {name: self.metric(name).definition.format(**facts) for name in names}

    def facts(self, side: int) -> dict[str, int]:
        """Return the values of the fields in the metrics' definitions."""
        return {"rate": self.sample_rate}

    @abstractmethod
    def as_written(self, signal: Tensor) -> Tensor:
        """Return the values that a file would hold of signals in [-1, 1]."""

    @abstractmethod
    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the amount of a batch, by which bits are divided for `rate`."""

    def cut(self, signal: Tensor, seconds: float) -> Tensor:
        """Return the beginning of a signal `(c, *grid)` that a page has room for."""
        return signal

    @abstractmethod
    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Write rows of signals: a picture `STEM.png`, and below `STEM/` what can't be seen in it.

        Args:
            stem: Path of the files without their suffixes.
            rows: As a file would hold them.
            scale: Each pixel is drawn as a square of this side.

        Returns:
            The picture's path, and those of the others by name.
        """

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return a signal's versions `(c, *grid)`, the original first, as a page shows and plays them.

        Raises:
            UserError: Pages can't show this modality.
        """
        raise UserError(f"a page can't show {self.plural}")

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return the modality's own entries of a bundle's config.json.

        Args:
            codec: What is exported.
            size: Channels and grid of the shortest signal.
        """
        return {}

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build both splits of a folder's files, made as a run's configuration of data makes its own.

        Raises:
            UserError: There is no such folder, or no files hold such signals.
        """
        raise UserError(f"{folder}: no files hold {self.plural}")

    def dataset(
        self, config: Mapping[str, Any], files: Sequence[Path], seconds: float | None, side: int
    ) -> tuple[Dataset[Tensor], str]:
        """Build a dataset of files as a bundle takes them, and say how they are made.

        Args:
            config: The bundle's config.json, as `describe` wrote it.
            files: With the `suffixes`.
            seconds: Taken from the beginning of each; None for the default.
            side: Side of video frames, in pixels, if the bundle takes any.
        """
        raise UserError(f"no files hold {self.plural}")
