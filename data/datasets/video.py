"""Video datasets: crops of video files, at one frame rate and size."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeAlias

import torch
from torch import Tensor

from varitok import UserError

from ..batch import Key, Splits, sample_generator
from ..decoding.errors import BadSample
from ..decoding.framing import center_box, covering
from ..decoding.suffixes import IMAGES, VIDEO
from ..decoding.video import VideoFile, frames_in
from ..permutation import Numbers
from ..storage.listing import Share, list_splits
from ..storage.members import File, Member
from ..synthetic.video import clip_frames
from .base import FileDataset, takes
from .crops import closest_shape, random_box
from .file_lengths import measure_files
from .mixture import Weight, mix

__all__ = ["VideoDataset", "clips_and_images", "kinetics", "splits_of", "ucf101", "video_folder"]

PROTOCOL = (
    "the frame shown at each moment, rotation applied, RGB; resized by bicubic interpolation as decoded so that the"
    " crop fits in; centered crop; nothing else"
)
LEAST_SIDE = 8  # pixels; files with a shorter side count as unreadable

Extent: TypeAlias = tuple[int, int, int]
"""Frames, height and width."""
FrameSize: TypeAlias = Annotated[int | tuple[int, int], "[2, inf)"]
"""Side, or height and width, in pixels."""


@dataclass(eq=False, repr=False)
class VideoDataset(FileDataset):
    """A dataset of crops of video files, of one size or of several shapes.

    Training crops are at random times and positions, and mirrored at random; others are the largest centered crops. A
    shorter file is returned whole; a batch pads it and stores its length. An image is a clip of one frame. If there
    are several shapes, each file gets the closest one (`closest_shape`).

    Args:
        height: Height of the output, in pixels.
        width: Width of the output, in pixels.
        frame_rate: Frames per second; None keeps each file's.
        least_scale: Minimum side of a random crop, as a share of the largest crop's, in (0, 1].
        shapes: Frames, height and width of each shape; empty for `steps`, `height` and `width`.
        files, steps, train, flip, seed: See `FileDataset`.
    """

    height: int
    width: int
    _: KW_ONLY
    frame_rate: Annotated[float | None, "(0, inf)", "null takes each file's own"] = None
    least_scale: Annotated[float, "(0, 1]"] = 0.8
    shapes: Sequence[Extent] = ()

    def length(self, file: File) -> int:
        """Return the number of frames of a file, at the output rate; see `FileDataset.length`."""
        return self._extent(file)[0]

    def bucket_ids(self) -> Numbers:
        """Return the index into `shapes` of each file; 0 if it can't be read."""
        return measure_files(self.files, self._shape, f"shape {list(self.shapes)} {self.frame_rate}")

    def _shape(self, file: File) -> int:
        return closest_shape(self.shapes, self._extent(file))

    @property
    def unit(self) -> str:
        """What a length counts; see `FileDataset.unit`."""
        return f"frames {self.frame_rate}"

    def _extent(self, file: File) -> Extent:
        facts = file.facts if isinstance(file, Member) else {}
        if "frames" in facts:
            length = frames_in(facts["seconds"], self.frame_rate) if self.frame_rate else facts["frames"]
            return length, facts["height"], facts["width"]
        with VideoFile(file, self.frame_rate) as video:
            return video.length, video.height, video.width

    def __getitem__(self, key: Key) -> Tensor:
        """Return the crop of `(epoch, index)`: uint8 `(3, n, height, width)`, n at most `steps`."""
        generator = sample_generator(self.seed, key)
        path = self.files[key[1]]
        with VideoFile(path, self.frame_rate) as video:
            if min(video.height, video.width) < LEAST_SIDE:
                raise BadSample(str(path), f"{video.width} x {video.height} pixels are too few")
            steps = self.steps
            crop: Sequence[int] = (self.height, self.width)
            if self.shapes:
                steps, *crop = self.shapes[closest_shape(self.shapes, (video.length, video.height, video.width))]
            start, frames = self.draw_crop(video.length, steps, generator)
            scale = 1.0
            if self.train:
                scale = self.least_scale + (1 - self.least_scale) * float(torch.rand((), generator=generator))
            whole = covering((video.height, video.width), crop, scale)
            pixels = video.read(start, frames, whole)
        (top, height), (left, width) = random_box(whole, crop, generator) if self.train else center_box(whole, crop)
        pixels = pixels[:, top : top + height, left : left + width]
        clip = torch.from_numpy(pixels).permute(3, 0, 1, 2)  # (n, h, w, 3) -> (3, n, h, w)
        if self.train and self.flip and torch.rand((), generator=generator) < 0.5:
            clip = clip.flip(-1)
        return clip.contiguous()


