"""What a file's header tells of it: what an index of shards holds, so that no header need be read again."""

from collections.abc import Mapping
from typing import Any

from ..batch import BadSample
from ..storage.members import File
from .audio import SUFFIXES as SOUND_SUFFIXES
from .audio import Sound
from .images import SUFFIXES as IMAGE_SUFFIXES
from .images import open_image
from .video import SUFFIXES as CLIP_SUFFIXES
from .video import Video

__all__ = ["KINDS", "facts_of"]

KINDS = tuple(dict.fromkeys((*IMAGE_SUFFIXES, *SOUND_SUFFIXES, *CLIP_SUFFIXES)))
"""Suffixes of all files that data sets are made of."""


def facts_of(file: File) -> Mapping[str, Any]:
    """Tell what a file's header says.

    Returns:
        Of an image `width` and `height`, in pixels; of a sound `samples` of each channel, `sample_rate` in Hz and
        `channels`; of a clip `width`, `height`, `frames`, `frame_rate` and `seconds`, and what is said of its sound.
        Of a file that can't be read `bad`, the reason.
    """
    found: dict[str, Any] = {}
    reasons: list[str] = []
    for suffixes, look in ((CLIP_SUFFIXES, _of_clip), (IMAGE_SUFFIXES, _of_image), (SOUND_SUFFIXES, _of_sound)):
        if file.suffix.lower() in suffixes:
            try:
                found |= look(file)
            except BadSample as error:
                reasons.append(error.args[1])
    return found or {"bad": reasons[0]}


def _of_image(file: File) -> dict[str, Any]:
    with open_image(file) as image:
        return {"width": image.width, "height": image.height}


def _of_sound(file: File) -> dict[str, Any]:
    with Sound(file) as sound:
        return {"samples": sound.length, "sample_rate": sound.sample_rate, "channels": sound.channels}


def _of_clip(file: File) -> dict[str, Any]:
    with Video(file) as clip:
        size = {"width": clip.width, "height": clip.height}
        return {**size, "frames": clip.length, "frame_rate": clip.frame_rate, "seconds": clip.seconds}
