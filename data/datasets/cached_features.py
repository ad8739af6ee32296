"""Precomputed features of a teacher, in shards (`data/cli/features.py`), which training reads instead of running it.

Features are cropped like the signals. So their receptive field extends beyond the crop (audio: windows of 30 s;
images: the whole image), and they don't reflect the crop's random gain or sign.
"""

import io
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from varitok import UserError

from ..batch import Key
from ..decoding.errors import convert_errors
from ..feature_map import FeatureMap
from ..storage.file_index import Files
from ..storage.members import File, Member
from ..storage.shard_reader import open_shards
from ..teachers.audio import AudioTransformer
from ..teachers.base import Layer, Teacher
from ..teachers.vision import VisionTransformer
from .audio import AudioDataset
from .images import ImageFiles

__all__ = ["IMAGE", "SOUND", "CachedTeacher", "FeatureShards", "audio_teacher", "image_teacher", "open_features"]

SOUND, IMAGE = ".npy", ".npz"  # IMAGE files may also contain a pooled vector


class FeatureShards(ABC):
    """Precomputed features of the files of a dataset.

    Args:
        folder: Folder of the feature shards.
        dataset: The dataset; its files must have the names that they had when the features were computed.

    Raises:
        UserError: The folder has no feature shards, or they lack a file.
    """

    kind: str

    def __init__(self, folder: str, dataset: Any) -> None:
        self.dataset = dataset
        self.members = _members(folder)
        if self.members.kinds != [self.kind]:
            raise UserError(f"{folder}: contains features of {'images' if self.kind == SOUND else 'audio'}")
        self.rows = array("q")
        at = -1
        for name in _names(dataset.files, lambda name: self.members.find(name + self.kind) >= 0):
            at = self.members.find(name + self.kind, at + 1)  # both are sorted
            if at < 0:
                raise UserError(f"{folder}: has no features of {name}; run `varitok features` again")
            self.rows.append(at)

    def __getitem__(self, key: Key) -> FeatureMap:
        """Return the features of the crop of `(epoch, index)`, `(1, c, *grid)`.

        Raises:
            BadSample: The file or its features can't be read.
        """
        member = self.members[self.rows[key[1]]]
        with convert_errors(member):
            found = np.load(io.BytesIO(member.read()), allow_pickle=False)
            arrays = dict(found) if self.kind == IMAGE else {"values": found}
            values = torch.from_numpy(arrays["values"]).float()
        cut = self.cut(values, member, key)
        return cut._replace(pooled=torch.from_numpy(arrays["pooled"]).float()[None]) if "pooled" in arrays else cut

    @abstractmethod
    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        """Crop a file's features `(*grid, c)` like the signal of `key`."""


class _OfAudio(FeatureShards):
    """Features of audio crops; the ends of a crop are rounded outwards to whole steps."""

    kind = SOUND
    dataset: AudioDataset

    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        begin, count = self.dataset.crop_range(key)
        step = member.facts["step"] * self.dataset.sample_rate / member.facts["sample_rate"]
        first = min(int(begin // step), len(values) - 1)
        found = values[first : max(first + 1, -int(-(begin + count) // step))]
        return FeatureMap(found.T[None], (step,), offset=begin - first * step)  # (n, c) -> (1, c, n)


class _OfImages(FeatureShards):
    """Features of image crops, resampled to as many steps per side as the shorter side of the whole image has."""

    kind = IMAGE
    dataset: ImageFiles

    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        crop, (rows, columns) = self.dataset.crop(key), values.shape[:2]
        left, top = crop.left * columns, crop.top * rows
        box = torch.tensor([[0, left, top, left + crop.width * columns, top + crop.height * rows]])
        side = int(member.facts["side"])
        found = roi_align(values.permute(2, 0, 1)[None], box, (side, side), aligned=True)  # (1, c, side, side)
        height, width = self.dataset.crop_size(key[1])
        return FeatureMap(found.flip(-1) if crop.mirrored else found, (height / side, width / side))


def open_features(folder: str, dataset: Dataset[Tensor]) -> FeatureShards:
    """Open the precomputed features of a dataset.

    Raises:
        UserError: The folder has no feature shards, they lack a file, or are of another modality than the dataset.
    """
    if isinstance(dataset, AudioDataset):
        return _OfAudio(folder, dataset)
    if isinstance(dataset, ImageFiles):
        return _OfImages(folder, dataset)
    raise UserError(
        f"{folder}: cached features need a folder of audio files or images; this dataset is of clips, mixed, or"
        " synthetic: run the teacher in training (cached=null)"
    )


class CachedTeacher(Teacher):
    """A stand-in for a teacher whose features are precomputed; its weights aren't needed.

    Args:
        folder: Folder of the feature shards.

    Raises:
        UserError: The folder has no feature shards.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        facts = _members(folder)[0].facts
        self.name = str(facts["teacher"])
        self.channels = int(facts["channels"])
        self.pooled_channels = int(facts.get("pooled_channels", 0))
        self.folder = folder

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Raise a `UserError`: features of other signals can't be computed without the teacher."""
        raise UserError(
            f"{self.folder}: contains features of the dataset only; a reconstruction needs the teacher (cached=null)"
        )


def audio_teacher(folder: str, sample_rate: int, layer: Layer = "last", cached: str | None = None) -> Teacher:
    """Build an `AudioTransformer`, or a `CachedTeacher` if its features are precomputed.

    `cached` is the folder of its feature shards (`varitok features`); None runs the network on each batch.
    """
    return AudioTransformer(folder, sample_rate, layer) if cached is None else CachedTeacher(cached)


def image_teacher(folder: str, cached: str | None = None, **form: Any) -> Teacher:
    """Build a `VisionTransformer`, or a `CachedTeacher` if its features are precomputed; see `audio_teacher`."""
    return VisionTransformer(folder, **form) if cached is None else CachedTeacher(cached)


def _members(folder: str) -> Files[Member]:
    found, _ = open_shards(folder).of_kinds((SOUND, IMAGE))
    if not found or "teacher" not in found[0].facts:
        raise UserError(f"{folder}: no feature shards in this folder; `varitok features` writes them")
    return found


def _names(files: Sequence[File], is_known: Callable[[str], bool]) -> Iterator[str]:
    """Yield the names of files relative to the folder for which features were computed."""
    if isinstance(files, Files):
        yield from files.sources()
        return
    root: Path | None = None
    for file in files:
        if isinstance(file, Member):
            yield file.source
            continue
        if root is None:
            parts = file.parts
            depth = next((at for at in range(len(parts)) if is_known("/".join(parts[at:]))), len(parts) - 1)
            root = Path(*parts[:depth])
        yield file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)
