"""Feature clips: features that a frozen network, the teacher, computes from the frames of another dataset's clips.

LanDiff (arXiv 2503.04606, section 3.1) tokenizes Theia's features (arXiv 2407.20179), 768 channels per 16 x 16 pixels.
The teacher is part of the dataset; the codec's input and output are features.
"""

from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from varitok import UserError

from ..batch import Key, SignalDataset, Splits
from ..decoding.errors import BadSample
from ..permutation import Numbers
from ..teachers.base import Teacher

__all__ = ["FeatureClips", "teacher_features"]

AT_ONCE = 16  # frames per batch of the teacher


@dataclass(eq=False, repr=False)
class FeatureClips(SignalDataset):
    """A dataset of standardized features of another dataset's clips.

    Args:
        clips: Dataset of clips, uint8 `(3, t, h, w)`.
        teacher: Network that computes features of single frames.
        mean: Mean of each channel, `(c, 1, 1, 1)`.
        deviation: Standard deviation of each channel, `(c, 1, 1, 1)`.
        device: Device of the teacher; loader workers can only use the CPU.
    """

    clips: SignalDataset
    teacher: Teacher
    mean: Tensor
    deviation: Tensor
    device: str = "cpu"

    def __post_init__(self) -> None:
        self.shapes = self.clips.shapes

    def __len__(self) -> int:
        return len(self.clips)

    def bucket_ids(self) -> Numbers:
        """Return the index into `shapes` of each clip."""
        return self.clips.bucket_ids()

    def __getitem__(self, key: Key) -> Tensor:
        """Return the features of the clip of `(epoch, index)`: float32 `(c, t, rows, columns)`, mean 0 and variance 1.

        Raises:
            BadSample: The clip can't be read.
            UserError: The teacher's patch doesn't divide the frames, or a worker would use a device other than the CPU.
        """
        if self.device != "cpu" and get_worker_info() is not None:
            raise UserError(f"data.device={self.device}: loader workers can only use the CPU; set loader.workers=0")
        return (_features(self.teacher, self.clips[key], self.device) - self.mean) / self.deviation


@torch.no_grad()
def _features(teacher: Teacher, clip: Tensor, device: str) -> Tensor:
    """Compute the features of a clip `(3, t, h, w)`: float32 `(c, t, rows, columns)`, on the CPU."""
    try:
        teacher.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"data.device={device}: this device is not available; use cpu") from error
    blocks = torch.split(clip.transpose(0, 1), AT_ONCE)  # (3, t, h, w) -> (t, 3, h, w)
    return torch.cat([teacher(block.to(device)).values.cpu() for block in blocks]).transpose(0, 1)


def teacher_features(clips: Splits, teacher: Teacher, measured: int = 16, device: str = "cpu") -> Splits:
    """Build the splits of a teacher's features of clips, each channel standardized to mean 0 and variance 1.

    Mean and variance are computed on the first readable clips of the training split, in epoch 0. They are the same in
    each process, after resuming, and in evaluation.

    Args:
        clips: Splits of a dataset of clips.
        teacher: Network that computes the features.
        measured: Number of clips from which mean and variance are computed.
        device: Device of the teacher; "cuda" requires `loader.workers=0`.

    Raises:
        UserError: No clip can be read, or the teacher's patch doesn't divide the frames.
    """
    mean, deviation = _statistics(clips.train, teacher, measured, device)
    train, val = (FeatureClips(split, teacher, mean, deviation, device) for split in (clips.train, clips.val))
    how = f"features of each frame by {teacher.name}, {len(mean)} channels; standardized by {measured} training clips"
    protocol = "; ".join([*filter(None, [clips.about.get("protocol")]), how])
    return Splits(train, val, clips.about | {"protocol": protocol})


def _statistics(clips: SignalDataset, teacher: Teacher, measured: int, device: str) -> tuple[Tensor, Tensor]:
    """Compute the mean and standard deviation of each channel, float32 `(c, 1, 1, 1)`."""
    found: list[tuple[int, Tensor, Tensor]] = []

    def read() -> Any:
        for index in range(len(clips)):
            with suppress(BadSample):
                yield clips[0, index]

    for clip in islice(read(), measured):
        values = _features(teacher, clip, device).flatten(1).double()  # (c, t, rows, columns) -> (c, n)
        found.append((values.shape[1], values.sum(1), values.square().sum(1)))
    if not found:
        raise UserError("data.clips: none of the training clips can be read, so their features can't be standardized")
    count = sum(number for number, _, _ in found)
    mean, square = (torch.stack([one[part] for one in found]).sum(0) / count for part in (1, 2))  # type: ignore[misc]
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    # A floor on the deviation: noise in an almost constant channel isn't amplified.
    deviation = deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-12))
    return mean.float()[:, None, None, None], deviation.float()[:, None, None, None]
