"""Speed and memory of bottlenecks against the equivalent classes of vector-quantize-pytorch ("peer").

    python benchmarks/bottlenecks.py [--only NAME ...] [--rounds N] [--threads 2]
        [--out benchmarks/results/bottlenecks/bottlenecks.csv]

A step is a forward pass in training mode, the backward pass of `latents.sum()` and all penalties, and the codebook
update. Encoding maps latents to codes without gradients; for the peer, which has no encode method, it is a forward pass
in evaluation mode. Both get the same latents and the same codebook, and equality of their codes is checked. Ours, the
peer and the bare matrix product run in turn, after an untimed call of each. Ratios are of medians: absolute times mean
little on shared machines.

The bare product is latents x codebook^T, in tiles that stay in cache, into a preallocated buffer; for several
codebooks, all their products. Steps are compared with it too, although it has no backward pass or update.

Memory is the peak resident memory (`VmHWM`, reset before) minus the resident memory before the first call. It is
measured in a separate process, after a warm-up on a few tokens. It excludes inputs and models; it includes outputs,
gradients and state allocated by the first call. Large blocks are allocated by mmap, so that freed ones are returned.
"""

import argparse
import csv
import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import torch
import vector_quantize_pytorch as theirs
from torch import Tensor, nn
from torch.nn import functional

from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer, ResidualScalarQuantizer
from varitok.codecs.bottlenecks.residual import Residual, residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, SimVectorQuantizer, VectorQuantizer

Side = Literal["ours", "peer"]
What = Literal["step", "encode"]
SAMPLES = 8  # batch size
TILE = (128, 8192)  # rows and columns of the bare product: 4 MiB
WARM_UP = 32  # tokens per sample in warm-up calls


class Factorized(nn.Module):
    """DAC's quantizer (arXiv 2306.06546, section 3.2) level by level as published, with our weights."""

    def __init__(self, like: FactorizedResidualQuantizer) -> None:
        super().__init__()
        width = like.width
        self.into, self.out, self.codebooks = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for codebook in range(like.num_codebooks):
            part = slice(codebook * width, (codebook + 1) * width)
            into, out, table = nn.Linear(like.dim, width), nn.Linear(width, like.dim), like.codebooks[codebook].detach()
            with torch.no_grad():
                into.weight.copy_(like.into.weight[part])
                into.bias.copy_(like.into.bias[part])
                out.weight.copy_(like.out.weight[:, part])
                out.bias.copy_(like.out_bias[codebook])
            self.into.append(into)
            self.out.append(out)
            self.codebooks.append(nn.Embedding(len(table), width, _weight=table.clone()))

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        residual, total, codes, losses = latents, torch.zeros_like(latents), [], []
        for into, out, codebook in zip(self.into, self.out, self.codebooks, strict=True):
            level = into(residual)
            # (b, n, d) -> (b n, d)
            rows, table = functional.normalize(level.flatten(0, 1)), functional.normalize(codebook.weight)  # type: ignore[arg-type]
            distance = rows.square().sum(1, keepdim=True) - 2 * rows @ table.T + table.square().sum(1, keepdim=True).T
            code = (-distance).max(1).indices.view(level.shape[:-1])  # (b n) -> (b, n)
            entry = codebook(code)
            losses.append(functional.mse_loss(level.detach(), entry) + functional.mse_loss(level, entry.detach()) / 4)
            found = out(level + (entry - level).detach())
            residual, total = residual - found, total + found
            codes.append(code)
        return total, torch.stack(codes, -1), torch.stack(losses)


class Cell(NamedTuple):
    """A bottleneck to compare.

    Attributes:
        name: Name of the row.
        tokens: Number of tokens in the batch, such that the peer's call takes seconds and less than 6 GiB.
        ours: Builds our bottleneck.
        peer: Builds the peer's, given ours.
        products: Shapes `(K, d)` of the matrices that latents are multiplied by at least; empty without distances.
        rounds: Number of timed rounds.
        agree: Whether both have the same codebook and numbering, so that their codes can be compared.
    """

    name: str
    tokens: int
    ours: Callable[[], Bottleneck]
    peer: Callable[[Any], nn.Module]
    products: tuple[tuple[int, int], ...] = ()
    rounds: int = 5
    agree: bool = True


def with_entries(peer: Any, entries: Tensor) -> nn.Module:
    """Copy our entries `(K, d)` to a codebook of the peer's with one head, and return the peer."""
    codebook = peer._codebook
    codebook.embed.data.copy_(entries.detach()[None])  # (K, d) -> (1, K, d)
    if hasattr(codebook, "embed_avg"):
        codebook.embed_avg.copy_(codebook.embed.data)
        codebook.cluster_size.fill_(1.0)
    return peer  # type: ignore[no-any-return]


