"""Feature clips: what a frozen network, the teacher, sees in the frames of another data set's clips.

LanDiff (arXiv 2503.04606, section 3.1) makes tokens of Theia's features (arXiv 2407.20179), 768 of them for every 16 x
16 pixels. The teacher belongs to the data: a codec knows features only.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, get_worker_info

from varitok import UserError, at_least

from .batch import BadSample, Key, Splits, normalise

__all__ = ["FeatureClips", "RandomTeacher", "Teacher", "VisionTransformer", "teacher_features"]

AT_ONCE = 16  # frames that go through a teacher together
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


class Teacher(nn.Module, ABC):
    """A frozen network that turns frames into features.

    Attributes:
        name: What it is called above a table.
        patch: Rows, and columns, of pixels to a position.
    """

    name: str
    patch: int

    @abstractmethod
    def forward(self, frames: Tensor) -> Tensor:
        """Turn frames, uint8 `(n, 3, h, w)`, into features, float32 `(n, c, h / patch, w / patch)`."""


class RandomTeacher(Teacher):
    """Convolutions whose weights are drawn once and for all: a stand-in where no weights are, it knows no meaning.

    Args:
        channels: Features of a position.
        patch: Rows, and columns, of pixels to a position; a power of two.

    Raises:
        UserError: A number is out of range.
    """

    def __init__(self, channels: int = 64, patch: int = 8) -> None:
        super().__init__()
        at_least({"data.teacher.channels": (channels, 1), "data.teacher.patch": (patch, 2)})
        halvings = patch.bit_length() - 1
        if patch != 1 << halvings:
            raise UserError(f"data.teacher.patch={patch}: must be a power of two")
        self.name = f"a stand-in of random weights ({channels} channels, patch {patch})"
        self.patch = patch
        generator = torch.Generator().manual_seed(0)
        widths = [3, *(16 << level for level in range(halvings - 1)), channels]
        self.weights = nn.ParameterList(
            torch.randn(wide, narrow, 4, 4, generator=generator) * (2 / (16 * narrow)) ** 0.5
            for narrow, wide in pairwise(widths)
        ).requires_grad_(False)

    def forward(self, frames: Tensor) -> Tensor:
        """Give the features of frames; see `Teacher.forward`."""
        x = normalise(frames)
        for level, weight in enumerate(self.weights):
            # Zeros beyond the border would be the strongest feature there is.
            x = functional.pad(functional.relu(x) if level else x, (1, 1, 1, 1), mode="replicate")
            x = functional.conv2d(x, weight, stride=2)
        return x


class VisionTransformer(Teacher):
    """A vision transformer of the package `transformers`, read from this machine; nothing is downloaded.

    Its features are the last hidden state's, without class tokens and the like. For Theia, lay its model.safetensors
    beside the config.json of its backbone (facebook/deit-base-patch16-224), and give prefix "backbone.model.".

    Args:
        folder: With config.json and the weights.
        prefix: Before the names of the weights, where the file holds more than the transformer.
        mean: Of the pixels that it was trained on, for each colour, in [0, 1]; ImageNet's by default.
        deviation: Their standard deviation.

    Raises:
        UserError: `transformers` isn't installed, a file isn't there, or they don't fit each other.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(
        self,
        folder: str,
        prefix: str = "",
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        deviation: Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.network: nn.Module = _pretrained(Path(folder), prefix).eval().requires_grad_(False)
        self.name = Path(folder).name
        config = cast(Any, self.network.config)
        self.patch = int(config.patch_size)
        self.register_buffer("mean", torch.tensor(list(mean)).reshape(3, 1, 1))
        self.register_buffer("deviation", torch.tensor(list(deviation)).reshape(3, 1, 1))
        # Some always take frames of any size, others when they are told to.
        known = inspect.signature(self.network.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in known else {}

    def forward(self, frames: Tensor) -> Tensor:
        """Give the features of frames; see `Teacher.forward`."""
        pixels = (frames.float() / 255 - self.mean) / self.deviation
        hidden: Tensor = self.network(pixel_values=pixels, **self.options).last_hidden_state
        rows, columns = frames.shape[2] // self.patch, frames.shape[3] // self.patch
        return hidden[:, -rows * columns :].transpose(1, 2).reshape(len(frames), -1, rows, columns).float()


def _pretrained(folder: Path, prefix: str) -> nn.Module:
    """Read a transformer; all of its weights must be there."""
    if not (folder / "config.json").is_file() or not any((folder / name).is_file() for name in WEIGHTS):
        raise UserError(
            f"data.teacher.folder={folder}: place config.json and model.safetensors of a vision transformer there, such"
            " as facebook/deit-base-patch16-224 or Theia's; nothing is downloaded"
        )
    try:
        from transformers import AutoModel  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError("data.teacher: needs the package transformers; pip install 'varitok[teachers]'") from error
    renamed = {"key_mapping": {f"^{prefix.replace('.', chr(92) + '.')}": ""}} if prefix else {}
    try:
        found, told = AutoModel.from_pretrained(str(folder), local_files_only=True, output_loading_info=True, **renamed)
    except Exception as error:  # OSError, ValueError and what safetensors raises
        first = (str(error).splitlines() or [""])[0]
        raise UserError(f"data.teacher.folder={folder}: transformers can't read it ({first})") from error
    # What isn't in the file would be random, without a word; a pooler isn't used here.
    missing = sorted(name for name in told["missing_keys"] if not name.startswith("pooler"))
    if missing or not hasattr(found.config, "patch_size"):
        reason = f"{len(missing)} weights are missing, {missing[0]} first" if missing else "it has no patch_size"
        raise UserError(
            f"data.teacher.folder={folder}: not a whole vision transformer, {reason}; see data.teacher.prefix"
        )
    return cast(nn.Module, found)


class FeatureClips(Dataset[Tensor]):
    """The standardised features of another data set's clips.

    Args:
        clips: Gives uint8 `(3, t, h, w)` for a `Key`.
        teacher: Makes features of the frames, one by one.
        mean: Of each channel, `(c, 1, 1, 1)`.
        deviation: Standard deviation of each channel, likewise.
        device: Where the teacher runs; a loader's workers have the CPU alone.

    Attributes:
        shapes: Of the clips, where they have several (`data.clips.buckets`).
    """

    def __init__(
        self, clips: Dataset[Tensor], teacher: Teacher, mean: Tensor, deviation: Tensor, device: str = "cpu"
    ) -> None:
        self.clips = clips
        self.teacher = teacher
        self.mean = mean
        self.deviation = deviation
        self.device = device
        self.shapes: list[tuple[int, ...]] = getattr(clips, "shapes", [])

    def __len__(self) -> int:
        """Count the clips."""
        return len(self.clips)  # type: ignore[arg-type]

    def kinds(self) -> list[int]:
        """Tell which of the shapes each clip has."""
        found: list[int] = self.clips.kinds()  # type: ignore[attr-defined]
        return found

    def __getitem__(self, key: Key) -> Tensor:
        """Give the features of the clip of `(epoch, index)`: float32 `(c, t, rows, columns)`, mean 0 and variance 1.

        Raises:
            BadSample: The clip can't be read.
            UserError: The teacher's patch doesn't divide the frames, or a worker was to use a device.
        """
        if self.device != "cpu" and get_worker_info() is not None:
            raise UserError(f"data.device={self.device}: a loader's workers have the CPU alone; give loader.workers=0")
        return (_features(self.teacher, self.clips[key], self.device) - self.mean) / self.deviation


@torch.no_grad()
def _features(teacher: Teacher, clip: Tensor, device: str) -> Tensor:
    """Give the features of a clip, float32 `(c, t, rows, columns)`, on the CPU."""
    if clip.shape[2] % teacher.patch or clip.shape[3] % teacher.patch:
        sides = f"{clip.shape[3]} x {clip.shape[2]} pixels"
        raise UserError(f"data.clips.image_size: {sides} are no multiples of the teacher's patch, {teacher.patch}")
    try:
        teacher.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"data.device={device}: this device is not there; cpu is") from error
    blocks = torch.split(clip.transpose(0, 1), AT_ONCE)
    return torch.cat([teacher(block.to(device)).cpu() for block in blocks]).transpose(0, 1)


