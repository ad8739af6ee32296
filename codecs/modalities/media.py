"""Write signals as pictures, audio files and MP4 files."""

import io
import wave
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import numpy.typing as npt
import soundfile
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from varitok import UserError

from ..metrics.audio import round_to_16_bits
from ..networks.layers.stft import Spectrum

__all__ = [
    "decibels",
    "draw_clips",
    "draw_images",
    "draw_spectrograms",
    "lossless_audio",
    "mp4",
    "principal_colors",
    "spectrogram",
    "webp",
    "write_mp4",
    "write_wav",
]

LEGEND = 72  # width of the labels left of images, in pixels
STRIP = 5  # frames drawn per clip
WINDOW = 0.032  # seconds, rounded to a power of two of samples
RANGE = 80.0  # dB shown below a full-scale sine
COLUMNS = 600  # target number of spectrogram frames; at most about twice as many
UNSEEKABLE = 3 * 4096  # samples; Chromium (156) can't seek in a FLAC file of up to three blocks


def draw_images(rows: Sequence[tuple[str, Sequence[Tensor]]], scale: int = 1) -> Image.Image:
    """Draw a grid of images with a label left of each row.

    Args:
        rows: Label of each row and its images, uint8 `(3, h, w)`, all of one size.
        scale: Factor by which pixels are enlarged.
    """
    grid = torch.stack([torch.stack(list(images)) for _, images in rows])
    lines, b, _, h, w = grid.shape
    # (lines, b, 3, h, w) -> (lines * h, b * w, 3)
    pixels = Image.fromarray(
        np.ascontiguousarray(grid.permute(0, 3, 1, 4, 2).reshape(lines * h, b * w, 3).numpy())
    ).resize((b * w * scale, lines * h * scale), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (LEGEND + pixels.width, pixels.height), "white")
    sheet.paste(pixels, (LEGEND, 0))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for line, (label, _) in enumerate(rows):
        pen.text((LEGEND - 6, (line + 0.5) * h * scale), label, fill="black", font=font, anchor="rm")
    return sheet


def draw_clips(rows: Sequence[tuple[str, Sequence[Tensor]]], scale: int = 1) -> Image.Image:
    """Draw evenly spaced frames of each clip in a grid, as `draw_images` does.

    Args:
        rows: Label of each row and its clips, uint8 `(3, t, h, w)`, all of one frame size.
        scale: Factor by which pixels are enlarged.
    """

    def strip(clip: Tensor) -> Tensor:
        chosen = torch.linspace(0, clip.shape[1] - 1, STRIP).round().long()
        return clip[:, chosen].transpose(1, 2).flatten(2)  # (3, STRIP, h, w) -> (3, h, STRIP * w)

    return draw_images([(label, [strip(clip) for clip in clips]) for label, clips in rows], scale)


