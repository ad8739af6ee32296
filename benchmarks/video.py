"""Speed and memory of our VidTok, against a plain PyTorch implementation and in other forms (bf16, compiled, ...).

    python benchmarks/video.py [--codec vidtok] [--frames 8] [--size 64] [--batch 1] [--only step encode decode memory]
        [--forms ours channels_last bf16 compile] [--rounds 5] [--threads 1] [--device cpu] [--out NAME.csv]

The plain implementation has our weights, and computes the same latents and frames (there is a test). It is written in
the usual way: a spatial convolution merges time into the batch axis, a temporal one merges space, a joint one pads
first, and norms move channels to the last axis and back.

A step is forward, L1 loss, backward and AdamW, of encoder and decoder. Encode and decode are the networks alone,
without gradients. All forms run in turn, after an untimed round; ratios are of medians. Compilation is not timed.
`memory` runs each clip length in a separate process, whole and chunk by chunk. It measures the peak above that of a
clip of one latent frame: resident memory on a CPU, allocated memory on a GPU.
"""

import argparse
import copy
import csv
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import hydra
import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.networks import resnet
from varitok.codecs.networks.layers.convolution import Convolution
from varitok.codecs.streaming import ChunkedCodec

__all__ = ["FORMS", "PlainDecoder", "PlainEncoder", "main", "make"]

FORMS = ("ours", "channels_last", "bf16", "compile")
TASKS = ("step", "encode", "decode", "memory")
STEPS = (2, 4, 8, 16)  # clip lengths for memory, in latent frames