@takes(VideoDataset, "train", "shapes")
def splits_of(
    name: str,
    train: Sequence[File],
    val: Sequence[File],
    *,
    crop_tokens: int = 5,
    downsample: int = 4,
    causal_pad: Annotated[int, "[0, inf)"] = 3,
    val_tokens: int | None = None,
    buckets: Sequence[Extent] | None = None,
    image_size: FrameSize = 64,
    frame_rate: Annotated[float | None, "(0, inf)", "null takes each file's own"] = None,
    **form: Any,
) -> Splits:
    """Build both splits from lists of files.

    Args:
        name: Name of the dataset, for tables.
        train: Training files.
        val: Validation files.
        crop_tokens: Length of a training clip in latent frames.
        downsample: Frames per latent frame (temporal stride).
        causal_pad: Copies of the first frame that the codec prepends: n latent frames are
            n * downsample - causal_pad frames.
        val_tokens: Length of a validation clip in latent frames; None for `crop_tokens`.
        buckets: Shapes of training clips: latent frames, height and width of each; None for the single shape of
            `crop_tokens` and `image_size`. Validation clips always have one shape.
        image_size: Side, or height and width, in pixels.
        frame_rate: See `VideoDataset`.
        form: See `VideoDataset`.

    Raises:
        UserError: A clip has fewer latent frames than its padding fills.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    val_tokens = crop_tokens if val_tokens is None else val_tokens
    lengths = {"crop_tokens": crop_tokens, "val_tokens": val_tokens}
    cropped, shown = (clip_frames(key, tokens, downsample, causal_pad) for key, tokens in lengths.items())
    shapes = [(clip_frames("buckets", tokens, downsample, causal_pad), h, w) for tokens, h, w in buckets or ()]
    rate = f"{frame_rate:g} frames a second" if frame_rate else "each file's frame rate"
    return Splits(
        VideoDataset(train, cropped, height, width, frame_rate=frame_rate, shapes=shapes, **form),
        VideoDataset(val, shown, height, width, frame_rate=frame_rate, train=False, **form),
        about={
            "dataset": f"{name}, validation split",
            "protocol": f"{PROTOCOL}; {width} x {height} pixels, the first {shown} frames at {rate}",
        },
    )


@takes(splits_of)
def video_folder(root: str, *, val_share: Share = 0.05, **form: Any) -> Splits:
    """Build both splits of a folder of video files and images, or of shards; see `list_splits` and `splits_of`.

    `root` may also be a manifest, a JSON Lines file of objects with `path`, relative to the manifest, and optionally
    `split`, "train" or "val".

    Raises:
        UserError: The manifest lists no training clip, or has an invalid line.
    """
    train: Sequence[File]
    val: Sequence[File]
    if Path(root).is_file():
        train, val = _read_manifest(Path(root))
    else:
        kinds = (*VIDEO, *IMAGES)
        train, val = list_splits(root, val_share, kinds, "clip")
    return splits_of(str(root), train, val, **form)


def _read_manifest(path: Path) -> tuple[list[Path], list[Path]]:
    """Read the training and validation files of a manifest; the training files serve as both if it has no others."""
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
    clips: str,
    images: str,
    *,
    weights: Mapping[str, Weight] = MappingProxyType({}),
    seed: Annotated[int, "[0, inf)"] = 0,
    **form: Any,
) -> Splits:
    """Build the splits of a folder of clips and a folder of images, mixed in training by weight; see `mix`.

    Images are clips of one frame. Batches contain both; with `loader.bucket`, few do. For the other arguments see
    `video_folder`.
    """
    parts = {"clips": video_folder(clips, seed=seed, **form), "images": video_folder(images, seed=seed, **form)}
    return mix(parts, weights, seed)


@takes(splits_of)
def ucf101(root: str, *, fold: Annotated[int, "[1, 3]"] = 1, **form: Any) -> Splits:
    """Build the splits of UCF101 (arXiv 1212.0402): 13,320 clips of 101 actions, about 3,700 of them held out.

    Its RAR archive must be unpacked by hand: UCF101.rar to `UCF-101/`, the archive of splits to `ucfTrainTestlist/`.
    `fold` is 1, 2 or 3. For the other arguments see `splits_of`.

    Raises:
        UserError: A file is missing.
    """
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
    """Build the splits of Kinetics (arXiv 1705.06950) with 400, 600 or 700 actions, in torchvision's layout.

    `train/` and `val/` have a folder for each action. For the other arguments see `splits_of`.

    Raises:
        UserError: `train/` or `val/` is missing or empty.
    """
    for split in ("train", "val"):
        if not (Path(root) / split).is_dir():
            raise UserError(f"data.root={root}: {split}/ is not there; place Kinetics' clips in {split}/ACTION/*.mp4")
    train, val = list_splits(root, 0.0, VIDEO, "clip")
    return splits_of("Kinetics", train, val, **form)
