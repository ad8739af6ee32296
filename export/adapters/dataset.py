"""Ordinary files as the signals that a bundle takes, made as an evaluation makes them; with torch."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.data.datasets import audio as sounds
from varitok.data.datasets import images
from varitok.data.datasets import video as videos
from varitok.data.decoding.audio import SUFFIXES as AUDIO_SUFFIXES
from varitok.data.decoding.images import SUFFIXES as IMAGE_SUFFIXES
from varitok.data.decoding.video import SUFFIXES as VIDEO_SUFFIXES

from ..runtime.audio import SoundBundle
from ..runtime.bundle import Bundle
from ..runtime.images import ImageBundle
from ..runtime.load import VideoBundle

__all__ = ["dataset_of", "files_of", "noun_of"]

SIDE = 128  # pixels of a clip's frames, where a bundle takes any
SECONDS = 4.0  # of a clip, where nothing is said
RATE = 8.0  # frames a second that are taken where a bundle tells none

_SUFFIXES: dict[type, tuple[str, tuple[str, ...]]] = {
    ImageBundle: ("picture", IMAGE_SUFFIXES),
    SoundBundle: ("sound", tuple(suffix for suffix in AUDIO_SUFFIXES if suffix not in VIDEO_SUFFIXES)),
    VideoBundle: ("clip", VIDEO_SUFFIXES),
}  # what the files of each kind of bundle are called, and how their names end


def noun_of(bundle: Bundle) -> str:
    """Tell what one of a bundle's files is called."""
    return _SUFFIXES[type(bundle)][0]


def files_of(bundle: Bundle, paths: Sequence[Path], option: str) -> list[Path]:
    """List the files of a bundle's kind, those below folders too, each once.

    Args:
        bundle: Of images, sounds or clips.
        paths: Files and folders.
        option: By which they were given, for what is told.

    Raises:
        UserError: One isn't there, or none is of the kind.
    """
    what, suffixes = _SUFFIXES[type(bundle)]
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"{option} {path}: no such file or folder")
        found += sorted(path.rglob("*")) if path.is_dir() else [path]
    mine = list(dict.fromkeys(path for path in found if path.suffix.lower() in suffixes and path.is_file()))
    if not mine:
        none = f"none of {option} is a {what} ({' '.join(suffixes)})"
        ask = none if paths else f"give some {what}s with {option}"
        raise UserError(f"{bundle.folder}: a bundle is shown on files of yours; {ask}")
    return mine


def dataset_of(
    bundle: Bundle, files: Sequence[Path], seconds: float | None, side: int = SIDE
) -> tuple[Dataset[Tensor], str]:
    """Make files what the bundle takes, as an evaluation does, and say how.

    Args:
        bundle: Of images, sounds or clips.
        files: Of its kind.
        seconds: Of each sound or clip that are taken, from its beginning; None: all of a sound.
        side: Of clips' frames, in pixels, where the bundle takes any.
    """
    if isinstance(bundle, ImageBundle):
        side = bundle.image_size
        data = images.ImageFiles(files, image_size=side, train=False)
        return data, f"{images.PROTOCOL}; {side} x {side} pixels"
    if isinstance(bundle, SoundBundle):
        splits = sounds.splits_of(
            "", files, files, sample_rate=bundle.sample_rate, crop_tokens=None, hop=bundle.hop,
            channels=bundle.channels, val_seconds=seconds,
        )  # fmt: skip
        return splits.val, splits.about["protocol"]
    assert isinstance(bundle, VideoBundle)
    rate = bundle.frame_rate or RATE
    tokens = max(1, int(((seconds or SECONDS) * rate + bundle.lead) // bundle.hop[0]))
    size = bundle.frame_size or [-(-side // step) * step for step in bundle.hop[1:]]
    splits = videos.splits_of(
        "", files, files, crop_tokens=tokens, hop=bundle.hop[0], lead=bundle.lead, image_size=list(size),
        frame_rate=rate,
    )  # fmt: skip
    return splits.val, splits.about["protocol"]
