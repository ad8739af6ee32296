"""A frozen codec as one TorchScript file with the methods `encode` and `decode`.

One that streams also has `encode_chunk(signal, state)` and `decode_chunk(codes, state)`, which give the next state too,
and `state_sizes(rows, columns)`, of the encoder and of the decoder (of sounds without arguments); the first state is
zeros `(batch, size)`.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .frozen import FrozenStream

__all__ = ["export_torchscript", "load_torchscript"]

WHOLE, CHUNKS = ("encode", "decode", "tokens"), ("encode_chunk", "decode_chunk", "state_sizes")


def export_torchscript(codec: nn.Module, path: Path, metadata: dict[str, str], kept: Sequence[str] = ()) -> None:
    """Script, freeze and save; the metadata goes into the archive as `extra/codec.json`.

    Args:
        codec: A frozen one.
        path: The file.
        metadata: Goes into it.
        kept: Methods and attributes that can be called; where none are named, those of a `FrozenCodec`.
    """
    if not kept:
        kept = WHOLE + (CHUNKS if isinstance(codec, FrozenStream) else ())
    with warnings.catch_warnings():
        # TorchScript is deprecated; it is what C++ and mobile users can load.
        warnings.filterwarnings("ignore", ".*torch.jit.*")
        scripted = torch.jit.freeze(torch.jit.script(codec), preserved_attrs=list(kept))
        torch.jit.save(scripted, path, _extra_files={"codec.json": json.dumps(metadata, sort_keys=True)})


def load_torchscript(path: Path) -> tuple[torch.jit.ScriptModule, dict[str, str]]:
    """Load what `export_torchscript` wrote, and its metadata. TorchScript is code: load only what you trust."""
    extra = {"codec.json": ""}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*")
        module = torch.jit.load(path, map_location="cpu", _extra_files=extra)  # type: ignore[no-untyped-call]
    return module, json.loads(extra["codec.json"])