def teacher_features(clips: Splits, teacher: Teacher, measured: int = 16, device: str = "cpu") -> Splits:
    """Make the splits of the features of clips, each channel of mean 0 and variance 1.

    Mean and variance are those of the first readable clips of the training split, in its epoch 0: the same in each
    process and at each start, and the same for whatever is evaluated.

    Args:
        clips: Of a data set of clips.
        teacher: Makes the features.
        measured: Clips whose mean and variance are taken.
        device: Where the teacher runs; "cuda" wants `loader.workers=0`.

    Raises:
        UserError: A number is out of range, no clip can be read, or the teacher's patch doesn't divide the frames.
    """
    at_least({"data.measured": (measured, 1)})
    mean, deviation = _statistics(clips.train, teacher, measured, device)
    train, val = (FeatureClips(split, teacher, mean, deviation, device) for split in (clips.train, clips.val))
    how = f"features of each frame by {teacher.name}, {len(mean)} channels; standardised by {measured} training clips"
    protocol = "; ".join([*filter(None, [clips.about.get("protocol")]), how])
    return Splits(train, val, clips.about | {"protocol": protocol})


def _statistics(clips: Dataset[Tensor], teacher: Teacher, measured: int, device: str) -> tuple[Tensor, Tensor]:
    """Measure the mean and the standard deviation of each channel, float32 `(c, 1, 1, 1)`."""
    found: list[tuple[int, Tensor, Tensor]] = []

    def read() -> Any:
        for index in range(len(clips)):  # type: ignore[arg-type]
            with suppress(BadSample):
                yield clips[0, index]

    for clip in islice(read(), measured):
        values = _features(teacher, clip, device).flatten(1).double()
        found.append((values.shape[1], values.sum(1), values.square().sum(1)))
    if not found:
        raise UserError("data.clips: none of the training clips can be read, of which features are to be measured")
    count = sum(number for number, _, _ in found)
    mean, square = (torch.stack([one[part] for one in found]).sum(0) / count for part in (1, 2))  # type: ignore[misc]
    deviation = (square - mean.square()).clamp(min=0).sqrt()
    # A channel that is all but constant stays so: noise in it isn't blown up.
    deviation = deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-12))
    return mean.float()[:, None, None, None], deviation.float()[:, None, None, None]
