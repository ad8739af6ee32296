"""The folder of a bundle: its atomic replacement, config.json and export.json."""

import contextlib
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from varitok import UserError, __version__

from ..runtime.bundle import FORMAT_VERSION, read_json, sha256
from .onnx import OPSET
from .parity import Parity
from .tiles import TiledParity

__all__ = ["add", "describe", "replace_folder", "report", "write_json"]


@contextlib.contextmanager
def replace_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `folder`, which replaces `folder` on success and is removed on failure."""
    folder = folder.resolve()
    if folder.exists() and not (folder / "export.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: exists and is not a bundle; name another folder")
    partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "old"))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror}); name another folder") from error
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        try:
            partial.rename(folder)
        except OSError:
            if old.exists():
                old.rename(folder)
            raise
    except OSError as error:
        raise UserError(f"{folder}: can't be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def describe(folder: Path, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Write config.json; return the metadata of every graph."""
    write_json(folder / "config.json", config)
    return {
        "codec.format_version": str(FORMAT_VERSION),
        "codec.role": "codec",
        "codec.config": json.dumps(config, sort_keys=True),
        "codec.weights_sha256": _weights_sha256(weights),
        "codec.torch": str(torch.__version__),
        "codec.library_version": __version__,
    }


def report(
    folder: Path,
    parity: Mapping[str, Parity],
    memory: Mapping[str, Sequence[float]] = MappingProxyType({}),
    tiles: TiledParity | None = None,
) -> dict[str, Any]:
    """Write export.json, after all other files; return its contents.

    Args:
        folder: The bundle's folder.
        parity: Each file's agreement with the codec.
        memory: The graphs' memory (`memory.py`).
        tiles: The agreement of tiles with whole images, if measured (`tiles.py`).
    """
    contents: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "parity": {name: result._asdict() for name, result in parity.items()},
        "memory": dict(memory),
        **({"tiles": tiles._asdict()} if tiles else {}),
        "files": _files(folder, folder),
        "versions": {"varitok": __version__, "python": platform.python_version()}
        | {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript", "safetensors")},
        "opset": OPSET,
    }
    write_json(folder / "export.json", contents)
    return contents


def add(folder: Path, name: str) -> None:
    """Update export.json with the files that a subfolder of the bundle has now."""
    contents = read_json(folder / "export.json")
    others = {key: value for key, value in contents["files"].items() if not key.startswith(f"{name}/")}
    write_json(folder / "export.json", contents | {"files": others | _files(folder, folder / name)})


def _files(folder: Path, part: Path) -> dict[str, dict[str, Any]]:
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(part.rglob("*"))
        if path.is_file()
    }


def _weights_sha256(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and values of weights, independently of the file format."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file of a bundle."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
