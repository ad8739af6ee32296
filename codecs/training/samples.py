"""Reconstructions to look at and to hear: the originals over what each length of their codes gives back."""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varitok import UserError
from varitok.data.batch import BadSample, Batch, Sample, collate, normalise

from ..metrics.ladder import Evaluable, Ladder
from ..metrics.medium import medium_of
from ..metrics.pictures import draw_spectrograms, write_wav
from .loggers import RunLog
from .module import CodecTraining

__all__ = ["Row", "Samples", "draw_images", "reconstructions"]

LEGEND = 72  # pixels left of the pictures for the labels


class Row(NamedTuple):
    """One row of a picture.

    Attributes:
        label: What is kept.
        signals: `(c, *grid)` each, as a file would hold them, of their own lengths.
    """

    label: str
    signals: list[Tensor]


@torch.inference_mode()
def reconstructions(codec: Evaluable, batch: Batch, keeps: list[int] | None = None) -> list[Row]:
    """Give the originals, and below them what each length of their codes gives back.

    Args:
        codec: In evaluation mode, on the batch's device.
        batch: Signals.
        keeps: The numbers that are kept; 1, 2, 4, ... and all where None.

    Raises:
        UserError: A number is out of range.
    """
    ladder, medium = Ladder(codec, keeps), medium_of(codec)
    signal = normalise(batch.signal)
    code = ladder.encode(signal, batch.lengths)

    def row(label: str, signals: Tensor) -> Row:
        written = medium.as_written(signals).cpu()
        return Row(label, [one[:, :length] for one, length in zip(written, batch.lengths.tolist(), strict=True)])

    noun = "k =" if ladder.axis == "k" else "books:"
    return [
        row("original", signal),
        *(row(f"{noun} {keep}", ladder.decode(code, keep)) for keep in ladder.keeps),
    ]


def draw_images(rows: list[Row], scale: int = 1) -> Image.Image:
    """Draw images in a grid: a column for each, a labelled line for each row.

    Args:
        rows: Of images, uint8 `(3, h, w)`, all of one size.
        scale: Each pixel is drawn as a square of this side.
    """
    grid = torch.stack([torch.stack(row.signals) for row in rows])
    lines, b, _, h, w = grid.shape
    pixels = Image.fromarray(
        np.ascontiguousarray(grid.permute(0, 3, 1, 4, 2).reshape(lines * h, b * w, 3).numpy())
    ).resize((b * w * scale, lines * h * scale), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (LEGEND + pixels.width, pixels.height), "white")
    sheet.paste(pixels, (LEGEND, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, row in enumerate(rows):
        pen.text((LEGEND - 6, (line + 0.5) * h * scale), row.label, fill="black", font=font, anchor="rm")
    return sheet


class Samples(pl.Callback):
    """Reconstructs the same validation signals every so many updates, into `samples/` and to the loggers.

    Images give a picture `update_N.png`; sounds one of their spectrograms, and their WAV files in `update_N/`.

    Args:
        every: Updates between two; the end of the run gets one in any case.
        count: How many signals.
        scale: Each pixel of an image is drawn as a square of this side.
        keeps: The numbers of tokens or books that are kept; 1, 2, 4, ... and all where None.
    """

    def __init__(self, every: int, count: int = 8, scale: int = 1, keeps: list[int] | None = None) -> None:
        self.every = every
        self.count = count
        self.scale = scale
        self.keeps = keeps
        self.chosen: Batch | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Reconstruct when it is due."""
        assert isinstance(pl_module, CodecTraining)
        if pl_module.stepped and pl_module.update % self.every == 0 and pl_module.update < pl_module.total:
            self._save(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Reconstruct the end of the run."""
        assert isinstance(pl_module, CodecTraining)
        self._save(trainer, pl_module)

    def _save(self, trainer: pl.Trainer, module: CodecTraining) -> None:
        if not trainer.is_global_zero:
            return
        if self.chosen is None:
            self.chosen = self._choose(trainer)
        codec = module.evaluated.eval()
        device = module.device  # a codec may have no parameter
        batch = self.chosen._replace(
            signal=self.chosen.signal.to(device),
            lengths=self.chosen.lengths.to(device),
        )
        rows = reconstructions(codec, batch, self.keeps)
        module.train()
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(exist_ok=True)
        stem = folder / f"update_{module.update:07d}"
        picture = stem.with_suffix(".png")
        sounds: dict[str, Path] = {}
        if codec.sample_rate is None:
            draw_images(rows, self.scale).save(picture)
        else:
            draw_spectrograms(picture, rows, codec.sample_rate)
            for row in rows:
                for column, sound in enumerate(row.signals):
                    name = f"{column}_{row.label.replace(': ', '_')}"
                    sounds[name] = stem / f"{name}.wav"
                    write_wav(sounds[name], sound, codec.sample_rate)
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                logger.log_picture("samples", picture, module.update)
                logger.log_sounds("samples", sounds, module.update)

    def _choose(self, trainer: pl.Trainer) -> Batch:
        """Take signals spread evenly over the validation set."""
        val = trainer.datamodule.splits.val  # type: ignore[attr-defined]
        signals: list[Tensor] = []
        for index in torch.linspace(0, len(val) - 1, min(self.count, len(val))).round().int().tolist():
            with suppress(BadSample):
                signals.append(val[0, index])
        if not signals:
            raise UserError("none of the validation signals that were to be shown could be read")
        return collate([Sample(signal) for signal in signals])
