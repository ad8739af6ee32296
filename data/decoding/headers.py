"""The contents of a file's header: an index of shards stores them, so that no header need be read again."""

from collections.abc import Mapping
from typing import Any

from ..batch import BadSample
from ..storage.members import File
from .audio import SUFFIXES as SOUND_SUFFIXES
from .audio import AudioFile
from .images import SUFFIXES as IMAGE_SUFFIXES
from .images import open_image
from .video import SUFFIXES as CLIP_SUFFIXES
from .video import VideoFile

__all__ = ["KINDS", "probe"]

KINDS = tuple(dict.fromkeys((*IMAGE_SUFFIXES, *SOUND_SUFFIXES, *CLIP_SUFFIXES)))
"""Suffixes of all files that data sets are made of."""


def probe(file: File) -> Mapping[str, Any]:
    """Read a file's header.

    Returns:
        Image: `width` and `height`, in pixels. Audio: `samples` of each channel, `sample_rate` in Hz and
        `channels`. Video: `width`, `height`, `frames`, `frame_rate` and `seconds`, and the keys of its audio.
        Unreadable file: `bad`, the reason.
    """
    found: dict[str, Any] = {}
    reasons: list[str] = []
    for suffixes, look in ((CLIP_SUFFIXES, _of_video), (IMAGE_SUFFIXES, _of_image), (SOUND_SUFFIXES, _of_audio)):
        if file.suffix.lower() in suffixes:
            try:
                found |= look(file)
            except BadSample as error:
                reasons.append(error.args[1])
    return found or {"bad": reasons[0]}


def _of_image(file: File) -> dict[str, Any]:
    with open_image(file) as image:
        return {"width": image.width, "height": image.height}


def _of_audio(file: File) -> dict[str, Any]:
    with AudioFile(file) as sound:
        return {"samples": sound.length, "sample_rate": sound.sample_rate, "channels": sound.channels}


def _of_video(file: File) -> dict[str, Any]:
    with VideoFile(file) as clip:
        size = {"width": clip.width, "height": clip.height}
        return {**size, "frames": clip.length, "frame_rate": clip.frame_rate, "seconds": clip.seconds}
