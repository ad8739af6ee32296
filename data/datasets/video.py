"""Clips: from files of any kind to stretches of one frame rate and size."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from varitok import UserError, require_min

from ..batch import BadSample, Key, Splits, sample_generator
from ..decoding.images import SUFFIXES as IMAGE_SUFFIXES
from ..decoding.video import SUFFIXES, VideoFile, frames_in
from ..storage.listing import list_files
from ..storage.members import File, Member
from .base import FileDataset, takes
from .crops import center_box, random_box
from .mixture import mix

__all__ = ["VideoDataset", "clips_and_images", "kinetics", "splits_of", "ucf101", "video_folder"]

PROTOCOL = (
    "the frame shown at each moment, rotation applied, RGB; resized by bicubic interpolation as decoded so that the"
    " crop fits in; centered crop; nothing else"
)
LEAST_SIDE = 8  # pixels; smaller files count as unreadable


@dataclass(eq=False, repr=False)
class VideoDataset(FileDataset):
    """Stretches of files of clips, all of one size.

    While training: a stretch from anywhere in the file, a crop from anywhere in it, mirrored by chance. Otherwise: the
    file's beginning and the largest centered crop. A file that is shorter is given as it is; a batch fills it up and
    knows its length. An image is a clip of one frame. Where there are several shapes each file has the one that is most
    like it (`shape_of`).

    Args:
        files: The files.
        frames: Of a stretch; None for whole files.
        height: Of the crop, in pixels.
        width: Likewise.
        frame_rate: Frames a second; None keeps each file's.
        train: Which of both.
        least_scale: Smallest random crop, as a share of the largest, in (0, 1].
        flip: Mirror every other clip.
        seed: Seed of all chance.
        shapes: Frames, height and width of several; none for one.
    """

    frames: int | None
    height: int
    width: int
    _: KW_ONLY
    frame_rate: float | None = None
    train: bool = True
    least_scale: float = 0.8
    flip: bool = True
    seed: int = 0
    shapes: Sequence[tuple[int, int, int]] = ()

    def size(self, file: File) -> int:
        """Count the frames that a file gives, from its header, or from the index of its shard."""
        length = self._extent(file).length
        return length if self.frames is None else min(length, self.frames)

    def kinds(self) -> list[int]:
        """Tell which of the shapes each file has, as `size`; 0 where it can't be read."""
        return self.of_each(lambda file: shape_of(self.shapes, self._extent(file)))

    def _extent(self, file: File) -> "Extent":
        facts = file.facts if isinstance(file, Member) else {}
        if "frames" in facts:
            length = frames_in(facts["seconds"], self.frame_rate) if self.frame_rate else facts["frames"]
            return Extent(length, facts["height"], facts["width"])
        with VideoFile(file, self.frame_rate) as video:
            return Extent(video.length, video.height, video.width)

    def __getitem__(self, key: Key) -> Tensor:
        """Give the stretch of `(epoch, index)`: uint8 `(3, n, height, width)`, n at most `frames`.

        Raises:
            BadSample: The file can't be read, or is too small.
        """
        generator = sample_generator(self.seed, key)
        path = self.files[key[1]]
        with VideoFile(path, self.frame_rate) as video:
            if min(video.height, video.width) < LEAST_SIDE:
                raise BadSample(str(path), f"{video.width} x {video.height} pixels are too few")
            crop, start, frames = (self.height, self.width), 0, video.length if self.frames is None else self.frames
            if self.shapes:
                frames, *sides = self.shapes[shape_of(self.shapes, video)]
                crop = sides[0], sides[1]
            scale = 1.0
            if self.train:
                ((start, frames),) = random_box((video.length,), (frames,), generator)
                scale = self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))
            # The frame's size at which the crop is as large as it may be, over its share.
            fit = max(crop[0] / video.height, crop[1] / video.width) / scale
            whole = max(crop[0], round(video.height * fit)), max(crop[1], round(video.width * fit))
            clip = video.read(start, frames, whole)
        (top, height), (left, width) = random_box(whole, crop, generator) if self.train else center_box(whole, crop)
        clip = clip[:, :, top : top + height, left : left + width]
        if self.train and self.flip and torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        return clip.contiguous()


class Extent(NamedTuple):
    """How large a clip is: frames, at the rate that is wanted, and pixels."""

    length: int
    height: int
    width: int


