"""Export at the end of a run."""

import logging
from collections.abc import Sequence
from pathlib import Path

import pytorch_lightning as pl

from varitok.codecs.training.module import CodecTraining

from .bundle import FORMATS, export_bundle

__all__ = ["ExportBundle"]

_log = logging.getLogger(__name__)


class ExportBundle(pl.Callback):
    """Writes `bundle/` in the run's folder when training has ended.

    Args:
        formats: Out of "onnx" and "torchscript"; the weights are always there.
    """

    def __init__(self, formats: Sequence[str] = FORMATS) -> None:
        self.formats = formats

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export what is evaluated: the moving average where there is one."""
        if not trainer.is_global_zero:
            return
        assert isinstance(pl_module, CodecTraining)
        folder = Path(trainer.default_root_dir) / "bundle"
        export_bundle(pl_module.evaluated, folder, formats=self.formats)
        _log.info("pictures:   %s", Path(trainer.default_root_dir) / "samples")
        _log.info("bundle:     %s", folder)