def principal_colors(rows: Sequence[tuple[str, Sequence[Tensor]]]) -> list[tuple[str, list[Tensor]]]:
    """Project features onto their first three principal components and map these to RGB.

    The components are those of the first row's features. The range of a color is two standard deviations of the first
    row to each side of the mean.

    Args:
        rows: Label of each row and its feature clips, floats `(c, t, h, w)`.

    Returns:
        The same rows with clips uint8 `(3, t, h, w)`; with fewer than three channels, the other colors are constant.
    """
    known = torch.cat([clip.flatten(1) for clip in rows[0][1]], dim=1).double()  # (c, n)
    mean = known.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((known - mean) @ (known - mean).T / known.shape[1])
    axes, spread = vectors.flip(1)[:, :3], values.flip(0)[:3].clamp(min=1e-12).sqrt()
    # Fix the sign of each eigenvector, which depends on the solver.
    axes = axes * axes.sum(0).sign()

    def colors(clip: Tensor) -> Tensor:
        parts = axes.T @ (clip.flatten(1).double() - mean) / spread[:, None]
        levels = (parts / 4 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
        grey = levels.new_full((3 - len(levels), levels.shape[1]), 128)
        return torch.cat([levels, grey]).reshape(3, *clip.shape[1:])

    return [(label, [colors(clip) for clip in clips]) for label, clips in rows]


def decibels(sound: Tensor, sample_rate: int) -> npt.NDArray[np.float32]:
    """Compute a power spectrogram in dB, relative to a full-scale sine and clamped to at least -80.

    The window is a periodic Hann window of about 32 ms. The hop length is a quarter of it, more for long audio; if
    there are still too many frames, the power is averaged over groups, to at most about 1200. Channels' power is
    averaged.

    Args:
        sound: Waveform `(c, t)` in [-1, 1].
        sample_rate: Sample rate, in Hz.

    Returns:
        float32 `(fft // 2 + 1, frames)` in [-80, 0], the lowest frequency first.
    """
    fft = 2 ** max(4, round(np.log2(WINDOW * sample_rate)))
    hop = min(fft, max(fft // 4, sound.shape[1] // COLUMNS))
    spectrum, _ = Spectrum(fft, hop)(round_to_16_bits(sound).cpu()[None])
    power = spectrum[0].abs().div(fft / 4).square().mean(0)  # a full-scale sine's peak is fft / 4
    group = max(1, len(power) // COLUMNS)
    power = torch.stack([frames.mean(0) for frames in power.split(group)])
    levels: npt.NDArray[np.float32] = (10 * power.clamp(min=1e-12).log10()).clamp(-RANGE, 0).T.numpy()
    return levels


def draw_spectrograms(path: Path, rows: Sequence[tuple[str, Sequence[Tensor]]], sample_rate: int) -> None:
    """Draw a grid of spectrograms to a PNG, with a label left of each row.

    Args:
        path: Path of the PNG.
        rows: Label of each row and its waveforms `(c, t)`, of any lengths, the same number in each row.
        sample_rate: Sample rate, in Hz.

    Raises:
        UserError: There is no waveform, or rows have different numbers of them.
    """
    columns = {len(sounds) for _, sounds in rows}
    if len(columns) != 1 or 0 in columns:
        raise UserError(f"spectrograms: rows of {sorted(columns)} sounds; all must have the same number, at least one")
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


def write_mp4(path: Path, clip: Tensor, frame_rate: float) -> None:
    """Write a clip, uint8 `(3, t, h, w)`, as near-lossless H.264; odd sides are cropped by a pixel.

    Raises:
        UserError: A side has fewer than two pixels, or the file can't be written.
    """
    import av  # noqa: PLC0415 (an extra)

    height, width = (side // 2 * 2 for side in clip.shape[2:])  # 4:2:0 has one chroma sample per 2 x 2 pixels
    if not height or not width:
        raise UserError(f"{path}: frames of {clip.shape[3]} x {clip.shape[2]} pixels can't be written as MP4")
    frames = clip[:, :, :height, :width].permute(1, 2, 3, 0).cpu().contiguous().numpy()  # (3, t, h, w) -> (t, h, w, 3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as file:
            stream = file.add_stream("libx264", rate=Fraction(frame_rate).limit_denominator(1000))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.options = {"crf": "12", "preset": "fast"}
            for frame in frames:
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            file.mux(stream.encode(None))
    except OSError as error:  # PyAV's file errors are subclasses
        raise UserError(f"{path}: {error.strerror}") from error


def write_wav(path: Path, sound: Tensor, sample_rate: int) -> None:
    """Write a waveform `(c, t)` as a 16-bit WAV file, clamped to [-1, 1) and rounded to the nearest.

    Raises:
        UserError: A sample isn't finite, or the file can't be written.
    """
    samples = round_to_16_bits(sound).mul(32768).to(torch.int16).T.cpu().contiguous().numpy()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened here: if `wave` itself fails to open a file, its destructor raises another error.
        with path.open("wb") as raw, wave.open(raw, "wb") as file:
            file.setnchannels(sound.shape[0])
            file.setsampwidth(2)
            file.setframerate(sample_rate)
            file.writeframes(samples.astype("<i2").tobytes())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error


def webp(image: Image.Image, *, lossless: bool) -> bytes:
    """Encode an image as WebP."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=80)
    return file.getvalue()


def spectrogram(sound: Tensor, sample_rate: int) -> bytes:
    """Draw the spectrogram of a waveform `(c, t)` as lossy WebP, the lowest frequency at the bottom."""
    levels = decibels(sound, sample_rate)[::-1]
    colors = matplotlib.colormaps["magma"](levels / RANGE + 1, bytes=True)[..., :3]
    return webp(Image.fromarray(colors.copy()), lossless=False)


def lossless_audio(sound: Tensor, sample_rate: int) -> tuple[bytes, str]:
    """Encode a waveform `(c, t)` as FLAC, or WAV if short; return the file and its MIME type.

    A lossy format would add its own artifacts to the codec's.
    """
    kind = "FLAC" if sound.shape[1] > UNSEEKABLE else "WAV"
    file = io.BytesIO()
    soundfile.write(file, sound.T.numpy(), sample_rate, format=kind, subtype="PCM_16")
    return file.getvalue(), f"audio/{kind.lower()}"


def mp4(clip: Tensor, frame_rate: float) -> bytes:
    """Encode a clip, uint8 `(3, t, h, w)`, as `write_mp4` does."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_mp4(path, clip, frame_rate)
        return path.read_bytes()
