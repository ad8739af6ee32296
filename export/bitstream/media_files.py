"""Media files to containers and back: images, audio and video."""

import io
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.audio import SoundBundle
from ..runtime.bundle import Array, Bundle
from ..runtime.images import ImageBundle
from ..runtime.load import VideoBundle
from . import container
from .container import STREAM
from .rate_control import Encoded, Target, encoded, fitted

__all__ = ["decode_file", "encode_file"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
MOST_FRAMES = 1 << 30  # bytes of a clip's frames
WRITTEN = {"image": ("png", "jpg", "webp"), "audio": ("wav", "flac"), "video": ("mp4", "mkv")}
"""What is written of each modality, by suffix; the first where nothing else is asked for."""


def encode_file(
    bundle: Bundle,
    path: Path,
    out: Path,
    *,
    tokens: int | None = None,
    books: int | None = None,
    target: Target = Target(),  # noqa: B008 (it can't be changed)
    coding: str | None = None,
) -> dict[str, Any]:
    """Encode a file into a container; give how large it became.

    Args:
        bundle: Encodes.
        path: A picture, a sound or a clip, as the bundle takes them; `STREAM` for standard input.
        out: The container; `STREAM` for standard output.
        tokens: Keep only so many, where tokens are ordered; all where None.
        books: Keep only so many; all where None.
        target: Of those, keep what a size or a quality wants.
        coding: How codes are written, one of `CODINGS`; None: by the bundle's prior, without one the smaller of what
            can do without.

    Raises:
        UserError: The file can't be read, or isn't the bundle's; a number is out of range, a target can't be met.
    """
    whole = _encoded(bundle, path, tokens, books)._replace(coding=coding)
    shape = whole.original.shape

    def decoded(part: Encoded) -> npt.NDArray[np.float32]:
        back = bundle.decode(part.codes)
        return back[tuple(slice(side) for side in shape)]

    try:
        chosen = fitted(bundle, whole, target, decoded)
        written = chosen.written(bundle)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _put(out, written.data)
    kept = {"tokens": chosen.codes.shape[-1]} if bundle.tokens else {"books": chosen.codes.shape[1]}
    return kept | {"bytes": len(written.data), "payload bytes": written.payload, "coding": written.coding}


def _encoded(bundle: Bundle, path: Path, tokens: int | None, books: int | None) -> Encoded:
    """Read a file and encode it."""
    rate = None
    if isinstance(bundle, ImageBundle):
        signal = bundle.values(_picture(path))
    elif isinstance(bundle, SoundBundle):
        signal = bundle.values(_sound(path, bundle))
    else:
        assert isinstance(bundle, VideoBundle)
        frames, rate = _clip(path, bundle)
        signal = bundle.values(frames)
    return encoded(bundle, signal, tokens=tokens, books=books, frame_rate=rate)


def decode_file(bundle: Bundle, path: Path, out: Path, *, to: str | None = None, force: bool = False) -> dict[str, Any]:
    """Decode a container's signals, one after the other, into a picture, a sound or a clip; give what arrived.

    Args:
        bundle: That which encoded them.
        path: The container; `STREAM` for standard input.
        out: The file; `STREAM` for standard output.
        to: What is written, one of `WRITTEN`; by the file's suffix where None, the first of them where that is none.
        force: Decode what another bundle wrote too: noise, unless it is a copy that was exported anew.

    Raises:
        UserError: The container is damaged or another bundle's, or the file can't be written.
    """
    kinds = WRITTEN[bundle.config["modality"]]
    if to is None:
        to = out.suffix[1:].lower() if out.suffix[1:].lower() in kinds else kinds[0]
    found = list(container.read_all(path))
    for one in found:
        container.check(one.header, bundle, path, force)
    codes = [one.codes(bundle) for one in found]
    arrived: dict[str, Any] = {"whole": all(one.complete for one in found)}
    if unchecked := sum(each.shape[2] - one.steps for each, one in zip(codes, found, strict=True)):
        arrived["steps unchecked"] = unchecked
    if isinstance(bundle, ImageBundle):
        if len(found) > 1:
            raise UserError(f"{path}: holds {len(found)} pictures; decode them one by one")
        _put(out, _picture_file(bundle.pixels(bundle.decode(codes[0]))[0], to))
        return {"tokens": codes[0].shape[2], **arrived}
    if isinstance(bundle, SoundBundle):
        ends = [one.units if one.complete else None for one in found]
        waves = [bundle.decode(each)[0, :, :end] for each, end in zip(codes, ends, strict=True)]
        wave = np.concatenate(waves, axis=1)
        _put(out, _sound_file(wave, bundle.sample_rate, to))
        return {"seconds": round(wave.shape[1] / bundle.sample_rate, 3), **arrived}
    assert isinstance(bundle, VideoBundle)
    clips = [_frames(bundle, one, each) for one, each in zip(found, codes, strict=True)]
    if len({clip.shape[1:] for clip in clips}) > 1:
        raise UserError(f"{path}: its clips have frames of several sizes; decode them one by one")
    clip = np.concatenate(clips)
    rate = found[0].header.signal[2] / 1000 or bundle.frame_rate or 8.0
    _put(out, _clip_file(clip, rate, to))
    return {"frames": len(clip), **arrived}


def _frames(bundle: VideoBundle, one: container.Container, codes: Array) -> npt.NDArray[np.uint8]:
    """Decode a clip: uint8 `(t, h, w, 3)`."""
    if len(one.header.signal) != 3:
        raise UserError("a container of clips tells the height, width and rate of their frames; this one doesn't")
    height, width, _ = one.header.signal
    frames = one.units if one.complete else codes.shape[2] * bundle.hop[0] - bundle.lead
    clips: npt.NDArray[np.uint8] = bundle.pixels(bundle.decode(codes, (frames, height, width)))
    return np.asarray(clips[0])


def _kinds(bundle: Bundle) -> tuple[str, ...]:
    if isinstance(bundle, SoundBundle):
        return SOUNDS
    return PICTURES if isinstance(bundle, ImageBundle) else (*CLIPS, *PICTURES)


def _picture(path: Path) -> Any:
    from PIL import Image, ImageOps  # noqa: PLC0415 (sounds don't need it)

    return _read(path, lambda: ImageOps.exif_transpose(Image.open(_opened(path))).convert("RGB"))


def _sound(path: Path, bundle: SoundBundle) -> npt.NDArray[np.float32]:
    """Read a sound as the codec takes it, `(c, t)`: channels are averaged, or repeated."""
    import soundfile  # noqa: PLC0415 (pictures don't need it)

    wave, rate = _read(path, lambda: soundfile.read(_opened(path), dtype="float32", always_2d=True))
    if rate != bundle.sample_rate:
        raise UserError(f"{path}: {rate} Hz, this codec takes {bundle.sample_rate}; resample it before")
    if not len(wave):
        raise UserError(f"{path}: holds no samples")
    given: npt.NDArray[np.float32] = wave.T
    if given.shape[0] != bundle.channels:
        given = np.repeat(given.mean(0, keepdims=True), bundle.channels, axis=0)
    return given.clip(-1, 1)


def _clip(path: Path, bundle: VideoBundle) -> tuple[npt.NDArray[np.uint8], float]:
    """Read a clip's frames `(t, h, w, 3)`, cropped and resized where the codec wants a size, and their rate."""
    if path.suffix.lower() in PICTURES:
        return _fitted(np.asarray(_picture(path)), bundle)[None], 0.0
    av = _av()
    frames: list[npt.NDArray[np.uint8]] = []

    def read() -> float:
        with av.open(_opened(path)) as file:
            if not file.streams.video:
                raise UserError(f"{path}: holds no frames")
            stream = file.streams.video[0]
            for frame in file.decode(stream):
                pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90) % 4)
                frames.append(_fitted(pixels, bundle))
                if len(frames) * frames[0].nbytes > MOST_FRAMES:
                    raise UserError(f"{path}: longer than {MOST_FRAMES >> 30} GiB of frames; cut it into parts")
            return float(stream.average_rate or 0)

    rate = _read(path, read)
    if not frames:
        raise UserError(f"{path}: holds no frames")
    return np.stack(frames), rate


