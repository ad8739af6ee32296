"""Sample reconstructions of validation signals: the originals, and a row of reconstructions for each kept length."""

import logging
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.data.batch import Batch, Sample, collate, normalize
from varitok.data.decoding.errors import BadSample

from ...evaluation.ladder import Evaluable, Ladder
from ...modalities.registry import modality_of
from ..base import Training
from ..logging.loggers import RunLog
from ..module import CodecTraining
from .periodic import Periodic

__all__ = ["Row", "Samples", "reconstructions", "spread"]

_log = logging.getLogger(__name__)


class Row(NamedTuple):
    """One row of a samples picture.

    Attributes:
        label: Kept length, as "k = 4".
        signals: Signals `(c, *grid)` in a file's value range, cut to their own lengths.
    """

    label: str
    signals: list[Tensor]


@torch.inference_mode()
def reconstructions(codec: Evaluable, batch: Batch, keeps: list[int] | None = None) -> list[Row]:
    """Return a row of the originals, and a row of reconstructions at each kept length.

    Args:
        codec: Codec in evaluation mode, on the batch's device.
        batch: Signals to reconstruct.
        keeps: Numbers of tokens or codebooks to keep; None: 1, 2, 4, ... and all.

    Raises:
        UserError: A number is out of range.
    """
    ladder, modality = Ladder(codec, keeps), modality_of(codec)
    signal = normalize(batch.signal)
    code = ladder.encode(signal, batch.lengths)

    def row(label: str, signals: Tensor) -> Row:
        written = modality.as_written(signals).cpu()
        return Row(label, [one[:, :length] for one, length in zip(written, batch.lengths.tolist(), strict=True)])

    noun = "k =" if ladder.axis == "k" else "codebooks:"
    return [
        row("original", signal),
        *(row(f"{noun} {keep}", ladder.decode(code, keep)) for keep in ladder.keeps),
    ]


def spread(val: Dataset[Tensor], count: int) -> dict[int, Tensor]:
    """Select `count` signals evenly spaced in a validation set, by index; unreadable ones are skipped.

    Raises:
        UserError: None could be read.
    """
    total = len(val)  # type: ignore[arg-type]
    signals: dict[int, Tensor] = {}
    for index in torch.linspace(0, total - 1, min(count, total)).round().int().tolist():
        with suppress(BadSample):
            signals[index] = val[0, index]
    if not signals:
        raise UserError("none of the validation signals selected as samples could be read")
    return signals


class Samples(Periodic):
    """The callback that reconstructs the same validation signals periodically, for `samples/` and the loggers.

    `samples/update_N.png` is the picture of all rows; audio and video files are in `samples/update_N/`.

    Args:
        every: Updates between two; the last update always has samples.
        count: Number of signals.
        scale: Side of the square that each image pixel is drawn as.
        keeps: Numbers of tokens or codebooks to keep; None: 1, 2, 4, ... and all.
    """

    def __init__(self, every: int, count: int = 8, scale: int = 1, keeps: list[int] | None = None) -> None:
        super().__init__(every)
        self.count = count
        self.scale = scale
        self.keeps = keeps
        self.chosen: Batch | None = None

    def act(self, trainer: pl.Trainer, module: Training, last: bool) -> None:
        """Reconstruct, write and log the samples."""
        assert isinstance(module, CodecTraining)
        codec = module.evaluated.eval()
        if not trainer.is_global_zero:
            module.train()
            return
        if self.chosen is None:
            found = spread(trainer.datamodule.splits.val, self.count)  # type: ignore[attr-defined]
            self.chosen = collate([Sample(signal) for signal in found.values()])
        device = module.device  # a codec may have no parameter
        batch = self.chosen._replace(signal=self.chosen.signal.to(device), lengths=self.chosen.lengths.to(device))
        rows = reconstructions(codec, batch, self.keeps)
        module.train()
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        stem = folder / f"update_{module.update:07d}"
        try:
            picture, media = modality_of(codec).write_samples(stem, rows, self.scale)
        except OSError as error:  # a full disk
            _log.warning("%s: can't be written (%s); the run goes on", stem, error.strerror)
            return
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                logger.log_picture("samples", picture, module.update)
                logger.log_media("samples", media, module.update)