def vq_cell(size: int, dim: int, tokens: int, rounds: int, cosine: bool = False) -> Cell:
    """Compare EMA codebooks."""
    options = {"dim": dim, "codebook_size": size, "use_cosine_sim": cosine, "decay": 0.99, "rotation_trick": False}
    return Cell(
        f"vq {'cosine ' * cosine}{size} x {dim}",
        tokens,
        lambda: EMAVectorQuantizer(dim, size, cosine=cosine, kmeans_init=False),
        lambda ours: with_entries(theirs.VectorQuantize(**options), ours.table()),
        ((size, dim),),
        rounds,
    )


def learned_cell(size: int, dim: int, tokens: int) -> Cell:
    """Compare codebooks learned by gradient."""
    options = {"dim": dim, "codebook_size": size, "learnable_codebook": True, "ema_update": False}

    def ours() -> Bottleneck:
        made = VectorQuantizer(dim, size)
        nn.init.normal_(made.codebook, std=dim**-0.5)
        return made

    def peer(ours: VectorQuantizer) -> nn.Module:
        return with_entries(theirs.VectorQuantize(**options, rotation_trick=False), ours.table())

    return Cell(f"vq learned {size} x {dim}", tokens, ours, peer, ((size, dim),))


def sim_cell(size: int, dim: int, tokens: int, rounds: int) -> Cell:
    """Compare frozen codebooks behind a learned linear map (SimVQ)."""

    def peer(ours: SimVectorQuantizer) -> nn.Module:
        made = theirs.SimVQ(dim=dim, codebook_size=size, rotation_trick=False)
        with torch.no_grad():
            made.frozen_codebook.copy_(ours.basis)
            made.code_transform.weight.copy_(ours.map.weight)
        return made  # type: ignore[no-any-return]

    name = f"simvq {size} x {dim}"
    return Cell(name, tokens, lambda: SimVectorQuantizer(dim, size), peer, ((size, dim),), rounds)


def rvq_cell(num_codebooks: int, size: int, dim: int, tokens: int) -> Cell:
    """Compare residual quantizers with EMA codebooks."""

    def peer(ours: Residual) -> nn.Module:
        made = theirs.ResidualVQ(
            dim=dim, num_quantizers=num_codebooks, codebook_size=size, decay=0.99, rotation_trick=False
        )
        for level, part in zip(made.layers, ours.parts, strict=True):
            with_entries(level, part.table())  # type: ignore[operator]
        return made  # type: ignore[no-any-return]

    ours = lambda: residual(lambda: EMAVectorQuantizer(dim, size, kmeans_init=False), num_codebooks)  # noqa: E731
    return Cell(f"rvq {num_codebooks} x {size} x {dim}", tokens, ours, peer, ((size, dim),) * num_codebooks, 3)


def factorized_cell(dim: int, num_codebooks: int, tokens: int) -> Cell:
    """Compare DAC's factorized residual quantizer."""
    products = ((num_codebooks * 8, dim), *(((1024, 8),) * num_codebooks), (dim, num_codebooks * 8))
    name = f"factorized rvq {num_codebooks} x 1024 x 8 of {dim}"
    return Cell(name, tokens, lambda: FactorizedResidualQuantizer(dim, num_codebooks), Factorized, products)


def fsq_cell(levels: list[int], tokens: int) -> Cell:
    """Compare finite scalar quantization."""
    name = f"fsq {'.'.join(map(str, levels))}"
    return Cell(name, tokens, lambda: FiniteScalarQuantizer(levels), lambda _: theirs.FSQ(levels), rounds=9)


def rfsq_cell(levels: list[int], num_codebooks: int, tokens: int) -> Cell:
    """Compare residual scalar quantization; the peer scales its grids differently, so codes differ."""
    return Cell(
        f"rfsq {num_codebooks} x {'.'.join(map(str, levels))}",
        tokens,
        lambda: ResidualScalarQuantizer(levels, num_codebooks),
        lambda _: theirs.ResidualFSQ(levels=levels, num_quantizers=num_codebooks),
        rounds=9,
        agree=False,
    )


