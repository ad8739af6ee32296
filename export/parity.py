"""Proof that what was exported does what the codec did: every file is read back and run at sizes of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from varitok.codecs.codec import Codec

from .torchscript import load_torchscript

__all__ = ["CODES", "PEAK", "ParityError", "check_parity", "codes_of", "probes"]

CODES = 0.9999  # share of equal codes of the first book
PEAK = 1e-5  # difference of signals, as a share of the peak


class ParityError(RuntimeError):
    """An exported file differs from the codec; the text names the file, the size and the figure."""


class _Runner(NamedTuple):
    name: str
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def probes(channels: int, size: int) -> Iterator[Tensor]:
    """Give batches of 1, 3 and 5 images: random, smooth, constant, black and white."""
    random = torch.Generator().manual_seed(0)
    rows = torch.linspace(-1, 1, size)
    smooth = (rows[:, None] * rows[None, :]).expand(channels, size, size)
    noise = torch.rand(5, channels, size, size, generator=random) * 2 - 1
    yield noise[:1]
    yield torch.stack([smooth, noise[1], torch.full_like(smooth, 0.25)])
    yield torch.stack([noise[2], torch.ones_like(smooth), -torch.ones_like(smooth), smooth.flip(-1), noise[3] / 4])


def codes_of(tokens: int) -> list[int]:
    """List the numbers of kept tokens that are tried: the ends and their neighbours."""
    return sorted({1, min(2, tokens), max(1, tokens - 1), tokens})


def check_parity(codec: Codec, folder: Path, channels: int, size: int) -> dict[str, dict[str, float]]:
    """Compare the files of a bundle with the codec's own `encode` and `decode`.

    Args:
        codec: In evaluation mode, on the CPU, float32.
        folder: The bundle.
        channels: Channels of its images.
        size: Side of its images.

    Returns:
        For each file, the smallest share of equal first-book codes and the largest difference over the peak.

    Raises:
        ParityError: A figure is beyond its gate.
    """
    report = {}
    for runner in _runners(folder):
        equal, difference = 1.0, 0.0
        for signal in probes(channels, size):
            with torch.inference_mode():
                codes = codec.encode(signal)
            share = (runner.encode(signal)[:, 0] == codes[:, 0]).float().mean().item()
            if share < CODES:
                raise ParityError(f"{runner.name}: {share:.4%} of codes are equal at batch {len(signal)}")
            equal = min(equal, share)
            for k in codes_of(codec.tokens):
                with torch.inference_mode():
                    expected = codec.decode(codes[..., :k]).clamp(-1, 1)
                error = (runner.decode(codes[..., :k].contiguous()) - expected).abs().max() / expected.abs().max()
                if not error <= PEAK:
                    raise ParityError(f"{runner.name}: signals differ by {error:.2e} at batch {len(signal)}, k = {k}")
                difference = max(difference, error.item())
        report[runner.name] = {"equal_codes": equal, "signal_difference": difference}
    return report


def _runners(folder: Path) -> Iterator[_Runner]:
    """Read back what the bundle has."""
    if (folder / "codec.ts").exists():
        module, _ = load_torchscript(folder / "codec.ts")
        yield _Runner("codec.ts", module.encode, module.decode)
    if (folder / "onnx").exists():
        sessions = [
            onnxruntime.InferenceSession(folder / "onnx" / f"{role}_model.onnx", providers=["CPUExecutionProvider"])
            for role in ("encoder", "decoder")
        ]

        def run(session: onnxruntime.InferenceSession, value: Tensor) -> Tensor:
            (result,) = session.run(None, {session.get_inputs()[0].name: value.numpy()})
            return torch.from_numpy(np.asarray(result))

        yield _Runner("onnx", lambda signal: run(sessions[0], signal), lambda codes: run(sessions[1], codes))
