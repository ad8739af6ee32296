"""Datasets of a single clip, to which a codec is fitted: trained on single frames, evaluated on the whole clip."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from torch import Tensor

from varitok import UserError

from ..batch import Key, SignalDataset, Splits
from ..decoding.errors import BadSample
from ..synthetic.video import Scenes
from .video import PROTOCOL, FrameSize, VideoDataset

__all__ = ["Segments", "single_clip", "single_scene"]


@dataclass(eq=False, repr=False)
class Segments(SignalDataset):
    """A dataset of consecutive segments of a clip, of equal length; an incomplete last one is dropped.

    Args:
        clip: uint8 `(3, t, h, w)`.
        frames: Frames per segment.
    """

    clip: Tensor
    frames: int

    def __len__(self) -> int:
        return self.clip.shape[1] // self.frames

    def __getitem__(self, key: Key) -> Tensor:
        """Return the segment of `(epoch, index)`: uint8 `(3, frames, h, w)`."""
        return self.clip[:, key[1] * self.frames :][:, : self.frames]


def single_clip(
    root: str,
    frames: int,
    image_size: FrameSize,
    frame_rate: Annotated[float | None, "(0, inf)", "null keeps the file's own"] = None,
) -> Splits:
    """Build the splits of the beginning of a video file, resized, center-cropped, and kept in memory.

    Args:
        root: The file.
        frames: Number of frames; the file must have at least as many.
        image_size: Side, or height and width, in pixels.
        frame_rate: Frames per second; None keeps the file's.

    Raises:
        UserError: The file can't be read or is too short.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    file = VideoDataset([Path(root)], frames, height, width, frame_rate=frame_rate, train=False)
    try:
        clip = file[0, 0]
    except BadSample as error:
        raise UserError(f"data.root={error}") from error
    if clip.shape[1] < frames:
        raise UserError(f"data.frames={frames}: {root} has {clip.shape[1]}; give data.frames={clip.shape[1]} or fewer")
    return _splits(clip, root, PROTOCOL)


def single_scene(
    frames: int = 32,
    image_size: Annotated[int, "[8, inf)"] = 64,
    frame_rate: Annotated[float, "(0, inf)"] = 8.0,
    seed: Annotated[int, "[0, inf)"] = 0,
) -> Splits:
    """Build the splits of a synthetic clip of moving dead leaves; see `Scenes`."""
    clip = Scenes(image_size, frames=frames, frame_rate=frame_rate, length=1, seed=seed, train=False)[0, 0]
    return _splits(clip, f"scene {seed}, synthetic", "made at this size")


def _splits(clip: Tensor, name: str, protocol: str) -> Splits:
    frames, height, width = clip.shape[1:]
    about = {
        "dataset": f"one clip, {name}, trained on",
        "protocol": f"{frames} frames of {width} x {height}: {protocol}",
    }
    return Splits(Segments(clip, 1), Segments(clip, frames), about)