def lfq_cell(bits: int, tokens: int, spherical: bool, rounds: int) -> Cell:
    """Compare binary quantization with the entropy penalty over all codes."""

    def ours() -> Bottleneck:
        if spherical:
            return BinarySphericalQuantizer(bits, temperature=0.01, entropy_group=0)
        return LookupFreeQuantizer(bits)

    def peer(_: Bottleneck) -> nn.Module:
        weight = 0.0 if spherical else 0.25
        return theirs.LFQ(dim=bits, spherical=spherical, commitment_loss_weight=weight)  # type: ignore[no-any-return]

    return Cell(f"{'bsq' if spherical else 'lfq'} {bits} bits", tokens, ours, peer, (), rounds, agree=False)


def cells() -> list[Cell]:
    """List all comparisons."""
    sizes = {1024: (16384, 5), 8192: (8192, 3), 65536: (2048, 3)}
    return [
        *(vq_cell(size, dim, *counts) for size, counts in sizes.items() for dim in (8, 64, 256)),
        vq_cell(1024, 64, 16384, 5, cosine=True),
        learned_cell(1024, 64, 16384),
        sim_cell(8192, 64, 8192, 3),
        rvq_cell(8, 1024, 128, 8192),
        factorized_cell(1024, 9, 4096),
        fsq_cell([8, 5, 5, 5], 131072),
        fsq_cell([8, 8, 8, 5, 5, 5], 131072),
        rfsq_cell([8, 5, 5, 3], 4, 65536),
        lfq_cell(10, 16384, False, 5),
        lfq_cell(14, 2048, False, 3),
        lfq_cell(18, 128, False, 3),
        lfq_cell(14, 2048, True, 3),
        lfq_cell(18, 128, True, 3),
    ]


