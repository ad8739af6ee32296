"""Measure Opus and MP3 over bit rates, on the sounds and by the metrics that varitok evaluates with.

    python benchmarks/classic_audio.py DATA_FOLDER --sample-rate 16000 --seconds 10 --out benchmarks/results/NAME.csv

Each sound is coded whole, or as its first seconds, mono, at the sample rate that the codec under comparison has. Both
sides are compared as 16-bit values; what a coder puts before a sound or after it is taken away, so that all samples
are back at their places. Bits are counted twice: what the coder itself gave out (payload), and the whole file.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import av  # noqa: E402
import soundfile  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from varitok import UserError  # noqa: E402
from varitok.codecs.metrics.audio import DEFINITIONS, available, comparison, written  # noqa: E402
from varitok.codecs.metrics.table import write_rows  # noqa: E402
from varitok.data.batch import BadSample  # noqa: E402
from varitok.data.folders import list_files  # noqa: E402
from varitok.data.sound_files import decode_sound  # noqa: E402
from varitok.data.sounds import SUFFIXES  # noqa: E402

__all__ = ["FORMATS", "Coded", "Format", "decode", "encode", "main"]

VAL_SHARE = 0.05  # as in configs/data/sound_folder.yaml
APPLICATIONS = ("audio", "voip")


class Format(NamedTuple):
    """A classic codec.

    Attributes:
        encoder: FFmpeg's name of it.
        container: What its packets are put into.
        rates: The sample rates that it codes, in Hz.
        settings: Bit rates to try, in kbit/s.
        options: Further settings of the encoder's.
        payload: What is counted once the container is subtracted, for the table's header.
        level: What a decoded sound is divided by.
    """

    encoder: str
    container: str
    rates: tuple[int, ...]
    settings: tuple[int, ...]
    options: dict[str, str]
    payload: str
    level: float = 1.0


FORMATS = {
    "Opus": Format(
        "libopus",
        "ogg",
        (8_000, 12_000, 16_000, 24_000, 48_000),
        (6, 8, 12, 16, 24, 32, 64),
        {"vbr": "on", "compression_level": "10", "frame_duration": "20"},
        "Opus packets, with what the coder adds at both ends of a sound; the pages of Ogg and its two headers left out",
    ),
    "MP3": Format(
        "libmp3lame",
        "mp3",
        (8_000, 11_025, 12_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000),
        (32, 48, 64, 96, 128),
        {"compression_level": "3"},  # LAME's default; 0, its slowest, is worse by every metric at 16 kHz
        "frames with their headers, which decoding needs, and what the coder adds at both ends; LAME's tag left out",
        0.95,  # LAME lowers all that it codes, against clipping, which the spectral distances would count as an error
    ),
}


class Coded(NamedTuple):
    """A sound as a file.

    Attributes:
        file: All of it.
        payload: Bytes of the coder's packets in it.
    """

    file: bytes
    payload: int


def encode(kind: str, kbps: int, sound: Tensor, sample_rate: int, application: str = "audio") -> Coded:
    """Code a sound `(1, t)`, of values that 16 bits hold.

    Args:
        kind: A key of `FORMATS`.
        kbps: kbit/s.
        sound: The sound.
        sample_rate: In Hz, one of the format's.
        application: Of Opus: "audio", or "voip", which favours speech.
    """
    form = FORMATS[kind]
    options = {**form.options, "application": application} if kind == "Opus" else form.options
    frame = av.AudioFrame.from_ndarray(written(sound).mul(32768).to(torch.int16).numpy(), format="s16", layout="mono")
    frame.sample_rate, frame.pts = sample_rate, 0
    buffer, payload = BytesIO(), 0
    # Without FFmpeg's version and a drawn serial number, a file is the same each time.
    with av.open(buffer, "w", format=form.container, container_options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream(form.encoder, rate=sample_rate, layout="mono", options=options)
        stream.bit_rate = 1000 * kbps
        for given in (frame, None):  # None: all that the coder still has
            for packet in stream.encode(given):
                payload += packet.size
                container.mux(packet)
    return Coded(buffer.getvalue(), payload)


def decode(kind: str, file: bytes, samples: int) -> Tensor:
    """Decode a file of `encode` to the sound `(1, samples)` that went into it, float32, at the rate that it had.

    libsndfile decodes Opus at that rate (FFmpeg would do so at 48 kHz, and the way back cuts off the highest
    frequencies), and takes away what Ogg's and LAME's headers call delay and padding.

    Raises:
        ValueError: Less samples came back.
    """
    sound, _ = soundfile.read(BytesIO(file), dtype="float32", always_2d=True)
    if len(sound) < samples:
        raise ValueError(f"{len(sound)} of {samples} samples came back")
    # A sound of a few samples comes back a little longer.
    return torch.from_numpy(sound.T[:, :samples] / FORMATS[kind].level)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data", type=Path, metavar="DATA_FOLDER", help="sounds; its val/, or the share held out of it")
    parser.add_argument("--all", action="store_true", help="all sounds of the folder, not only the held-out ones")
    parser.add_argument("--sample-rate", type=int, default=16_000, metavar="HZ", help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="S", help="only the first; default: all")
    parser.add_argument("--codecs", nargs="+", choices=FORMATS, default=list(FORMATS), help="default: all")
    parser.add_argument("--application", choices=APPLICATIONS, default="audio", help="Opus'; default: %(default)s")
    parser.add_argument("--metrics", nargs="+", metavar="NAME", help="default: all whose package is installed")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV", help="the table to write")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _compare(options, shlex.join(["python", "benchmarks/classic_audio.py", *words]))
    except UserError as error:
        print(f"classic_audio: {error}", file=sys.stderr)
        sys.exit(2)


def _compare(options: argparse.Namespace, command: str) -> None:
    """Read, code, measure and write."""
    rate = options.sample_rate
    if not options.seconds * rate >= 1:
        raise UserError(f"--seconds {options.seconds:g}: must be above 0")
    for kind in options.codecs:
        if rate not in FORMATS[kind].rates:
            raise UserError(f"{kind} codes sounds at {', '.join(map(str, FORMATS[kind].rates))} Hz, not at {rate}")
    names = options.metrics or available(rate)
    metrics = {name: comparison(name, rate) for name in names}
    sounds = [written(sound) for sound in _read(options)]
    if not sounds:
        raise UserError(f"{options.data}: no sound could be read")
    seconds = sum(sound.shape[1] for sound in sounds) / rate
    rows: list[dict[str, object]] = []
    for kind in options.codecs:
        for kbps in FORMATS[kind].settings:
            payload = file = 0
            values: dict[str, list[float]] = {name: [] for name in metrics}
            for sound in sounds:
                coded = encode(kind, kbps, sound, rate, options.application)
                payload, file = payload + coded.payload, file + len(coded.file)
                decoded, length = decode(kind, coded.file, sound.shape[1]), torch.tensor([sound.shape[1]])
                for name, metric in metrics.items():
                    values[name].append(metric(decoded[None], sound[None], length).item())
            sizes = {"kbps": payload * 8e-3 / seconds, "file_kbps": file * 8e-3 / seconds}
            rows.append({"codec": kind, "setting": kbps, **sizes, **{name: _mean(values[name]) for name in metrics}})
            print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()))
    write_rows(options.out, _header(options, command, len(sounds), seconds, list(metrics)), rows)
    print(f"written to {options.out}")


def _read(options: argparse.Namespace) -> Iterator[Tensor]:
    """Read the sounds, mono, at the sample rate."""
    splits = ("train", "val") if options.all else ("val",)
    paths = sorted({path for split in splits for path in list_files(options.data, split, VAL_SHARE, SUFFIXES, "sound")})
    frames = None if options.seconds == math.inf else round(options.seconds * options.sample_rate)
    for path in paths:
        try:
            yield decode_sound(path, frames=frames, sample_rate=options.sample_rate, channels=1)
        except BadSample as error:
            print(f"left out: {error}", file=sys.stderr)


def _mean(values: list[float]) -> float:
    """Average over the sounds that have a value."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def _header(
    options: argparse.Namespace, command: str, sounds: int, seconds: float, names: Sequence[str]
) -> dict[str, str]:
    part = "whole" if options.seconds == math.inf else f"the first {options.seconds:g} s"
    which = "all sounds" if options.all else "validation split"
    settings = {}
    for kind in options.codecs:
        form = FORMATS[kind]
        given = {**form.options, **({"application": options.application} if kind == "Opus" else {})}
        level = "" if form.level == 1 else f"; the coder's level of {form.level:g} undone"
        settings[f"settings {kind}"] = f"{form.encoder}, {given}; payload: {form.payload}{level}"
    return {
        "dataset": f"{options.data}, {which}, {sounds} sounds, {seconds:.1f} s",
        "protocol": f"{part}, mono, {options.sample_rate} Hz; both sides as 16-bit values; all samples at their places",
        "column setting": "the bit rate asked for, kbit/s",
        "column kbps": "bits of payload of all sounds over their seconds, / 1000; file_kbps: of whole files",
        **{f"column {name}": DEFINITIONS[name].format(rate=options.sample_rate) for name in names},
        **settings,
        "command": command,
        "versions": _versions(),
    }


def _versions() -> str:
    """Say what did the work."""
    libavcodec = ".".join(map(str, av.library_versions["libavcodec"]))
    libsndfile = soundfile.__libsndfile_version__
    found = [f"PyAV {av.__version__} (libavcodec {libavcodec}), libsndfile {libsndfile}, torch {torch.__version__}"]
    for package in ("torchaudio", "pystoi", "pesq"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


if __name__ == "__main__":
    main()
