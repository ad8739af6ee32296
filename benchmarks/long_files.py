"""Peak memory and time of `varitok encode` and `decode` for files that are longer than memory.

    python benchmarks/long_files.py AUDIO_BUNDLE VIDEO_BUNDLE --out results/long_files.csv

The files are made: an hour of sound (noise with a slowly moving band, of the bundle's sample rate and channels) and a
minute of a clip of 1280 x 720 at 25 frames/s (moving gradients). Each command runs in a process of its own, whose peak
resident memory is Linux's `VmHWM`. Times are those of a machine that may be shared: CPU seconds of all threads.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import av  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import soundfile  # noqa: E402

import varitok  # noqa: E402
from varitok.export.runtime.audio import AudioBundle  # noqa: E402

__all__ = ["main"]

RUN = """
import os, sys
from pathlib import Path
from varitok.export.cli.main import main
main(sys.argv[1:])
peak = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(f"measured: {int(peak) / 1000:.0f} {os.times().user + os.times().system:.0f}")
"""
SIDES, FRAME_RATE = (720, 1280), 25


def sound_chunks(rate: int, seconds: int, channels: int) -> Iterator[npt.NDArray[np.float32]]:
    """Yield `(rate, channels)` for each second: noise below a slowly moving tone."""
    random, ticks = np.random.default_rng(0), np.arange(rate)[:, None] / rate
    for second in range(seconds):
        tone = np.sin(2 * np.pi * (200 + second % 60 * 20) * ticks)
        yield (0.3 * tone + random.normal(0, 0.05, (rate, channels))).astype(np.float32)


def frames(seconds: int) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield frames `(h, w, 3)` of moving gradients under fixed texture."""
    rows, columns = np.ogrid[: SIDES[0], : SIDES[1]]
    texture = np.random.default_rng(0).integers(0, 32, (*SIDES, 3))
    for number in range(seconds * FRAME_RATE):
        waves = [np.sin((rows * a + columns * b) / 90 + number / 15) for a, b in ((1, 0), (0, 1), (1, 1))]
        yield (texture + 110 * (1 + np.stack(np.broadcast_arrays(*waves), 2))).clip(0, 255).astype(np.uint8)


def write_sound(path: Path, bundle: AudioBundle, seconds: int) -> None:
    """Write a FLAC file."""
    with soundfile.SoundFile(path, "w", bundle.sample_rate, bundle.channels) as file:
        for chunk in sound_chunks(bundle.sample_rate, seconds, bundle.channels):
            file.write(chunk)


def write_clip(path: Path, seconds: int) -> None:
    """Write an H.264 file."""
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream("libx264", rate=Fraction(FRAME_RATE), options={"crf": "20", "preset": "veryfast"})
        stream.height, stream.width = SIDES
        stream.pix_fmt = "yuv420p"
        for frame in frames(seconds):
            clip.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        clip.mux(stream.encode(None))


def measure(words: list[str]) -> tuple[int, int]:
    """Run a command of varitok; return its peak memory in MB and its CPU seconds."""
    command = [sys.executable, "-c", RUN, *words]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    peak, seconds = done.stdout.rpartition("measured:")[2].split()
    return int(peak), int(seconds)


def main() -> None:
    """Measure both bundles."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("audio", help="bundle of an audio codec; - for none")
    parser.add_argument("video", help="bundle of a video codec; - for none")
    parser.add_argument("--minutes", type=int, default=60, help="of sound")
    parser.add_argument("--seconds", type=int, default=60, help="of the clip")
    parser.add_argument("--memory", default="2", help="option of the commands, in GB")
    parser.add_argument("--out", type=Path, required=True, help="CSV file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, options.out.open("w", newline="") as out:
        table = csv.writer(out)
        table.writerow(["file", "command", "peak_mb", "cpu_seconds", "bytes"])
        for bundle, name in ((options.audio, "sound.flac"), (options.video, "clip.mp4")):
            if bundle == "-":
                continue
            source = Path(folder, name)
            if name == "sound.flac":
                write_sound(source, varitok.load(bundle), 60 * options.minutes)
                label = f"{options.minutes} min of sound"
            else:
                write_clip(source, options.seconds)
                label = f"{options.seconds} s of {SIDES[1]} x {SIDES[0]}"
            coded, back = source.with_suffix(".vtk"), Path(folder, "back")
            for command, given, to in (("encode", source, Path(folder)), ("decode", coded, back)):
                peak, seconds = measure([command, bundle, str(given), "--out", str(to), "--memory", options.memory])
                size = sum(file.stat().st_size for file in (back.iterdir() if command == "decode" else [coded]))
                table.writerow([label, command, peak, seconds, size])
                out.flush()
                print(f"{label}, {command}: {peak} MB at the peak, {seconds} CPU s, {size} bytes", flush=True)


if __name__ == "__main__":
    main()
