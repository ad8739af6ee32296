"""Interface of a modality: the metrics, units, pictures, files and dataset of a kind of signal."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
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
"""Rows of a picture: a label and signals `(c, *grid)` each; the first row has the originals."""


class GraphNames(NamedTuple):
    """Names of inputs, outputs and axes in a codec's ONNX graphs, as in the Hugging Face libraries.

    Attributes:
        signal: Input of the encoder.
        codes: Output of the encoder and input of the decoder.
        back: Output of the decoder.
        axes: Dynamic axes of the signal; the decoder's have the suffix `_out`.
        latent_axes: Dynamic axes of the codes, if tokens are on a grid.
    """

    signal: str
    codes: str
    back: str
    axes: tuple[str, ...]
    latent_axes: tuple[str, ...]


class Exhibit(NamedTuple):
    """A signal's media for an HTML page.

    Attributes:
        picture: Bytes of a WebP file; empty if there is none.
        recording: Bytes of an audio or video file; empty if there is none.
        kind: MIME type of the recording.
    """

    picture: bytes = b""
    recording: bytes = b""
    kind: str = ""


class Modality(ABC):
    """A kind of signal, for training, evaluation and export. Bundles have classes of their own.

    Args:
        sample_rate: Sample rate of the codec's signals, in Hz; 0 without one.
        frame_rate: Frame rate of the codec's signals, in Hz; None if unknown.

    Attributes:
        name: Name in bundles and containers.
        noun: Noun for one signal.
        plural: Plural of the noun; also the column of the number of signals.
        kind: Noun for one signal in headings of pages.
        file_noun: Noun for a file with a signal.
        examples: Two files below `data/embedded/`, for the test vectors of bundles; empty for synthetic signals.
        grid: Letters of a signal's axes after the channels, for config.json.
        graph: Names in ONNX graphs.
        rounding: Rounding before comparison, for the header of a table.
        precision: Precision of training on a GPU, as Lightning calls it, if `trainer.precision` is auto.
        metrics: All metrics of the modality.
        shown: The two metrics that training measures and figures show.
        rate: Column of the bitrate: bits per `amount`.
        size: Column on the horizontal axis of figures.
        element: HTML element that plays an exhibit's recording; empty if there is none.
    """

    name: ClassVar[str]
    noun: ClassVar[str]
    plural: ClassVar[str]
    kind: ClassVar[str]
    file_noun: ClassVar[str] = "file"
    examples: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[str]
    graph: ClassVar[GraphNames]
    rounding: ClassVar[str]
    precision: ClassVar[str] = "32-true"
    metrics: tuple[Metric, ...]
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
        """Return whether a codec has this modality, by its `sample_rate`, `downsample` and `bounded`."""

    def with_metric(self, metric: Metric) -> "Modality":
        """Return the modality with a metric in the place of its own of that name.

        Raises:
            UserError: The modality has no such metric.
        """
        self.metric(metric.name)
        found = copy(self)
        found.metrics = tuple(metric if own.name == metric.name else own for own in self.metrics)
        return found

    def available(self) -> tuple[str, ...]:
        """List the names of the metrics that this machine computes by default."""
        return tuple(metric.name for metric in self.metrics if metric.available(self.sample_rate))

    def metric(self, name: str) -> Metric:
        """Return a metric by its name.

        Raises:
            UserError: The modality has no such metric.
        """
        for metric in self.metrics:
            if metric.name == name:
                return metric
        known = ", ".join(metric.name for metric in self.metrics)
        raise UserError(f"metric {name!r} is unknown; {self.plural} have {known}")

    def comparison(self, name: str, device: torch.device | str) -> Comparison:
        """Build the per-signal comparison of a metric.

        Raises:
            UserError: The metric is unknown, has no value for a single signal, or needs a package or weights that
                aren't on this machine.
        """
        build = self.metric(name).build
        if build is None:
            raise UserError(f"{name} compares sets of {self.plural}; a single {self.noun} has no value")
        return build(torch.device(device), self.sample_rate)

    def definitions(self, names: Sequence[str], side: int) -> dict[str, str]:
        """Return the metrics' definitions, by name, for signals whose shortest side is `side`."""
        facts = self.facts(side)
        return {name: self.metric(name).definition.format(**facts) for name in names}

    def facts(self, side: int) -> dict[str, int]:
        """Return the values of the fields in metrics' definitions."""
        return {"rate": self.sample_rate}

    @abstractmethod
    def as_written(self, signal: Tensor) -> Tensor:
        """Round signals in [-1, 1] to the values that a file would store."""

    @abstractmethod
    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the divisor of a batch's bits for `rate`, such as its number of pixels."""

    def cut(self, signal: Tensor, seconds: float) -> Tensor:
        """Return the beginning of a signal `(c, *grid)`, for a page with limited room."""
        return signal

    @abstractmethod
    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Write sample reconstructions: a picture `STEM.png`, and audio or video files in the folder `STEM/`.

        Args:
            stem: Path of the picture without its suffix.
            rows: Signals of each row, as `as_written` returns them.
            scale: Factor by which pixels are enlarged.

        Returns:
            The picture's path, and the paths of the other files by name.
        """

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return media for a page of a signal's versions `(c, *grid)`, the original first.

        Raises:
            UserError: Pages can't show this modality.
        """
        raise UserError(f"a page can't show {self.plural}")

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return the modality's own entries of a bundle's config.json.

        Args:
            codec: Codec to export.
            size: Shape `(c, *grid)` of the shortest signal.
        """
        return {}

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build the splits of a folder's files, preprocessed as in a run's data configuration.

        Unless it has the subfolders train and val, each file is in both splits.

        Raises:
            UserError: The folder doesn't exist, or the modality has no file format.
        """
        raise UserError(f"{folder}: {self.plural} can't be read from files")

    def dataset(
        self, config: Mapping[str, Any], files: Sequence[Path], seconds: float | None, side: int
    ) -> tuple[Dataset[Tensor], str]:
        """Build a dataset of files, preprocessed for a bundle; return it with a description of the preprocessing.

        Args:
            config: The bundle's config.json, as `describe` wrote it.
            files: Paths of media files.
            seconds: Duration kept from the beginning of each file; None for the default.
            side: Side of video frames, in pixels, if the bundle takes any.
        """
        raise UserError(f"{self.plural} can't be read from files")
