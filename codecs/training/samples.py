"""Reconstructions to look at: the originals over what each number of kept tokens gives back."""

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varitok import UserError
from varitok.data.batch import BadSample, normalise, to_uint8

from ..codec import Codec
from ..lengths import ladder
from .loggers import RunLog
from .module import CodecTraining

__all__ = ["Samples", "draw"]

LEGEND = 64  # pixels left of the pictures for the labels


@torch.inference_mode()
def draw(codec: Codec, images: Tensor, keeps: list[int] | None = None, scale: int = 1) -> Image.Image:
    """Draw a grid: a column for each image, the original on top, below it its reconstructions from k tokens.

    Args:
        codec: In evaluation mode.
        images: uint8 `(b, 3, h, w)`.
        keeps: The numbers of tokens, 1, 2, 4, ... N where None.
        scale: Each pixel is drawn as a square of this side.
    """
    keeps = keeps or ladder(codec.tokens)
    device = next(codec.parameters()).device
    codes = codec.encode(normalise(images.to(device)))
    rows = [images] + [to_uint8(codec.decode(codes[..., :k])).cpu() for k in keeps]
    b, _, h, w = images.shape
    grid = torch.stack(rows).permute(0, 3, 1, 4, 2).reshape(len(rows) * h, b * w, 3)
    pixels = Image.fromarray(np.ascontiguousarray(grid.numpy())).resize(
        (b * w * scale, len(rows) * h * scale), Image.Resampling.NEAREST
    )
    sheet = Image.new("RGB", (LEGEND + pixels.width, pixels.height), "white")
    sheet.paste(pixels, (LEGEND, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, label in enumerate(["original", *(f"k = {k}" for k in keeps)]):
        pen.text((LEGEND - 6, (row + 0.5) * h * scale), label, fill="black", font=font, anchor="rm")
    return sheet


class Samples(pl.Callback):
    """Draws the same validation images every so many updates, into `samples/` and to the loggers.

    Args:
        every: Updates between two pictures; the end of the run gets one in any case.
        images: Columns of the picture.
        scale: Each pixel is drawn as a square of this side.
    """

    def __init__(self, every: int, images: int = 8, scale: int = 1) -> None:
        self.every = every
        self.images = images
        self.scale = scale
        self.shown: Tensor | None = None

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: object) -> None:
        """Draw when a picture is due."""
        assert isinstance(pl_module, CodecTraining)
        if pl_module.stepped and pl_module.update % self.every == 0 and pl_module.update < pl_module.total:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the end of the run."""
        assert isinstance(pl_module, CodecTraining)
        self._draw(trainer, pl_module)

    def _draw(self, trainer: pl.Trainer, module: CodecTraining) -> None:
        if not trainer.is_global_zero:
            return
        if self.shown is None:
            self.shown = self._choose(trainer)
        picture = draw(module.evaluated.eval(), self.shown, scale=self.scale)
        module.train()
        folder = Path(trainer.default_root_dir) / "samples"
        folder.mkdir(exist_ok=True)
        picture.save(folder / f"update_{module.update:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, RunLog):
                logger.log_picture("samples", picture, module.update)

    def _choose(self, trainer: pl.Trainer) -> Tensor:
        """Take images spread evenly over the validation set."""
        val = trainer.datamodule.splits.val  # type: ignore[attr-defined]
        images: list[Tensor] = []
        for index in torch.linspace(0, len(val) - 1, min(self.images, len(val))).round().int().tolist():
            with suppress(BadSample):
                images.append(val[0, index])
        if not images:
            raise UserError("none of the validation images that were to be drawn could be read")
        return torch.stack(images)
