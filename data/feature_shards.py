"""What a teacher saw in sounds, kept in shards: seen once, and read in training in its place.

`varitok features SOUNDS --teacher WEIGHTS --rate HZ --out SHARDS` writes the features of each whole file, float16, as
`NAME.npy` with the time of a step in the index. Training cuts them as it cuts the sounds. So a step's features know the
whole file, not only the stretch, and nothing of a stretch's gain and sign.
"""

import argparse
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError, watched

from .batch import BadSample, Key
from .featuremaps import Features
from .folders import list_files
from .members import File, Member
from .shards import ShardWriter, open_shards
from .sound_teachers import SoundTransformer
from .sounds import SUFFIXES, SoundDataset
from .teachers import Layer, Teacher

__all__ = ["FeatureShards", "SeenTeacher", "main", "sound_teacher", "write_features"]

WINDOW = 30  # seconds that a teacher sees at once


class FeatureShards:
    """What a teacher saw in the stretches of a data set of sounds.

    Args:
        folder: The shards.
        dataset: The sounds, files or members of shards under the names with which they were seen.

    Raises:
        UserError: There are no such shards, they lack a file, or the data are of another kind.
    """

    def __init__(self, folder: str, dataset: Dataset[Tensor]) -> None:
        if not isinstance(dataset, SoundDataset):
            raise UserError(
                f"{folder}: features can be read of data sets of sound files alone; these data are mixed, drawn, or cut"
                " at random sizes: let the teacher see them (cached=null)"
            )
        self.dataset = dataset
        members = {member.name: member for member in _members(folder)}
        names = _names(dataset.files, members.keys())
        missing = next((name for name in names if f"{name}.npy" not in members), None)
        if missing is not None:
            raise UserError(f"{folder}: has no features of {missing}; write them anew by `varitok features`")
        self.members = [members[f"{name}.npy"] for name in names]

    def __getitem__(self, key: Key) -> Features:
        """Give the features of the stretch of `(epoch, index)`, `(1, c, n)`, those of its ends in whole steps.

        Raises:
            BadSample: The sound or its features can't be read.
        """
        begin, count = self.dataset.stretch(key)
        member = self.members[key[1]]
        step = member.facts["step"] * self.dataset.sample_rate / member.facts["sample_rate"]
        try:
            values = np.load(io.BytesIO(member.read()), allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadSample(str(member), " ".join(str(error).split())) from error
        first = min(int(begin // step), len(values) - 1)
        cut = values[first : max(first + 1, -int(-(begin + count) // step))]
        return Features(torch.from_numpy(cut).float().T[None], (step,), lead=begin - first * step)


class SeenTeacher(Teacher):
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
        self.folder = folder

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> Features:
        """Refuse to look at what isn't in the shards.

        Raises:
            UserError: Always.
        """
        raise UserError(
            f"{self.folder}: holds features of the data alone; a reconstruction is for the teacher to see (cached=null)"
        )


def sound_teacher(folder: str, sample_rate: int, layer: Layer = "last", cached: str | None = None) -> Teacher:
    """Make a teacher of sounds, or what stands in its place where its features are read.

    Args:
        folder: See `SoundTransformer`.
        sample_rate: Of the sounds, Hz.
        layer: Whose hidden states.
        cached: Shards of its features (`varitok features`); None lets it see each batch.
    """
    return SoundTransformer(folder, sample_rate, layer) if cached is None else SeenTeacher(cached)


@torch.no_grad()
def write_features(
    files: Sequence[File], names: Iterable[str], teacher: SoundTransformer, out: Path, device: str = "cpu"
) -> dict[str, Any]:
    """Write a teacher's features of whole sounds as shards.

    Args:
        files: The sounds.
        names: Of each, below its folder.
        teacher: Sees them in windows of 30 s.
        out: A new folder.
        device: Where the teacher runs.

    Returns:
        Counts of what was written, and what could not be read.
    """
    sounds = SoundDataset(files, teacher.sample_rate, None, train=False)
    teacher.to(device)
    bad: list[str] = []
    with ShardWriter(out) as shards:
        for index, name in watched(zip(range(len(files)), names, strict=True), len(files), "files"):
            try:
                sound = sounds[0, index]
            except BadSample as error:
                bad.append(str(error))
                continue
            windows = torch.split(sound[None].to(device), WINDOW * teacher.sample_rate, dim=2)
            seen = [teacher(window) for window in windows]
            values = torch.cat([one.values[0].T for one in seen]).cpu().half().numpy()
            content = io.BytesIO()
            np.save(content, values, allow_pickle=False)
            facts = {"step": seen[0].steps[0], "sample_rate": teacher.sample_rate, "channels": values.shape[1]}
            shards.write(f"{name}.npy", content.getvalue(), facts | {"teacher": teacher.name, "layer": teacher.layer})
    return {"out": str(out), "files": shards.members, "bytes": shards.bytes, "bad": bad}


def _members(folder: str) -> Sequence[Member]:
    found = open_shards(folder, lambda name: name.endswith(".npy"))
    if not found or "step" not in found[0].facts:
        raise UserError(f"{folder}: no shards of features in this folder; `varitok features` writes them")
    return found


def _names(files: Sequence[File], known: Iterable[str]) -> list[str]:
    """Name files as they are called below the folder in which they were seen."""
    if not files or isinstance(files[0], Member):
        return [str(getattr(file, "name", file)) for file in files]
    paths, seen = [Path(str(file)) for file in files], set(known)
    parts = paths[0].parts
    depth = next((at for at in range(len(parts)) if f"{'/'.join(parts[at:])}.npy" in seen), len(parts) - 1)
    root = Path(*parts[:depth])
    return [path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path) for path in paths]


def main(words: Sequence[str]) -> None:
    """Write features as the command line says (`varitok features --help`)."""
    parser = argparse.ArgumentParser("varitok features", description="Write what a teacher sees in sounds as shards.")
    parser.add_argument("sounds", help="folder of sounds, or of their shards, as data.root")
    parser.add_argument("--teacher", required=True, help="folder of its weights and two .json")
    parser.add_argument("--rate", type=int, required=True, help="sample rate of the codec, Hz")
    parser.add_argument("--layer", default="last", help="last, mean, or a number (default: last)")
    parser.add_argument("--device", default="cpu", help="where the teacher runs (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the shards")
    options = parser.parse_args(words)
    layer = int(options.layer) if options.layer.isdigit() else options.layer
    teacher = SoundTransformer(options.teacher, options.rate, layer)
    folder = Path(options.sounds)
    folder = folder / "train" if (folder / "train").is_dir() and (folder / "val").is_dir() else folder
    found = {str(file): file for part in ("train", "val") for file in list_files(folder, part, 0.05, SUFFIXES, "sound")}
    files = [found[name] for name in sorted(found)]
    names = [file.name if isinstance(file, Member) else file.relative_to(folder).as_posix() for file in files]
    print(json.dumps(write_features(files, names, teacher, options.out, options.device)))
