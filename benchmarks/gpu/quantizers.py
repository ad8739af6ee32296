"""Training steps of quantizers against the equivalent classes of vector-quantize-pytorch ("peer"), in turn."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.bottlenecks.vq import IndexVectorQuantizer, VectorQuantizer

from ..bottlenecks import Cell, call, draw, factorized_cell, fsq_cell, lfq_cell, make, rvq_cell, vq_cell
from .report import Report, Row
from .timing import medians, peak_memory

__all__ = ["measure"]

TOKENS = 16384  # of a batch: 64 images of 256 tokens
ROUNDS = 7
CELLS = [
    *(vq_cell(size, dim, TOKENS, ROUNDS) for size, dim in ((1024, 128), (8192, 8), (16384, 256), (65536, 8))),
    rvq_cell(8, 1024, 128, TOKENS),
    factorized_cell(1024, 9, TOKENS),
    fsq_cell([8, 8, 8, 8, 8], TOKENS),
    lfq_cell(14, TOKENS, False, ROUNDS),
    lfq_cell(18, 1024, False, ROUNDS),  # the peer's entropies have tokens x 2^18 numbers
    lfq_cell(18, 1024, True, ROUNDS),
]
# What the peer has no equivalent of.
ALONE: dict[str, Callable[[], Bottleneck]] = {
    "bsq 36 bits": lambda: BinarySphericalQuantizer(36, entropy_group=9),
    "ibq 16384 x 256": lambda: IndexVectorQuantizer(256, 16384),
    "ibq 262144 x 256": lambda: IndexVectorQuantizer(256, 262144),
    "vq 16384 x 8 with entropy": lambda: VectorQuantizer(8, 16384, cosine=True, entropy=0.1),
    "fsq 8.8.8.8.8 with entropy": lambda: FiniteScalarQuantizer([8, 8, 8, 8, 8], entropy=0.1),
}


def measure(report: Report, device: str, tiny: bool) -> None:
    """Time a step of each quantizer, and of the peer's if it has one."""
    for cell in CELLS[:2] if tiny else CELLS:
        chosen = cell._replace(tokens=256) if tiny else cell
        with report.case("quantizers", cell.name, tokens=chosen.tokens) as row:
            _compare(row, chosen, device)
    for name, build in list(ALONE.items())[: 1 if tiny else None]:
        tokens = 256 if tiny else TOKENS
        with report.case("quantizers", name, tokens=tokens) as row:
            made = build().to(device)
            _time(row, {"ours": _step(made, torch.randn(8, tokens // 8, made.dim, device=device))}, device)


def _compare(row: Row, cell: Cell, device: str) -> None:
    ours, peer = make(cell)
    latents = draw(cell, ours.dim).to(device)
    took = _time(row, {"ours": _step(ours.to(device), latents), "peer": _step(peer.to(device), latents)}, device)
    row["peer / ours"] = took["peer"] / took["ours"]


def _time(row: Row, runs: dict[str, Callable[[], Tensor]], device: str) -> dict[str, float]:
    """Add each side's milliseconds and memory, and return the former."""
    took = medians(runs, device, ROUNDS)
    for name, run in runs.items():
        row[f"{name}, ms"] = took[name]
        if device == "cuda":
            row[f"{name}, GiB"] = peak_memory(run)
    return took


def _step(side: nn.Module, latents: Tensor) -> Callable[[], Tensor]:
    return lambda: call(side, "step", latents)