def shape_of(shapes: Sequence[tuple[int, int, int]], video: VideoFile | Extent) -> int:
    """Choose the shape most like a file: of its frames' form, and of those the longest that it fills.

    Args:
        shapes: Frames, height and width of each.
        video: The file, or its extent.

    Returns:
        The shape's number.
    """

    def unlike(number: int) -> tuple[float, bool, int, int]:
        frames, height, width = shapes[number]
        form = abs(math.log(height / width * video.width / video.height))
        short = frames > video.length
        return round(form, 2), short, frames if short else -frames, -height * width

    return min(range(len(shapes)), key=unlike)


def splits_of(
    name: str,
    train: Sequence[File],
    val: Sequence[File],
    *,
    crop_tokens: int = 5,
    downsample: int = 4,
    causal_pad: int = 3,
    val_tokens: int | None = None,
    buckets: Sequence[Sequence[int]] | None = None,
    image_size: int | Sequence[int] = 64,
    frame_rate: float | None = None,
    least_scale: float = 0.8,
    flip: bool = True,
    seed: int = 0,
) -> Splits:
    """Make both splits of lists of files.

    Args:
        name: What the data set is called above a table.
        train: Files to train on.
        val: Files to evaluate on.
        crop_tokens: Length of a training clip in latent frames.
        downsample: Frames of a latent frame.
        causal_pad: Copies of the first frame that the codec puts before it: N latent frames are `N * downsample -
            causal_pad` frames.
        val_tokens: Length of a clip to evaluate on; as in training where None.
        buckets: Latent frames, height and width of the shapes that training clips have; None for the one of
            `crop_tokens` and `image_size`. Clips to evaluate on have that one in any case.
        image_size: Side, or height and width, in pixels.
        frame_rate: Frames a second; None keeps each file's.
        least_scale: Smallest random crop, as a share of the largest, in (0, 1].
        flip: Mirror every other training clip.
        seed: Seed of all chance.

    Raises:
        UserError: A number is out of range.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    lengths = [
        tokens * downsample - causal_pad for tokens in (crop_tokens, crop_tokens if val_tokens is None else val_tokens)
    ]
    require_min({"data.downsample": (downsample, 1), "data.causal_pad": (causal_pad, 0)})
    shortest = causal_pad // downsample + 1  # latent frames of which a frame is left
    require_min({"data.image_size": (min(height, width), 2), "data.crop_tokens": (crop_tokens, shortest)})
    require_min({"data.val_tokens": (shortest if val_tokens is None else val_tokens, shortest)})
    if not 0 < least_scale <= 1:
        raise UserError(f"data.least_scale={least_scale}: must lie in (0, 1]")
    if frame_rate is not None and not frame_rate > 0:
        raise UserError(f"data.frame_rate={frame_rate}: must be above 0, or null for each file's own")
    shapes = [_bucket(bucket, downsample, causal_pad) for bucket in buckets or ()]
    form = {"frame_rate": frame_rate, "least_scale": least_scale, "flip": flip, "seed": seed}
    rate = f"{frame_rate:g} frames a second" if frame_rate else "each file's frame rate"
    return Splits(
        VideoDataset(train, lengths[0], height, width, shapes=shapes, **form),  # type: ignore[arg-type]
        VideoDataset(val, lengths[1], height, width, train=False, **form),  # type: ignore[arg-type]
        about={
            "dataset": f"{name}, validation split",
            "protocol": f"{PROTOCOL}; {width} x {height} pixels, the first {lengths[1]} frames at {rate}",
        },
    )


def _bucket(bucket: Sequence[int], downsample: int, causal_pad: int) -> tuple[int, int, int]:
    """Check a bucket; give its frames, height and width."""
    if len(bucket) != 3 or min(bucket) < 1:
        raise UserError(f"data.buckets: {list(bucket)} should be latent frames, height and width, each at least 1")
    return bucket[0] * downsample - causal_pad, bucket[1], bucket[2]


@takes(splits_of)
def video_folder(root: str, *, val_share: float = 0.05, **form: Any) -> Splits:
    """Make both splits of a folder of clips and images, or of a manifest that lists them.

    Args:
        root: The folder, or that of shards; with subfolders `train` and `val` these are the splits, else a share of the
            files is held out. Or a JSON-lines file of objects with `path`, relative to it, and perhaps `split`,
            "train" or "val".
        val_share: Share of the files that is held out.
        form: What is made of the files: see `splits_of`.

    Raises:
        UserError: The folder isn't there, holds no clip, or a number is out of range.
    """
    train: Sequence[File]
    val: Sequence[File]
    if Path(root).is_file():
        train, val = _read_manifest(Path(root))
    else:
        kinds = (*SUFFIXES, *IMAGE_SUFFIXES)
        train, val = (list_files(root, split, val_share, kinds, "clip") for split in ("train", "val"))
    return splits_of(str(root), train, val, **form)


def _read_manifest(path: Path) -> tuple[list[Path], list[Path]]:
    """Read a manifest."""
    splits: dict[str, list[Path]] = {"train": [], "val": []}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            splits[entry.get("split", "train")].append(path.parent / entry["path"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f'data.root={path}: line {number} should be like {{"path": "a.mp4", "split": "train"}} (or "val")'
            ) from error
    if not splits["train"]:
        raise UserError(f"data.root={path}: lists no clip to train on")
    return splits["train"], splits["val"] or splits["train"]


@takes(video_folder)
def clips_and_images(
    clips: str, images: str, *, weights: Mapping[str, float] = MappingProxyType({}), seed: int = 0, **form: Any
) -> Splits:
    """Make the splits of a folder of clips and one of images, each with its share of the training.

    A batch has both: where `loader.bucket` is set, few of them have both.

    Args:
        clips: Folder of clips.
        images: Folder of images, which are clips of one frame.
        weights: Shares of `clips` and `images` in the training samples, over their sum; 1 where not named.
        seed: Seed of all chance.
        form: What is made of the files: see `splits_of`.

    Raises:
        UserError: A folder isn't there or is empty, or a number is out of range.
    """
    parts = {"clips": video_folder(clips, seed=seed, **form), "images": video_folder(images, seed=seed, **form)}
    return mix(parts, weights, seed)


@takes(splits_of)
def ucf101(root: str, *, fold: int = 1, **form: Any) -> Splits:
    """Make UCF101's splits (arXiv 1212.0402): 13,320 clips of 101 actions, of which about 3,700 are held out.

    Its archives can't be unpacked without tools of their own: unpack them yourself.

    Args:
        root: Folder with `UCF-101/` (from UCF101.rar) and `ucfTrainTestlist/` (from the archive of splits).
        fold: Which of the three splits.
        form: What is made of the files: see `splits_of`.

    Raises:
        UserError: A file isn't there, or a number is out of range.
    """
    if fold not in (1, 2, 3):
        raise UserError(f"data.fold={fold}: UCF101 has folds 1, 2 and 3")
    lists = []
    for split in ("train", "test"):
        path = Path(root) / "ucfTrainTestlist" / f"{split}list{fold:02d}.txt"
        if not path.is_file():
            raise UserError(
                f"data.root={root}: {path.relative_to(root)} is not there; unpack UCF101.rar and"
                " UCF101TrainTestSplits-RecognitionTask.zip in that folder"
            )
        names = [line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        lists.append([Path(root) / "UCF-101" / name for name in names])
    if not lists[0] or not lists[0][0].is_file():
        raise UserError(f"data.root={root}: UCF-101/ is not there; unpack UCF101.rar in that folder")
    return splits_of(f"UCF101, fold {fold}", *lists, **form)


@takes(splits_of)
def kinetics(root: str, **form: Any) -> Splits:
    """Make the splits of Kinetics (arXiv 1705.06950), 400, 600 or 700 actions, as torchvision lays it out.

    Args:
        root: Folder with `train/` and `val/`, a folder for each action in each.
        form: What is made of the files: see `splits_of`.

    Raises:
        UserError: A folder isn't there or is empty, or a number is out of range.
    """
    for split in ("train", "val"):
        if not (Path(root) / split).is_dir():
            raise UserError(f"data.root={root}: {split}/ is not there; place Kinetics' clips in {split}/ACTION/*.mp4")
    train, val = (list_files(Path(root), split, 0.0, SUFFIXES, "clip") for split in ("train", "val"))
    return splits_of("Kinetics", train, val, **form)
