"""Sounds to look at and to hear: spectrograms as a PNG, and 16-bit WAV files."""

import wave
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.figure import Figure
from torch import Tensor

from varitok import UserError

from ..losses.spectral import Spectrum
from .audio import written

__all__ = ["decibels", "draw_spectrograms", "write_wav"]

WINDOW = 0.032  # seconds; a power of two samples that is nearest
RANGE = 80.0  # dB shown below a sine of full scale
COLUMNS = 600  # frames of a picture, at most about twice as many


def decibels(sound: Tensor, sample_rate: int) -> npt.NDArray[np.float32]:
    """Give a picture of a sound: dB of each frequency and frame, 0 for a sine of full scale, not below -80.

    Periodic Hann windows of 32 ms or so, a quarter apart, or further where the sound is long; where even then there
    are too many, their power is averaged in groups: there are never more than 1200 frames or so. Channels' power is
    averaged.

    Args:
        sound: `(c, t)` in [-1, 1].
        sample_rate: In Hz.

    Returns:
        float32 `(fft // 2 + 1, frames)`, the lowest frequency first, in [-80, 0].
    """
    fft = 2 ** max(4, round(np.log2(WINDOW * sample_rate)))
    hop = min(fft, max(fft // 4, sound.shape[1] // COLUMNS))
    spectrum, _ = Spectrum(fft, hop)(written(sound).cpu()[None])
    power = spectrum[0].abs().div(fft / 4).square().mean(0)  # the window's sum is fft / 2; half a sine's is one line
    group = max(1, len(power) // COLUMNS)
    power = torch.stack([frames.mean(0) for frames in power.split(group)])
    levels: npt.NDArray[np.float32] = (10 * power.clamp(min=1e-12).log10()).clamp(-RANGE, 0).T.numpy()
    return levels


def draw_spectrograms(path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], sample_rate: int) -> None:
    """Draw a grid to a PNG: a column for each sound, a labelled row for the originals and each shorter code.

    Args:
        path: Where to write.
        rows: Label and sounds `(c, t)` of each row, all with as many sounds; a column's may differ in length.
        sample_rate: In Hz.

    Raises:
        UserError: There is no row or no sound, or rows have different numbers of sounds.
    """
    columns = {len(sounds) for _, sounds in rows}
    if len(columns) != 1 or 0 in columns:
        raise UserError(f"spectrograms: rows of {sorted(columns)} sounds; all must have as many, and at least one")
    (width,) = columns
    figure = Figure(figsize=(1.2 + 3.2 * width, 0.6 + 1.5 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), width, squeeze=False, sharex="col", sharey=True)
    for line, (label, sounds) in zip(panels, rows, strict=True):
        line[0].set_ylabel(f"{label}\nkHz", fontsize=9)
        for axes, sound in zip(line, sounds, strict=True):
            extent = (0, sound.shape[1] / sample_rate, 0, sample_rate / 2000)
            picture = axes.imshow(
                decibels(sound, sample_rate),
                origin="lower", aspect="auto", extent=extent, vmin=-RANGE, vmax=0, cmap="magma",
            )  # fmt: skip
            axes.tick_params(labelsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("s", fontsize=9)
    figure.colorbar(picture, ax=panels, label="dB", shrink=0.6, pad=0.01)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def write_wav(path: Path, sound: Tensor, sample_rate: int) -> None:
    """Write a sound `(c, t)` as a WAV file of 16 bits, clamped to [-1, 1) and rounded to the nearest.

    Raises:
        UserError: A sample isn't finite, or the file can't be written.
    """
    samples = written(sound).mul(32768).to(torch.int16).T.cpu().contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened here: where it can't be, `wave` leaves an object behind that fails once more as it goes.
        with path.open("wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(sound.shape[0])
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(samples.astype("<i2").tobytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
