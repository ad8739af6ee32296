"""Feature clips: what a frozen network, the teacher, sees in the frames of another data set's clips.

LanDiff (arXiv 2503.04606, section 3.1) makes tokens of Theia's features (arXiv 2407.20179), 768 of them for every 16 x
16 pixels. The teacher belongs to the data: a codec knows features only.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from varitok import UserError, require_min

from ..batch import BadSample, Key, SignalDataset, Splits
from ..teachers.base import Teacher

__all__ = ["FeatureClips", "teacher_features"]

AT_ONCE = 16  # frames that go through a teacher together


@dataclass(eq=False, repr=False)
class FeatureClips(SignalDataset):
    """The standardized features of another data set's clips.

    Args:
        clips: Gives uint8 `(3, t, h, w)` for a `Key`.
        teacher: Makes features of the frames, one by one.
        mean: Mean of each channel, `(c, 1, 1, 1)`.
        deviation: Standard deviation of each channel, `(c, 1, 1, 1)`.
        device: Where the teacher runs; a loader's workers have the CPU alone.
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

    def kinds(self) -> Sequence[int]:
        """Return the number of each clip's shape."""
        return self.clips.kinds()

    def __getitem__(self, key: Key) -> Tensor:
        """Return the features of the clip of `(epoch, index)`: float32 `(c, t, rows, columns)`, mean 0 and variance 1.

        Raises:
            BadSample: The clip can't be read.
            UserError: The teacher's patch doesn't divide the frames, or a worker was to use a device.
        """
        if self.device != "cpu" and get_worker_info() is not None:
            raise UserError(f"data.device={self.device}: a loader's workers have the CPU alone; give loader.workers=0")
        return (_features(self.teacher, self.clips[key], self.device) - self.mean) / self.deviation


@torch.no_grad()
def _features(teacher: Teacher, clip: Tensor, device: str) -> Tensor:
    """Compute the features of a clip, float32 `(c, t, rows, columns)`, on the CPU."""
    try:
        teacher.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"data.device={device}: this device is not there; cpu is") from error
    blocks = torch.split(clip.transpose(0, 1), AT_ONCE)
    return torch.cat([teacher(block.to(device)).values.cpu() for block in blocks]).transpose(0, 1)


def teacher_features(clips: Splits, teacher: Teacher, measured: int = 16, device: str = "cpu") -> Splits:
    """Make the splits of the features of clips, each channel of mean 0 and variance 1.

    Mean and variance are those of the first readable clips of the training split, in its epoch 0: the same in each
    process and at each start, and the same for whatever is evaluated.

    Args:
        clips: Splits of a dataset of clips.
        teacher: Makes the features.
        measured: Clips whose mean and variance are taken.
        device: Where the teacher runs; "cuda" wants `loader.workers=0`.

    Raises:
        UserError: A number is out of range, no clip can be read, or the teacher's patch doesn't divide the frames.
    """
    require_min({"data.measured": (measured, 1)})
    mean, deviation = _statistics(clips.train, teacher, measured, device)
    train, val = (FeatureClips(split, teacher, mean, deviation, device) for split in (clips.train, clips.val))
    how = f"features of each frame by {teacher.name}, {len(mean)} channels; standardized by {measured} training clips"
    protocol = "; ".join([*filter(None, [clips.about.get("protocol")]), how])
    return Splits(train, val, clips.about | {"protocol": protocol})


def _statistics(clips: SignalDataset, teacher: Teacher, measured: int, device: str) -> tuple[Tensor, Tensor]:
    """Measure the mean and the standard deviation of each channel, float32 `(c, 1, 1, 1)`."""
    found: list[tuple[int, Tensor, Tensor]] = []

    def read() -> Any:
        for index in range(len(clips)):
            with suppress(BadSample):
                yield clips[0, index]

    for clip in islice(read(), measured):
        values = _features(teacher, clip, device).flatten(1).double()
        found.append((values.shape[1], values.sum(1), values.square().sum(1)))
    if not found:
        raise UserError("data.clips: none of the training clips can be read, so their features can't be measured")
    count = sum(number for number, _, _ in found)
    mean, square = (torch.stack([one[part] for one in found]).sum(0) / count for part in (1, 2))  # type: ignore[misc]
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    # A channel that is all but constant stays so: noise in it isn't blown up.
    deviation = deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-12))
    return mean.float()[:, None, None, None], deviation.float()[:, None, None, None]
