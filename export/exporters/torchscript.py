"""Export of a frozen codec to one TorchScript file with the methods `encode` and `decode`.

A streaming codec also has `encode_chunk(signal, state)` and `decode_chunk(codes, state)`, which return the next state
too. `state_sizes(rows, columns)` returns the state sizes of encoder and decoder; audio needs no arguments. The first
state is zeros `(batch, size)`. A codec that samples also has `sample(codes, noise)`.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .frozen import FrozenGenerator, FrozenStream

__all__ = ["export_torchscript", "load_torchscript"]

WHOLE, CHUNKS = ("encode", "decode", "tokens"), ("encode_chunk", "decode_chunk", "state_sizes")


def export_torchscript(codec: nn.Module, path: Path, metadata: dict[str, str], kept: Sequence[str] = ()) -> None:
    """Script, freeze and save a codec; the archive has the metadata as `extra/codec.json`.

    Args:
        codec: The frozen codec.
        path: Path of the file.
        metadata: Metadata to store in it.
        kept: Methods and attributes to keep in the file; by default those of a `FrozenCodec`.
    """
    if not kept:
        kept = (*WHOLE, *(CHUNKS if isinstance(codec, FrozenStream) else ()))
        kept += ("sample",) if isinstance(codec, FrozenGenerator) else ()
    with warnings.catch_warnings():
        # TorchScript is deprecated; it is what C++ and mobile users can load.
        warnings.filterwarnings("ignore", ".*torch.jit.*")
        scripted = torch.jit.freeze(torch.jit.script(codec), preserved_attrs=list(kept))
        torch.jit.save(scripted, path, _extra_files={"codec.json": json.dumps(metadata, sort_keys=True)})


def load_torchscript(path: Path) -> tuple[torch.jit.ScriptModule, dict[str, str]]:
    """Load a file of `export_torchscript` and its metadata. TorchScript is code: load only files that you trust."""
    extra = {"codec.json": ""}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*")
        module = torch.jit.load(path, map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
    return module, json.loads(extra["codec.json"])