class _Conv(nn.Module):
    """A causal convolution over space, over time, or over both."""

    def __init__(self, ours: Convolution) -> None:
        super().__init__()
        self.kernel, self.stride = tuple(ours.kernel), tuple(ours.stride)
        self.weight, self.bias = nn.Parameter(ours.layer.weight.clone()), nn.Parameter(ours.layer.bias.clone())

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        before, *sides = (k - s for k, s in zip(self.kernel, self.stride, strict=True))
        if self.kernel[0] == 1:
            x = x.permute(0, 2, 1, 3, 4).reshape(b * t, c, h, w)  # (b, c, t, h, w) -> (b t, c, h, w)
            x = functional.pad(x, [n for total in reversed(sides) for n in (total // 2, total - total // 2)])
            x = functional.conv2d(x, self.weight[:, :, 0], self.bias, self.stride[1:])
            return x.reshape(b, t, *x.shape[1:]).permute(0, 2, 1, 3, 4)  # (b t, c, h, w) -> (b, c, t, h, w)
        if self.kernel[1:] == (1, 1):
            # (b, c, t, h, w) -> (b h w, c, t)
            x = functional.pad(x.permute(0, 3, 4, 1, 2).reshape(b * h * w, c, t), [before, 0])
            x = functional.conv1d(x, self.weight[..., 0, 0], self.bias, self.stride[0])
            return x.reshape(b, h, w, -1, x.shape[2]).permute(0, 3, 4, 1, 2)  # (b h w, c, t) -> (b, c, t, h, w)
        x = functional.pad(x, [n for total in reversed(sides) for n in (total // 2, total - total // 2)] + [before, 0])
        return functional.conv3d(x, self.weight, self.bias, self.stride)


class _Norm(nn.Module):
    """Root-mean-square norm over channels."""

    def __init__(self, ours: resnet.ChannelNorm) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(ours.weight.clone()), ours.eps

    def forward(self, x: Tensor) -> Tensor:
        # (b, c, t, h, w) -> (b, t, h, w, c)
        x = functional.rms_norm(x.permute(0, 2, 3, 4, 1), self.weight.shape, self.weight, self.eps)
        return x.permute(0, 4, 1, 2, 3)  # (b, t, h, w, c) -> (b, c, t, h, w)


class _Unit(nn.Module):
    """A residual unit."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.norms = nn.ModuleList([_Norm(ours.first_norm), _Norm(ours.second_norm)])
        self.convs = nn.ModuleList(_Conv(chain.convs[0]) for chain in (ours.first, ours.second))
        self.shortcut = nn.Identity() if ours.shortcut is None else _Conv(ours.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](functional.silu(self.norms[0](x)))
        y = self.convs[1](functional.silu(self.norms[1](y)))
        return self.shortcut(x) + y


class _Attention(nn.Module):
    """Self-attention over the positions of each frame."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = _Norm(ours.norm), copy.deepcopy(ours.qkv), copy.deepcopy(ours.out)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        y = self.norm(x).permute(0, 2, 3, 4, 1).reshape(b * t, h * w, c)  # (b, c, t, h, w) -> (b t, h w, c)
        q, k, v = self.qkv(y).chunk(3, dim=-1)
        y = self.out(functional.scaled_dot_product_attention(q, k, v))
        return x + y.reshape(b, t, h, w, c).permute(0, 4, 1, 2, 3)  # (b t, h w, c) -> (b, c, t, h, w)


class _Change(nn.Module):
    """A downsampling or upsampling stage: spatial convolution, and temporal pooling blended with a convolution."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.down = isinstance(ours, resnet._Down)
        self.time, self.space = ours.time, () if self.down else ours.space
        self.across = None if ours.across is None else _Conv(ours.across)
        self.along = None if ours.along is None else _Conv(ours.along)
        self.blend = None if ours.blend is None else nn.Parameter(ours.blend.clone())

    def forward(self, x: Tensor) -> Tensor:
        if self.down:
            x = x if self.across is None else self.across(x)
            if self.along is not None:
                share = self.blend.sigmoid()
                x = share * functional.avg_pool3d(x, (self.time, 1, 1)) + (1 - share) * self.along(x)
            return x
        if self.along is not None:
            x = functional.interpolate(x, scale_factor=(self.time, 1, 1), mode="nearest")
            share = self.blend.sigmoid()
            x = share * x + (1 - share) * self.along(x)
        if self.across is not None:
            x = self.across(functional.interpolate(x, scale_factor=(1, *self.space), mode="nearest"))
        return x


def _middle(ours: Any) -> nn.Sequential:
    parts = [_Unit(unit) for unit in ours.first.units] + [_Attention(ours.within)]
    return nn.Sequential(*parts, *(_Unit(unit) for unit in ours.second.units))


def _stages(ours: Any, changes: Any) -> nn.Sequential:
    parts: list[nn.Module] = []
    for level, stage in enumerate(ours.stages):
        parts += [_Unit(unit) for unit in stage.units]
        parts += [_Change(changes[level])] if level < len(changes) else []
    return nn.Sequential(*parts)


class PlainEncoder(nn.Module):
    """VidTok's encoder in plain PyTorch, with our weights; the Haar transform of a small one is our module."""

    def __init__(self, ours: resnet.ResNetEncoder) -> None:
        super().__init__()
        body = [_Conv(ours.first.convs[0]), *_stages(ours, ours.downs), *_middle(ours.middle), _Norm(ours.norm)]
        self.body = nn.Sequential(copy.deepcopy(ours.patcher), *body, nn.SiLU(), _Conv(ours.last.convs[0]))

    def forward(self, clip: Tensor) -> Tensor:
        """Encode clips `(b, 3, t, h, w)`, t a multiple of the downsampling, to latents `(b, n, width)`."""
        return self.body(clip).flatten(2).transpose(1, 2)  # (b, c, t, h, w) -> (b, t h w, c)


class PlainDecoder(nn.Module):
    """VidTok's decoder in plain PyTorch, with our weights."""

    def __init__(self, ours: resnet.ResNetDecoder) -> None:
        super().__init__()
        body = [_Conv(ours.first.convs[0]), *_middle(ours.middle), *_stages(ours, ours.ups), _Norm(ours.norm)]
        self.body = nn.Sequential(*body, nn.SiLU(), _Conv(ours.last.convs[0]), copy.deepcopy(ours.unpatcher))

    def forward(self, latents: Tensor, mask: None, grid: Sequence[int]) -> Tensor:
        """Decode latents `(b, n, width)` of a grid `(t, h, w)` to clips."""
        return self.body(latents.transpose(1, 2).reshape(len(latents), -1, *grid))  # (b, n, c) -> (b, c, t, h, w)


def make(name: str, device: str) -> Codec:
    """Build the codec of a preset in evaluation mode."""
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        choice = [f"codec={name}", "data=scenes", "bottleneck=fsq", "length=full"]
        config = hydra.compose("train", choice)
    torch.manual_seed(0)
    return build_codec(config).eval().to(device)


def _runner(
    task: str, encoder: nn.Module, decoder: nn.Module, clip: Tensor, grid: Sequence[int], bf16: bool
) -> Callable[[], None]:
    """Return the function to time: a training step, an encode or a decode."""
    device = clip.device.type
    cast = torch.autocast(device, torch.bfloat16, enabled=bf16)
    if task == "step":
        optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters()], lr=1e-5)

        def run() -> None:
            with cast:
                painted = decoder(encoder(clip), None, list(grid))
            functional.l1_loss(painted.float(), clip).backward()
            optimizer.step()
            optimizer.zero_grad()

    else:
        with torch.no_grad(), cast:
            latents = encoder(clip)

        def run() -> None:
            with torch.no_grad(), cast:
                encoder(clip) if task == "encode" else decoder(latents, None, list(grid))

    def timed() -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    return timed


def _speed(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time all tasks; within each, all forms in turn."""
    rows = []
    for task in (task for task in options.only if task != "memory"):
        runs: dict[str, Callable[[], None]] = {}
        for form in ("plain", *options.forms):
            codec = make(options.codec, options.device)
            clip = torch.rand(options.batch, 3, options.frames, options.size, options.size, device=options.device)
            grid = [side // step for side, step in zip(clip.shape[2:], codec.downsample, strict=True)]
            pair: list[nn.Module] = [codec.encoder, codec.decoder]
            if form == "plain":
                pair = [PlainEncoder(codec.encoder), PlainDecoder(codec.decoder)]  # type: ignore[arg-type]
                pair = [network.to(options.device) for network in pair]
            if form == "channels_last":
                pair = [network.to(memory_format=torch.channels_last_3d) for network in pair]
                clip = clip.contiguous(memory_format=torch.channels_last_3d)
            if form == "compile":
                for network in pair:
                    network.compile()
            runs[form] = _runner(task, pair[0], pair[1], clip, grid, form == "bf16")
            runs[form]()
        times: dict[str, list[float]] = {form: [] for form in runs}
        for _ in range(options.rounds):
            for form, run in runs.items():
                begin = time.perf_counter()
                run()
                times[form].append(time.perf_counter() - begin)
        medians = {form: statistics.median(each) for form, each in times.items()}
        for form, median in medians.items():
            speedup = medians["plain"] / median
            rows.append({"task": task, "form": form, "ms": f"{1e3 * median:.4g}", "speedup": f"{speedup:.3g}"})
            print(f"| {task} | {form} | {1e3 * median:.4g} ms | {speedup:.3g} |", flush=True)
    return rows


def _peak(options: argparse.Namespace) -> float:
    """Return the peak memory of one direction and clip length above that of one latent frame, in MiB."""
    codec, (task, way, steps) = make(options.codec, options.device), options.child
    hop = codec.downsample

    @torch.no_grad()
    def run(count: int) -> None:
        clip = torch.rand(1, 3, count * hop[0], options.size, options.size, device=options.device)
        if way == "whole":
            codec.encode(clip) if task == "encode" else codec.decode(
                codec.encode(clip[:, :, : hop[0]]).repeat(1, 1, count, 1, 1)
            )
            return
        chunked, state, first = ChunkedCodec(codec), None, codec.layout.causal_pad
        codes = codec.encode(clip[:, :, :1])
        for step in range(count):
            if task == "encode":
                chunk = clip[:, :, max(0, step * hop[0] - first) : (step + 1) * hop[0] - first]
                _, state = chunked.encode_chunk(chunk, state)
            else:
                _, state = chunked.decode_chunk(codes, state)

    def peak() -> float:
        if options.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    run(1)
    before = peak()
    run(int(steps))
    return peak() - before


def _memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure the memory of all clip lengths, each in a separate process."""
    rows = []
    for task in ("encode", "decode"):
        for way in ("whole", "chunks"):
            for steps in STEPS:
                command = [sys.executable, __file__, "--codec", options.codec, "--size", str(options.size)]
                command += [
                    "--device",
                    options.device,
                    "--threads",
                    str(options.threads),
                    "--child",
                    task,
                    way,
                    str(steps),
                ]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                found = json.loads(done.stdout.splitlines()[-1])
                rows.append({"task": task, "form": way, "latent_frames": steps, "mib": f"{found:.1f}"})
                print(f"| {task} | {way} | {steps} latent frames | {found:.1f} MiB |", flush=True)
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--codec", default="vidtok", help="preset with VidTok's layers; default: %(default)s")
    parser.add_argument("--frames", type=int, default=8, help="whole latent frames; default: %(default)s")
    parser.add_argument("--size", type=int, default=64, help="side of frames in pixels; default: %(default)s")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=FORMS)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; default: %(default)s")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(_peak(options)))
        return
    where = torch.cuda.get_device_name() if options.device == "cuda" else f"{options.threads} threads of a processor"
    about = f"{options.codec}, {options.batch} x {options.frames} x {options.size} x {options.size}, {where}"
    print(f"{about}; torch {torch.__version__}")
    rows = _speed(options) + (_memory(options) if "memory" in options.only else [])
    if options.out:
        columns = ["task", "form", "ms", "speedup", "latent_frames", "mib"]
        with options.out.open("w", newline="") as file:
            words = sys.argv[1:] if arguments is None else arguments
            file.write(f"# python benchmarks/video.py {' '.join(words)}\n# {about}; torch {torch.__version__}\n")
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
