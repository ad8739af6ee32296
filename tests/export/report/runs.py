"""Runs, a bundle and tables that the report's tests share."""

from pathlib import Path

import numpy as np
from omegaconf import OmegaConf, open_dict
from PIL import Image

from varitok.codecs.training.run import build_run

from ...codecs.examples import TINY_CLIP, TINY_RUN, TINY_SOUND
from ...composing import composed

HOSTILE = '</script><script>alert("1")</script><img src=x onerror=alert(2)>&amp;'
SHORT = ["updates=2", "callbacks.samples=null", "callbacks.evaluation.every=2", "training.log_every=1", "export=none"]
RUNS = {
    "image": [*TINY_RUN, *SHORT],
    "audio": [*TINY_SOUND, *SHORT, "data.val_seconds=1.2"],
    "video": [*TINY_CLIP, *SHORT],
}


def make_run(folder: Path, overrides: list[str], name: str | None = None) -> Path:
    """Train for a moment, and give the run's folder; its name may be anything."""
    config = composed(*overrides)
    if name is not None:
        with open_dict(config):
            config.name = name
    OmegaConf.save(config, folder / "config.yaml")
    run = build_run(config, folder)
    run.trainer.fit(run.module, run.data)
    return folder


def make_pictures(folder: Path, *names: str) -> Path:
    """Write pictures of noise."""
    random = np.random.default_rng(0)
    for name in names:
        Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / name)
    return folder
