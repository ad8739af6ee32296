"""Makes files of clips to read."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def frames(count=20, height=48, width=64):
    """Make frames whose brightness is their number: uint8 `(count, height, width, 3)`."""
    made = np.zeros((count, height, width, 3), np.uint8)
    made[:] = (20 + 10 * np.arange(count) % 220)[:, None, None, None]
    made[:, :, : width // 2, 0] = 200  # the left half is red
    return made


def numbers(clip):
    """Read the numbers of frames, an array `(t, h, w, 3)` or a tensor `(3, t, h, w)`."""
    pixels = clip if isinstance(clip, np.ndarray) else clip.permute(1, 2, 3, 0).numpy()
    blue = pixels[:, :, pixels.shape[2] * 3 // 4 :, 2].mean((1, 2))
    return ((blue - 20) / 10).round().astype(int).tolist()


def write(path: Path, pictures, rate=10, codec="libx264", times=None, options=None, pixels="yuv444p", sound=False):
    """Write frames as a file; `times` are their moments in frames, for a variable rate."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = pictures.shape[2], pictures.shape[1], pixels
        stream.options = {"crf": "1", "preset": "veryfast", **(options or {})} if codec.startswith("lib") else {}
        tone = file.add_stream("aac", rate=16000) if sound else None
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            frame.time_base = Fraction(1, rate)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if tone:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            file.mux(tone.encode(silence))
            file.mux(tone.encode(None))
    return path


def write_sound(path: Path):
    """Write a file that holds sound alone."""
    with av.open(str(path), "w") as file:
        tone = file.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        file.mux(tone.encode(silence))
        file.mux(tone.encode(None))
    return path
