"""A callback that exports a bundle at the end of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from omegaconf import OmegaConf

from varitok.codecs.training.module import CodecTraining

from .bundle import FORMATS, architecture, export_bundle

__all__ = ["ExportBundle"]

_log = logging.getLogger(__name__)


class ExportBundle(pl.Callback):
    """A callback that exports the codec, averaged if the run averages weights, to the run's `bundle/` at its end.

    Args:
        formats: Names in `FORMATS`; `varitok.load` needs onnx.
        streaming: Whether to export the streaming graphs too, if the codec can stream; takes minutes for video.
        weights: A name in `WEIGHTS`: to what weights are rounded.
    """

    def __init__(self, formats: Sequence[str] = FORMATS, streaming: bool = True, weights: str = "float32") -> None:
        self.formats = tuple(formats)
        self.streaming = streaming
        self.weights = weights

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Get the codec; a sharded one is gathered from all processes, which later have left their group."""
        assert isinstance(pl_module, CodecTraining)
        self.codec = pl_module.evaluated

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export on rank 0."""
        codec = self.codec.cpu()
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir)
        resolved = folder / "config.yaml"
        config = OmegaConf.load(resolved) if resolved.is_file() else OmegaConf.create()
        about = {"architecture": architecture(config), "image_size": OmegaConf.select(config, "data.image_size")}
        form: dict[str, Any] = {"formats": self.formats, "streaming": self.streaming, "weights": self.weights}
        export_bundle(codec, folder / "bundle", **about, **form)
        _log.info("samples: %s", max((folder / "samples").glob("*.png"), default=folder / "samples"))
        _log.info("report: varitok report %s --out report.html", folder)
        _log.info('bundle: varitok.load("%s")', folder / "bundle")
