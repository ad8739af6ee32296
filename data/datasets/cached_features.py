"""What a teacher saw in files, kept in shards (`data/cli/features.py`): read in training in the teacher's place.

Features are cropped like the signals. So a step's features have seen the whole file, not only the crop,
and neither its random gain nor its polarity.
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.ops import roi_align

from varitok import UserError

from ..batch import Key, convert_errors
from ..feature_map import FeatureMap
from ..storage.members import File, Member
from ..storage.shard_reader import open_shards
from ..teachers.audio import AudioTransformer
from ..teachers.base import Layer, Teacher
from ..teachers.vision import VisionTransformer
from .audio import AudioDataset
from .images import ImageFiles

__all__ = ["IMAGE", "SOUND", "CachedTeacher", "FeatureShards", "audio_teacher", "image_teacher", "open_features"]

SOUND, IMAGE = ".npy", ".npz"  # the second has a vector of the whole too


class FeatureShards(ABC):
    """What a teacher saw in the signals of a data set of files.

    Args:
        folder: The shards.
        dataset: The files, or members of shards, under the names with which they were seen.

    Raises:
        UserError: There are no such shards, or they lack a file.
    """

    kind: str

    def __init__(self, folder: str, dataset: Any) -> None:
        self.dataset = dataset
        members = {member.name: member for member in _members(folder)}
        suffixes = {member.suffix for member in members.values()}
        if suffixes != {self.kind}:
            raise UserError(f"{folder}: holds features of {'images' if self.kind == SOUND else 'sounds'}")
        names = _names(dataset.files, {name.removesuffix(self.kind) for name in members})
        missing = next((name for name in names if name + self.kind not in members), None)
        if missing is not None:
            raise UserError(f"{folder}: has no features of {missing}; write them anew by `varitok features`")
        self.members = [members[name + self.kind] for name in names]

    def __getitem__(self, key: Key) -> FeatureMap:
        """Return the features of the crop at `(epoch, index)`, `(1, c, *grid)`.

        Raises:
            BadSample: The file or its features can't be read.
        """
        member = self.members[key[1]]
        with convert_errors(member):
            found = np.load(io.BytesIO(member.read()), allow_pickle=False)
            arrays = dict(found) if self.kind == IMAGE else {"values": found}
            values = torch.from_numpy(arrays["values"]).float()
        cut = self.cut(values, member, key)
        return cut._replace(pooled=torch.from_numpy(arrays["pooled"]).float()[None]) if "pooled" in arrays else cut

    @abstractmethod
    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        """Cut a file's features `(*grid, c)`."""


class _OfAudio(FeatureShards):
    """Those of stretches of sounds; a stretch's ends have whole steps."""

    kind = SOUND
    dataset: AudioDataset

    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        begin, count = self.dataset.stretch(key)
        step = member.facts["step"] * self.dataset.sample_rate / member.facts["sample_rate"]
        first = min(int(begin // step), len(values) - 1)
        found = values[first : max(first + 1, -int(-(begin + count) // step))]
        return FeatureMap(found.T[None], (step,), offset=begin - first * step)


class _OfImages(FeatureShards):
    """Those of squares of images, on as many steps a side as the teacher saw along the shorter side."""

    kind = IMAGE
    dataset: ImageFiles

    def cut(self, values: Tensor, member: Member, key: Key) -> FeatureMap:
        square, (rows, columns) = self.dataset.square(key), values.shape[:2]
        left, top = square.left * columns, square.top * rows
        box = torch.tensor([[0, left, top, left + square.width * columns, top + square.height * rows]])
        side = int(member.facts["side"])
        found = roi_align(values.permute(2, 0, 1)[None], box, (side, side), aligned=True)
        step = self.dataset.image_size / side
        return FeatureMap(found.flip(-1) if square.mirrored else found, (step, step))


def open_features(folder: str, dataset: Dataset[Tensor]) -> FeatureShards:
    """Open what a teacher saw in a data set.

    Raises:
        UserError: There are no such shards, they lack a file, or are not of such data.
    """
    if isinstance(dataset, AudioDataset):
        return _OfAudio(folder, dataset)
    if isinstance(dataset, ImageFiles):
        return _OfImages(folder, dataset)
    raise UserError(
        f"{folder}: features can be read of folders of sounds or images alone; these data are clips, mixed, or drawn:"
        " let the teacher see them (cached=null)"
    )


class CachedTeacher(Teacher):
    """A teacher whose features are read, so that it need not be there.

    Args:
        folder: Shards of its features.

    Raises:
        UserError: There are no such shards.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        facts = _members(folder)[0].facts
        self.name = str(facts["teacher"])
        self.channels = int(facts["channels"])
        self.pooled_channels = int(facts.get("pooled_channels", 0))
        self.folder = folder

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Refuse to look at what isn't in the shards: raises a UserError."""
        raise UserError(
            f"{self.folder}: holds features of the data alone; a reconstruction is for the teacher to see (cached=null)"
        )


def audio_teacher(folder: str, sample_rate: int, layer: Layer = "last", cached: str | None = None) -> Teacher:
    """Make an `AudioTransformer`, or what stands in its place where its features are read.

    `cached` are shards of its features (`varitok features`); None lets it hear each batch.
    """
    return AudioTransformer(folder, sample_rate, layer) if cached is None else CachedTeacher(cached)


def image_teacher(folder: str, cached: str | None = None, **form: Any) -> Teacher:
    """Make a `VisionTransformer`, or what stands in its place where its features are read; see `audio_teacher`."""
    return VisionTransformer(folder, **form) if cached is None else CachedTeacher(cached)


def _members(folder: str) -> Sequence[Member]:
    found = open_shards(folder, lambda name: name.endswith((SOUND, IMAGE)))
    if not found or "teacher" not in found[0].facts:
        raise UserError(f"{folder}: no shards of features in this folder; `varitok features` writes them")
    return found


def _names(files: Sequence[File], known: Iterable[str]) -> list[str]:
    """Name files as they are called below the folder in which they were seen."""
    if not files or isinstance(files[0], Member):
        return [str(getattr(file, "name", file)) for file in files]
    paths, seen = [Path(str(file)) for file in files], set(known)
    parts = paths[0].parts
    depth = next((at for at in range(len(parts)) if "/".join(parts[at:]) in seen), len(parts) - 1)
    root = Path(*parts[:depth])
    return [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths]
