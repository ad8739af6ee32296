"""Audio datasets: crops of audio files, resampled to one sample rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
from torch import Tensor
from torchaudio.datasets import LIBRISPEECH, LIBRITTS, SPEECHCOMMANDS
from torchaudio.functional import loudness as measured_loudness

from varitok import UserError

from ..batch import Key, Splits, sample_generator
from ..decoding.audio import AudioFile
from ..decoding.resampling import resampled_length
from ..decoding.suffixes import AUDIO
from ..storage.listing import Share, list_splits
from ..storage.members import File, Member
from .base import FileDataset, download_or_raise, takes
from .mixture import Weight, mix

__all__ = ["AudioDataset", "audio_folder", "audio_mix", "librispeech", "libritts", "speech_commands", "splits_of"]

BLOCK = 0.4  # seconds, the gating block over which BS.1770 measures loudness
MOST_MEASURED = 5  # channels that BS.1770 defines


@dataclass(eq=False, repr=False)
class AudioDataset(FileDataset):
    """A dataset of crops of audio files.

    A training crop is normalized in loudness, then its gain and sign are randomized. A shorter file is returned whole;
    a batch pads it and stores its length.

    Args:
        sample_rate: Output sample rate in Hz.
        channels: Number of output channels; 1 averages all. A mono file is copied to each.
        gain: Lower and upper end of the random gain, in dB.
        loudness: Loudness of training crops, in LUFS (ITU-R BS.1770-4); None keeps it. Gains are limited so that
            nothing clips. Silence and crops shorter than 0.4 s aren't normalized.
        files, steps, train, flip, seed: See `FileDataset`.
    """

    sample_rate: int
    _: KW_ONLY
    channels: int = 1
    gain: Annotated[tuple[float, float], "(-inf, inf)"] = (0.0, 0.0)
    loudness: Annotated[float | None, "(-inf, inf)"] = None

    def length(self, file: File) -> int:
        """Return the number of samples of a file, at the output rate; see `FileDataset.length`."""
        facts = file.facts if isinstance(file, Member) else {}
        if "samples" in facts:
            return resampled_length(facts["samples"], facts["sample_rate"], self.sample_rate)
        with AudioFile(file, self.sample_rate, self.channels) as sound:
            return sound.length

    @property
    def unit(self) -> str:
        """What a length counts; see `FileDataset.unit`."""
        return f"samples {self.sample_rate}"

    def crop_range(self, key: Key) -> tuple[int, int]:
        """Return the first sample and the maximum length of the crop of `(epoch, index)` in its file.

        Raises:
            BadSample: The file can't be read.
        """
        return self.draw_crop(self.length(self.files[key[1]]), self.steps, sample_generator(self.seed, key))

    def __getitem__(self, key: Key) -> Tensor:
        """Return the crop of `(epoch, index)`: float32 `(channels, n)` in [-1, 1], n at most `steps`."""
        generator = sample_generator(self.seed, key)
        with AudioFile(self.files[key[1]], self.sample_rate, self.channels) as file:
            sound = torch.from_numpy(file.read(*self.draw_crop(file.length, self.steps, generator)))
        return self._vary(sound, generator) if self.train else sound

    def _vary(self, sound: Tensor, generator: torch.Generator) -> Tensor:
        """Normalize the loudness of a crop `(channels, n)`, then randomize gain and sign."""
        change = 0.0
        if self.loudness is not None and sound.shape[1] >= BLOCK * self.sample_rate:
            # The filters in `measured_loudness` clip at 1, which a quarter of the amplitude doesn't reach.
            found = float(measured_loudness(sound[:MOST_MEASURED] / 4, self.sample_rate)) + 20 * math.log10(4)
            change = self.loudness - found if math.isfinite(found) else 0.0
        low, high = self.gain
        change += low + (high - low) * float(torch.rand((), generator=generator))
        sign = -1.0 if self.flip and torch.rand((), generator=generator) < 0.5 else 1.0
        # Limit the gain so that no sample clips; a crop with a peak of 1 isn't amplified.
        most = 1.0 / max(float(sound.abs().max()), 1e-6)
        return sound * (sign * min(10 ** (change / 20), most))


@takes(AudioDataset, "train")
def splits_of(
    name: str,
    train: Sequence[File],
    val: Sequence[File],
    *,
    sample_rate: Annotated[int, "[4000, inf)"],
    crop_tokens: int | None,
    downsample: int,
    channels: int = 1,
    val_seconds: Annotated[float | None, "(0, inf)", "null takes whole files"] = 10.0,
    gain: Annotated[tuple[float, float], "(-inf, inf)"] = (-6.0, 0.0),
    **form: Any,
) -> Splits:
    """Build both splits from lists of audio files.

    Args:
        name: Name of the dataset, for tables.
        train: Training files.
        val: Validation files.
        sample_rate: Sample rate in Hz, to which all files are resampled.
        crop_tokens: Length of a training crop in tokens; None for whole files. In crops of a fixed duration, a low
            token rate leaves few tokens, and training fails (arXiv 2606.16969).
        downsample: Samples per token (hop length).
        channels: See `AudioDataset`.
        val_seconds: Seconds of each validation file that are used, from its beginning; None for all.
        gain: See `AudioDataset`.
        form: See `AudioDataset`.

    Raises:
        UserError: The gain's range is empty, or `val_seconds` shorter than a sample.
    """
    if val_seconds is not None and not val_seconds * sample_rate >= 1:
        raise UserError(f"data.val_seconds={val_seconds}: must be at least one sample long")
    if gain[0] > gain[1]:
        raise UserError(f"data.gain={list(gain)}: must be a range, the lower end first")
    samples = None if crop_tokens is None else crop_tokens * downsample
    shown = None if val_seconds is None else round(val_seconds * sample_rate)
    part = "whole files" if shown is None else f"the first {val_seconds:g} s of each file"
    mixed = "mono" if channels == 1 else f"{channels} channels"
    return Splits(
        AudioDataset(train, samples, sample_rate, channels=channels, gain=gain, **form),
        AudioDataset(val, shown, sample_rate, channels=channels, train=False),
        about={
            "dataset": f"{name}, validation split",
            "protocol": f"{part}, {mixed}, resampled to {sample_rate} Hz (windowed sinc) if its rate differs;"
            " nothing else",
        },
    )


@takes(splits_of)
def audio_folder(root: str, *, val_share: Share = 0.05, **form: Any) -> Splits:
    """Build both splits of a folder of audio files or shards; see `list_splits` and `splits_of`."""
    train, val = list_splits(root, val_share, AUDIO, "audio file")
    return splits_of(str(root), train, val, **form)


@takes(audio_folder)
def audio_mix(
    roots: Mapping[str, str | None],
    *,
    weights: Mapping[str, Weight] = MappingProxyType({}),
    seed: Annotated[int, "[0, inf)"] = 0,
    **form: Any,
) -> Splits:
    """Build the splits of several folders of audio files, mixed in training by weight; see `mix`.

    `roots` maps names to folders; null leaves one out. For the other arguments see `audio_folder`.
    """
    splits = {name: audio_folder(root, seed=seed, **form) for name, root in roots.items() if root is not None}
    return mix(splits, weights, seed)


@takes(splits_of)
def _libri(
    name: str,
    make: Callable[..., Any],
    root: str,
    *,
    parts: Sequence[str] = ("train-clean-100",),
    val_parts: Sequence[str] = ("dev-clean",),
    download: bool = True,
    **form: Any,
) -> Splits:
    """Build the splits of a corpus of read English, downloaded by torchaudio's class `make`; see `splits_of`.

    Parts have the names of their archives (train-clean-100: 6 GB, 100 h). `name` is the corpus' folder below `root`.

    Raises:
        UserError: The files are not in `root` and can't be downloaded.
    """

    def files(part: str) -> Sequence[File]:
        download_or_raise(partial(make, root, part, download=download), root, f"{part}.tar.gz")
        return list_splits(Path(root) / name / part, 0.0, AUDIO, "audio file").train

    train, val = ([file for part in chosen for file in files(part)] for chosen in (parts, val_parts))
    return splits_of(name, train, val, **form)


@takes(_libri)
def librispeech(root: str, **form: Any) -> Splits:
    """Build the splits of LibriSpeech: read English at 16 kHz; see `_libri`."""
    return _libri("LibriSpeech", LIBRISPEECH, root, **form)


@takes(_libri)
def libritts(root: str, **form: Any) -> Splits:
    """Build the splits of LibriTTS: read English at 24 kHz, segmented into sentences; see `_libri`."""
    return _libri("LibriTTS", LIBRITTS, root, **form)


@takes(splits_of)
def speech_commands(root: str, *, download: bool = True, **form: Any) -> Splits:
    """Build the splits of Speech Commands 0.02: single words of 1 s at 16 kHz, 2.3 GB, downloaded by torchaudio.

    Raises:
        UserError: The files are not in `root` and can't be downloaded.
    """

    def files(subset: str) -> list[Path]:
        load = partial(SPEECHCOMMANDS, root, download=download, subset=subset)
        return [Path(file) for file in download_or_raise(load, root, "speech_commands_v0.02.tar.gz")._walker]

    return splits_of("Speech Commands 0.02", files("training"), files("validation"), **form)