def draw(cell: Cell, dim: int) -> Tensor:
    """Sample latents `(samples, n, d)`."""
    return torch.randn(SAMPLES, cell.tokens // SAMPLES, dim, generator=torch.Generator().manual_seed(1))


def make(cell: Cell) -> tuple[Bottleneck, nn.Module]:
    """Build both sides."""
    torch.manual_seed(0)
    ours = cell.ours()
    return ours, cell.peer(ours)


def call(side: nn.Module, what: What, latents: Tensor) -> Tensor:
    """Run a step or an encode of either side, and return the codes."""
    side.train(what == "step")
    if what == "encode":
        with torch.no_grad():
            codes: Tensor = side.encode(latents) if isinstance(side, Bottleneck) else side(latents)[1]
            return codes
    side.zero_grad()
    latents = latents.detach().requires_grad_()
    if isinstance(side, Bottleneck):
        lengths = torch.full((len(latents),), latents.shape[1], device=latents.device)
        result = side(latents, lengths, side.depths(latents))
        codes, loss = result.codes, result.latents.sum() + sum(result.penalties.values())
    else:
        # (quantized latents, codes), then losses if there are any
        found = side(latents)
        codes, loss = found[1], found[0].sum() + sum(part.sum() for part in found[2:])
    loss.backward()
    if isinstance(side, Bottleneck):
        side.update()
    return codes


def bare_product(cell: Cell) -> Callable[[], None]:
    """Return a function that computes a cell's bare products into preallocated buffers."""
    rows, columns = TILE
    pairs = [(torch.randn(cell.tokens, dim), torch.randn(size, dim)) for size, dim in cell.products]
    kept = torch.empty(rows * columns)

    def run() -> None:
        for left, right in pairs:
            wide = min(len(right), columns)
            high = len(kept) // wide
            for column in range(0, len(right), wide):
                entries = right[column : column + wide].T
                for row in range(0, len(left), high):
                    part = left[row : row + high]
                    torch.mm(part, entries, out=kept[: len(part) * wide].view(len(part), wide))

    return run


def seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    """Time one call."""
    began = clock()
    run()
    return clock() - began


def check_codes(cell: Cell, ours: Bottleneck, peer: nn.Module, latents: Tensor) -> None:
    """Exit if the codes differ; rounding may change one in a thousand."""
    mine, other = call(ours, "encode", latents), call(peer, "encode", latents)
    share = (mine == other.view(SAMPLES, latents.shape[1], -1).mT).double().mean().item()
    if share < 0.999:
        raise SystemExit(f"{cell.name}: only {share:.2%} of the codes are those of the peer")


def times(cell: Cell, rounds: int, clock: Callable[[], float]) -> dict[str, float]:
    """Time both sides and the bare product in turn; return medians in milliseconds by "side what"."""
    ours, peer = make(cell)
    latents = draw(cell, ours.dim)
    sides = {"ours": ours, "peer": peer}
    if cell.agree:
        check_codes(cell, ours, peer, latents[:, : 8 * WARM_UP])
    whats: tuple[What, ...] = ("step", "encode")
    runs: dict[str, Callable[[], object]] = {
        f"{name} {what}": (lambda side=side, what=what: call(side, what, latents))  # type: ignore[misc]
        for what in whats
        for name, side in sides.items()
    }
    for side in sides.values():
        for what in whats:
            call(side, what, latents[:, :WARM_UP])
    call(ours, "step", latents)
    if cell.products:
        runs["product"] = bare_product(cell)
        runs["product"]()
    found: dict[str, list[float]] = {name: [] for name in runs}
    gc.disable()
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(seconds(run, clock) * 1000)
            gc.collect()
    gc.enable()
    return {name: statistics.median(values) for name, values in found.items()}


def resident(field: str) -> float:
    """Return this process's resident memory (VmRSS) or its peak (VmHWM), in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no {field}; memory is measured on Linux only")


def measure(name: str, side: Side, what: What, threads: int, answer: Connection) -> None:
    """Send the increase of peak resident memory in a first call, in MiB; runs in a separate process."""
    torch.set_num_threads(threads)
    cell = next(cell for cell in cells() if cell.name == name)
    spare = dict(zip(("ours", "peer"), make(cell), strict=True))[side]
    latents = draw(cell, cell.ours().dim)
    call(spare, what, latents[:, :WARM_UP])
    del spare
    used = dict(zip(("ours", "peer"), make(cell), strict=True))[side]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    call(used, what, latents)
    answer.send(resident("VmHWM") - before)


def memory(cell: Cell, threads: int) -> dict[str, float]:
    """Measure the memory of both sides; return MiB by "side what"."""
    context = multiprocessing.get_context("forkserver")
    found = {}
    for side in ("ours", "peer"):
        for what in ("step", "encode"):
            take, give = context.Pipe(duplex=False)
            process = context.Process(target=measure, args=(cell.name, side, what, threads, give))
            process.start()
            give.close()
            found[f"{side} {what}"] = take.recv()
            process.join()
    return found


COLUMNS = "cell what N ours_ms peer_ms product_ms speedup to_product ours_mib peer_mib memory_ratio".split()


def rows_of(cell: Cell, rounds: int, threads: int, clock: Callable[[], float]) -> list[list[str]]:
    """Compare one cell: a row for its step and one for its encode."""
    took, held = times(cell, rounds, clock), memory(cell, threads)
    product = took.get("product")
    rows = []
    for what in ("step", "encode"):
        ours, peer = took[f"ours {what}"], took[f"peer {what}"]
        mine, other = held[f"ours {what}"], held[f"peer {what}"]
        row = [
            f"{ours:.4g}",
            f"{peer:.4g}",
            f"{product:.4g}" if product else "",
            f"{peer / ours:.3g}",
            f"{ours / product:.3g}" if product else "",
            f"{mine:.3g}",
            f"{other:.4g}",
            # Below a MiB the allocator's overhead dominates.
            f"{other / mine:.3g}" if min(mine, other) > 1 else "",
        ]
        rows.append([cell.name, what, str(cell.tokens), *row])
    return rows


def processor() -> str:
    """Return the CPU's model name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    """Run the comparison, print its table and write its CSV."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="prefixes of the cells' names")
    parser.add_argument("--rounds", type=int, help="timed rounds; default: 3 to 9, fewer for slower cells")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cpu", action="store_true", help="measure CPU time instead of wall time; for busy machines")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(options.threads)
    # For the processes that measure memory: a fixed mmap threshold, and libraries preloaded once.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch", "vector_quantize_pytorch"])
    clock = time.process_time if options.cpu else time.perf_counter
    chosen = [cell for cell in cells() if cell.name.startswith(tuple(options.only))]
    if not chosen:
        raise SystemExit(f"--only: no cell has such a prefix; there are {', '.join(cell.name for cell in cells())}")
    told = [
        f"python benchmarks/bottlenecks.py {' '.join(sys.argv[1:])}".rstrip(),
        f"{processor()}, {os.cpu_count()} CPUs; torch {torch.__version__}, {torch.get_num_threads()} threads; "
        f"vector-quantize-pytorch {version('vector-quantize-pytorch')}",
    ]
    rows = []
    print("\n".join(told), "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", sep="\n")
    for cell in chosen:
        for row in rows_of(cell, options.rounds or cell.rounds, options.threads, clock):
            rows.append(row)
            print(f"| {' | '.join(row)} |", flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            file.writelines(f"# {line}\n" for line in told)
            csv.writer(file).writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main()
