"""Read metadata from file headers; the index of a shard stores them, so that they are read once."""

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
"""Suffixes of all supported files: images, audio, video."""


def probe(file: File) -> Mapping[str, Any]:
    """Read the metadata of a file from its header.

    Returns:
        Image: `width` and `height`, in pixels. Audio: `samples` per channel, `sample_rate` in Hz, `channels`.
        Video: `width`, `height`, `frames`, `frame_rate` (frames per second), `seconds`, and the keys of its audio.
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
