"""Ordinary files to containers and back: pictures, sounds and clips; the subcommands `encode` and `decode`."""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from varitok import UserError, watched

from . import container
from .container import STREAM, SUFFIX
from .entropy import CODINGS
from .graphs import Array, Bundle
from .rate import Encoded, Quality, Target, encoded, fitted, psnr
from .runtime import FeatureBundle, ImageBundle, SoundBundle, VideoBundle, load

__all__ = ["decode", "decode_file", "encode", "encode_file"]

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
SOUNDS = (".wav", ".flac", ".ogg", ".mp3")
CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".gif")
MOST_FRAMES = 1 << 30  # bytes of a clip's frames
WRITTEN = {"image": ("png", "jpg", "webp"), "audio": ("wav", "flac"), "video": ("mp4", "mkv")}
"""What is written of each modality, by suffix; the first where nothing else is asked for."""


def encode(words: Sequence[str]) -> None:
    """Run `varitok encode`; see `--help`.

    Raises:
        UserError: A file can't be read or written, or isn't the bundle's.
    """
    _run(words, True)


def decode(words: Sequence[str]) -> None:
    """Run `varitok decode`; see `--help`.

    Raises:
        UserError: A file can't be read or written, or isn't the bundle's.
    """
    _run(words, False)


def _run(words: Sequence[str], encodes: bool) -> None:
    """Run either.

    Raises:
        UserError: A file can't be read or written, or isn't the bundle's.
    """
    options = _parser(encodes).parse_args(words)
    bundle = load(options.bundle, int8=not encodes and options.int8)
    if not isinstance(bundle, ImageBundle | SoundBundle | VideoBundle) or isinstance(bundle, FeatureBundle):
        raise UserError(f"{options.bundle}: there are no files of what it codes; use varitok.load")
    kinds = _kinds(bundle) if encodes else (SUFFIX,)
    to = SUFFIX[1:] if encodes else _written(bundle, options.to)
    target = Target(options.bytes, options.kbps, _quality(bundle, options)) if encodes else Target()
    pairs = _destinations([*_found(options.files, kinds)], options.out, f".{to}")
    console = sys.stderr if any(out == STREAM for _, out in pairs) else sys.stdout
    lines = []
    for path, out in watched(pairs, len(pairs), "files"):
        if encodes:
            kept = {name: getattr(options, name) for name in ("tokens", "books", "coding")}
            about = encode_file(bundle, path, out, target=target, **kept)
        else:
            about = decode_file(bundle, path, out, to=to, force=options.force)
        lines.append({"file": str(path), "out": str(out), **about})
        if not options.json:
            told = ", ".join(f"{value} {name}" for name, value in about.items() if name != "whole")
            missing = "" if about.get("whole", True) else "; the rest is missing"
            print(f"{path} -> {out}: {told}{missing}", file=console, flush=True)
    if options.json:
        print(json.dumps(lines, indent=2), file=console)


def _destinations(found: Sequence[tuple[Path, Path]], out: Path | None, suffix: str) -> list[tuple[Path, Path]]:
    """Tell where each file goes, by its place in the folder that was named."""
    if out == STREAM and len(found) > 1:
        raise UserError(f"--out -: there are {len(found)} files, and standard output takes one; give a folder")
    pairs, taken = [], set[Path]()
    for path, inside in found:
        to_stream = out == STREAM or (out is None and path == STREAM)
        goes = STREAM if to_stream else (out / inside if out else path).with_suffix(suffix)
        if goes in taken or (goes == path and path != STREAM):
            raise UserError(f"{path}: would be written to {goes}, which is another file; give --out, or rename it")
        taken.add(goes)
        pairs.append((path, goes))
    return pairs


def _written(bundle: Bundle, asked: str | None) -> str:
    """Choose what is written: a suffix."""
    known = WRITTEN[bundle.config["modality"]]
    if asked is not None and asked not in known:
        raise UserError(f"--to {asked}: of this bundle's signals there can be {', '.join(known)}")
    return asked or known[0]


def _quality(bundle: Bundle, options: argparse.Namespace) -> Quality | None:
    """Give the quality that is asked for; all but PSNR is measured by what evaluates."""
    if options.psnr is not None:
        return psnr(options.psnr)
    if options.metric is None:
        return None
    name, _, text = options.metric.partition("=")
    try:
        wanted = float(text)
    except ValueError:
        raise UserError(f"--metric {options.metric}: give a name and a value, such as ssim=0.8") from None
    try:
        from .evaluable import quality  # noqa: PLC0415 (with torch)
    except ModuleNotFoundError as error:
        if (error.name or "varitok").startswith("varitok"):
            raise
        raise UserError(f"--metric needs the package {error.name}; pip install 'varitok[train]'") from error
    return quality(bundle, name, wanted)


def _parser(encodes: bool) -> argparse.ArgumentParser:
    name = "encode" if encodes else "decode"
    parser = argparse.ArgumentParser(
        f"varitok {name}",
        description="Turn pictures, sounds or clips into containers (.vtk)."
        if encodes
        else "Turn containers (.vtk) into pictures, sounds or clips.",
        epilog=f"for example: varitok {name} tokenizer {'PHOTOS --tokens 32' if encodes else 'CODES'} --out FOLDER",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="files, or folders of them; - for standard input"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="beside each file by default; - for standard output, of one file"
    )
    parser.add_argument("--json", action="store_true", help="for scripts: a JSON list of what was done")
    if encodes:
        parser.add_argument("--tokens", type=int, metavar="K", help="keep so many tokens, where they are ordered")
        parser.add_argument("--books", type=int, metavar="Q", help="keep so many books")
        parser.add_argument(
            "--coding",
            choices=CODINGS,
            help="how codes are written; default: learned, where the bundle has a prior, else as is smaller",
        )
        target = parser.add_mutually_exclusive_group()
        target.add_argument("--bytes", type=int, metavar="N", help="keep what a file of N bytes has room for")
        target.add_argument("--kbps", type=float, metavar="R", help="keep what R kbit/s have room for")
        target.add_argument("--psnr", type=float, metavar="DB", help="keep no more than so many dB take")
        target.add_argument(
            "--metric", metavar="NAME=VALUE", help="the same, by any metric of the evaluation, such as ssim=0.8"
        )
    else:
        parser.add_argument(
            "--int8", action="store_true", help="by the decoder of 8-bit weights, where the bundle has one"
        )
        written = "; ".join(f"{', '.join(known)} of {what}" for what, known in WRITTEN.items())
        parser.add_argument("--to", metavar="SUFFIX", help=f"what is written: {written}; the first by default")
        parser.add_argument("--force", action="store_true", help="decode what another bundle wrote, come what may")
    return parser


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


def _found(paths: Sequence[Path], kinds: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Find files, and where each lies in the folder that was named; named ones are taken whatever they are called."""
    for path in paths:
        if path == STREAM:
            yield path, Path("stdin")
        elif path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in kinds)
            if not inside:
                raise UserError(f"{path}: no file in it is called {', '.join('*' + kind for kind in kinds)}")
            yield from ((one, one.relative_to(path)) for one in inside)
        elif path.is_file():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file")


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
