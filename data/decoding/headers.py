"""Read metadata from file headers; the index of a shard stores them, so that they are read once."""

from collections.abc import Mapping
from typing import Any

from ..storage.members import Source
from .audio import AudioFile
from .errors import BadSample
from .images import decoded_size
from .suffixes import AUDIO, IMAGES, VIDEO
from .video import VideoFile

__all__ = ["probe"]


def probe(file: Source) -> Mapping[str, Any]:
    """Read the metadata of a file from its header.

    Returns:
        Image: `width` and `height` when upright, in pixels. Audio: `samples` per channel, `sample_rate` in Hz,
        `channels`.
        Video: `width`, `height`, `frames`, `frame_rate` (frames per second), `seconds`, and the keys of its audio.
        Unreadable file: `bad`, the reason.
    """
    found: dict[str, Any] = {}
    reasons: list[str] = []
    for suffixes, look in ((VIDEO, _of_video), (IMAGES, _of_image), (AUDIO, _of_audio)):
        if file.suffix.lower() in suffixes:
            try:
                found |= look(file)
            except BadSample as error:
                reasons.append(error.args[1])
    return found or {"bad": reasons[0]}


def _of_image(file: Source) -> dict[str, Any]:
    height, width = decoded_size(file)
    return {"width": width, "height": height}


def _of_audio(file: Source) -> dict[str, Any]:
    with AudioFile(file) as sound:
        return {"samples": sound.length, "sample_rate": sound.sample_rate, "channels": sound.channels}


def _of_video(file: Source) -> dict[str, Any]:
    with VideoFile(file) as clip:
        size = {"width": clip.width, "height": clip.height}
        return {**size, "frames": clip.length, "frame_rate": clip.frame_rate, "seconds": clip.seconds}
