"""Speed of reading clips from files: our reader (PyAV) against torchcodec, in turn, with a check of equal frames.

    pip install torchcodec   # needs the shared libraries of a system FFmpeg
    python benchmarks/readers.py CLIPS/*.mp4 [--rounds 5] [--out benchmarks/results/video/readers.csv]

Each file is opened, a segment is read and the file is closed, as a worker does for a sample; CPU time of one thread.
torchcodec's frames are resized by FFmpeg's scaler like ours, since its own resizing gives other pixels.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import av
import torch
from av.video.reformatter import VideoReformatter
from torch import Tensor
from torchcodec.decoders import VideoDecoder

from varitok.data.decoding.video import VideoFile

START = 2  # index of the first frame read, so that seeking is included


def ours(path: str, frames: int, size: tuple[int, int] | None, rate: float | None) -> Tensor:
    with VideoFile(path, rate) as video:
        return video.read(START, frames, size)


def theirs(path: str, frames: int, size: tuple[int, int] | None, rate: float | None) -> Tensor:
    decoder = VideoDecoder(path, dimension_order="NHWC", num_ffmpeg_threads=1)
    about = decoder.metadata
    own = about.average_fps_from_header
    rate = rate or own
    count = min(frames, max(1, int(about.duration_seconds_from_header * rate + 0.5)) - START)
    moments = [(START + number) / rate + 0.5 / own for number in range(count)]
    clip = decoder.get_frames_played_at([min(moment, about.end_stream_seconds - 1e-3) for moment in moments]).data
    if size is not None:
        scaler = VideoReformatter()
        given = (av.VideoFrame.from_numpy_buffer(frame.numpy(), format="rgb24") for frame in clip)
        scaled = (scaler.reformat(frame, size[1], size[0], interpolation="BICUBIC", threads=1) for frame in given)
        clip = torch.stack([torch.from_numpy(frame.to_ndarray()) for frame in scaled])
    return clip.permute(3, 0, 1, 2).contiguous()  # (t, h, w, c) -> (c, t, h, w)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    tasks = {
        "9 frames at 8 a second": (9, None, 8.0),
        "9 frames at 8 a second, 80 x 107": (9, (80, 107), 8.0),
        "40 frames": (40, None, None),
        "40 frames, 80 x 107": (40, (80, 107), None),
    }
    readers: list[Callable[..., Tensor]] = [ours, theirs]
    lines = ["task,ours ms,torchcodec ms,ratio,same frames"]
    for task, form in tasks.items():
        spent: list[list[float]] = [[], []]
        same = 0
        for _ in range(options.rounds):
            for path in options.files:
                clips = []
                for reader, times in zip(readers, spent, strict=True):
                    begin = time.process_time()
                    clips.append(reader(path, *form))
                    times.append(1e3 * (time.process_time() - begin))
                same += torch.equal(*clips)
        mine, other = map(statistics.median, spent)
        share = same / (options.rounds * len(options.files))
        lines.append(f'"{task}",{mine:.2f},{other:.2f},{other / mine:.2f},{share:.0%}')
        print(lines[-1], flush=True)
    if options.out:
        options.out.write_text(f"# {len(options.files)} files, {options.rounds} rounds\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