def _fitted(pixels: npt.NDArray[np.uint8], bundle: VideoBundle) -> npt.NDArray[np.uint8]:
    """Bring a frame to the codec's size: resized so that it covers that, then its middle."""
    if bundle.frame_size in (None, pixels.shape[:2]):
        return pixels
    from PIL import Image  # noqa: PLC0415

    assert bundle.frame_size is not None
    height, width = bundle.frame_size
    scale = max(height / pixels.shape[0], width / pixels.shape[1])
    tall, wide = max(height, round(pixels.shape[0] * scale)), max(width, round(pixels.shape[1] * scale))
    large = np.asarray(Image.fromarray(pixels).resize((wide, tall), Image.Resampling.BICUBIC))
    top, left = (tall - height) // 2, (wide - width) // 2
    return large[top : top + height, left : left + width]


def _read(path: Path, call: Callable[[], Any]) -> Any:
    """Read a file by a library, whose every error is told in one line."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:  # of several libraries, each with classes of its own
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: can't be read ({reason})") from error


def _opened(path: Path) -> str | BinaryIO:
    """Give what libraries open: a file's name, or what standard input has, as a file."""
    return io.BytesIO(sys.stdin.buffer.read()) if path == STREAM else str(path)


def _av() -> Any:
    try:
        import av  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise UserError("clips need the package av; pip install 'varitok[video]'") from error
    return av


def _picture_file(pixels: Array, to: str) -> bytes:
    """Write pixels as a file; PNG and WebP lose nothing."""
    from PIL import Image  # noqa: PLC0415

    file = io.BytesIO()
    image = Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])
    image.save(file, "JPEG" if to == "jpg" else to, quality=95, subsampling=0, lossless=True)
    return file.getvalue()


def _sound_file(wave: npt.NDArray[np.float32], rate: int, to: str) -> bytes:
    import soundfile  # noqa: PLC0415

    file = io.BytesIO()
    # libsndfile rounds floats in another way for each format.
    samples = np.clip(np.rint(wave.T * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(file, samples, rate, subtype="PCM_16", format=to)
    return file.getvalue()


def _clip_file(clip: npt.NDArray[np.uint8], rate: float, to: str) -> bytes:
    """Write frames as H.264 of near-lossless quality; odd sides lose their last row or column."""
    av, memory = _av(), io.BytesIO()
    height, width = (side // 2 * 2 for side in clip.shape[1:3])  # 4:2:0 has colours for two rows and columns
    with av.open(memory, "w", format="matroska" if to == "mkv" else to) as file:
        stream = file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.options = {"crf": "12", "preset": "fast"}
        for frame in np.ascontiguousarray(clip[:, :height, :width]):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return memory.getvalue()


def _put(path: Path, data: bytes) -> None:
    """Write a file, which appears whole or not at all; or to standard output."""
    partial = path.with_name(path.name + ".partial")
    try:
        if path == STREAM:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        if path != STREAM:
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error.strerror})") from error
