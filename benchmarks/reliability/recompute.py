"""Memory saved and time added by `training.activation_checkpointing=[encoder,decoder]`.

    python benchmarks/reliability/recompute.py --out benchmarks/results/reliability/recompute.csv

For image (transformer), audio and video codecs (convolutions): megabytes that the forward pass stores for the backward
pass, without parameters, and seconds of both passes. Plain and recomputed run in turn; times are medians.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout / ".pkg")

import hydra  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from varitok import __version__  # noqa: E402
from varitok.codecs.build import build_codec  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.codecs.training.activation_checkpointing import ActivationCheckpointing  # noqa: E402

__all__ = ["main"]

RUNS = {
    "image/one_d_piece_64": (4, 3, 128, 128),
    "audio/dac_small": (2, 1, 16384),
    "video/cosmos_small": (2, 3, 9, 32, 32),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    words = sys.argv[1:] if arguments is None else arguments
    header = {
        "command": shlex.join(["python", "benchmarks/reliability/recompute.py", *words]),
        "versions": f"varitok {__version__}, torch {torch.__version__}, 1 thread",
    }
    rows = []
    for name, size in RUNS.items():
        rows.append(_compared(name, size, options.rounds))
        print(*(f"{key} {value}" for key, value in rows[-1].items()), sep=", ", flush=True)
        write_rows(options.out, header, rows)


def _compared(name: str, size: tuple[int, ...], rounds: int) -> dict[str, object]:
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        codec = build_codec(
            hydra.compose("train", [f"experiment={name}", "data.root=."] if "dac" in name else [f"experiment={name}"])
        )
    signal = torch.rand(size) * 2 - 1
    choices = {"plain": [], "recomputed": [codec.encoder, codec.decoder]}
    kept = {choice: _kept(codec, parts, signal) / 1e6 for choice, parts in choices.items()}
    times: dict[str, list[float]] = {choice: [] for choice in choices}
    for _ in range(rounds):
        for choice, parts in choices.items():
            began = time.perf_counter()
            with ActivationCheckpointing(parts):
                loss = codec(signal).signal.square().mean()
            loss.backward()
            times[choice].append(time.perf_counter() - began)
    seconds = {choice: statistics.median(found) for choice, found in times.items()}
    return {
        "codec": name,
        "batch": " x ".join(map(str, size)),
        "megabytes, plain": kept["plain"],
        "megabytes, recomputed": kept["recomputed"],
        "share kept": kept["recomputed"] / kept["plain"],
        "time, recomputed over plain": seconds["recomputed"] / seconds["plain"],
    }


def _kept(codec: nn.Module, parts: list[nn.Module], signal: Tensor) -> int:
    """Count the bytes stored for the backward pass, except parameters and buffers."""
    own = {one.untyped_storage().data_ptr() for one in (*codec.parameters(), *codec.buffers())}
    held: dict[int, Tensor] = {}  # references, so that no address is reused

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), ActivationCheckpointing(parts):
        codec(signal)
    return sum(tensor.untyped_storage().nbytes() for place, tensor in held.items() if place not in own)


if __name__ == "__main__":
    main()
