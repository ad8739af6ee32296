"""Files of published weights: pickles of torch, safetensors, folders of transformers or diffusers, even in shards."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from varitok import UserError

__all__ = ["Source", "read_source", "shorten"]

FILES = ("model.safetensors", "pytorch_model.bin", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
INDEXES = tuple(f"{name}.index.json" for name in FILES)  # of sharded weights
WHOLE = (*FILES, "weights.pth")
PLAIN = ("state_dict", "best_state", "model_state_dict", "model", "generator")  # names of weights in a pickle
DIRECTIONS = ("weight_v", "parametrizations.weight.original1")  # weight norm's, in torch's older and newer form
AVERAGED = ("ema", "ema_state_dict", "model_ema", "ema_model")


class Source:
    """Published weights by name; tensors are read one at a time, from a file that is mapped into memory.

    Args:
        path: File or folder, for messages.
        shapes: Shape of each tensor.
        read: Function that returns the tensor of a name.
        config: Sizes that the file or a config.json beside it states; empty if there are none.
        notes: What a user should know about the file.

    Attributes:
        taken: Names that have been read.
    """

    def __init__(
        self,
        path: Path,
        shapes: Mapping[str, tuple[int, ...]],
        read: Callable[[str], Tensor],
        config: Mapping[str, Any],
        notes: list[str],
    ) -> None:
        self.path = path
        self.shapes = dict(shapes)
        self.config = dict(config)
        if "sample_rate" in config:
            self.config.setdefault("sampling_rate", config["sample_rate"])
        self.notes = notes
        self.taken: set[str] = set()
        self._read = read

    def renamed(self, rename: Callable[[str], str]) -> "Source":
        """Return the same weights under other names."""
        names = {rename(name): name for name in self.shapes}
        shapes = {new: self.shapes[old] for new, old in names.items()}
        return Source(self.path, shapes, lambda name: self._read(names[name]), self.config, self.notes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor.

        Raises:
            UserError: There is none of this name.
        """
        if name not in self.shapes:
            raise UserError(f"{self.path}: lacks {name}")
        return self.shapes[name]

    def weight_shape(self, module: str) -> tuple[int, ...]:
        """Return the shape of a module's weight, which may have weight norm.

        Raises:
            UserError: The module has none.
        """
        forms = [f"{module}.{name}" for name in (*DIRECTIONS, "weight")]
        return self.shape(next((name for name in forms if name in self.shapes), forms[-1]))

    def count(self, pattern: str) -> int:
        """Return the number of tensors whose names match a regular expression as a whole."""
        return sum(re.fullmatch(pattern, name) is not None for name in self.shapes)

    def take(self, name: str) -> Tensor:
        """Return a tensor, floating-point ones in float32, and mark it as read.

        Raises:
            UserError: The file is damaged.
        """
        self.taken.add(name)
        try:
            value = self._read(name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise UserError(f"{self.path}: {name} can't be read; the file is damaged, copy it again") from error
        return value.float() if value.is_floating_point() else value


def read_source(path: Path, weights: str | None = None) -> Source:
    """Open published weights.

    Pickles are read as data: code in them is not run (`weights_only=True`).

    Args:
        path: A file, or a folder with weights and perhaps a config.json.
        weights: Which of several sets of weights in a pickle to take; None: the moving average, if there is one.

    Raises:
        UserError: There is no such file, it is damaged, is no file of weights, or contains code.
    """
    if path.is_dir():
        files = _shards(path)
    elif path.is_file():
        files = [path]
    else:
        raise UserError(f"{path}: no such file or folder")
    notes: list[str] = []
    shapes: dict[str, tuple[int, ...]] = {}
    readers: dict[str, Callable[[str], Tensor]] = {}
    config = _config(path if path.is_dir() else path.parent)
    halves: set[str] = set()
    for file in files:
        for name, shape, kind, read in _open(file, weights, notes, config):
            shapes[name], readers[name] = shape, read
            halves |= {kind} & {"F16", "BF16", "torch.float16", "torch.bfloat16"}
    if not shapes:
        raise UserError(f"{path}: holds no weights")
    if halves:
        notes.append("weights of half precision, computed with in float32: codes may differ from the full weights'")
    return Source(path, shapes, lambda name: readers[name](name), config, notes)


def _shards(folder: Path) -> list[Path]:
    """List a folder's files of weights."""
    for name in INDEXES:
        if (folder / name).is_file():
            files = sorted(set(_json(folder / name).get("weight_map", {}).values()))
            if missing := [file for file in files if not (folder / file).is_file()]:
                raise UserError(f"{folder}: lacks {missing[0]}, which {name} lists")
            return [folder / file for file in files]
    for name in WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    raise UserError(f"{folder}: has none of {', '.join((*WHOLE, *INDEXES))}; name the file of weights itself")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not JSON ({type(error).__name__}); copy it again") from error
    return found if isinstance(found, dict) else {}


def _config(folder: Path) -> dict[str, Any]:
    return _json(folder / "config.json") if (folder / "config.json").is_file() else {}


_Entry = tuple[str, tuple[int, ...], str, Callable[[str], Tensor]]


def _open(file: Path, weights: str | None, notes: list[str], config: dict[str, Any]) -> Iterator[_Entry]:
    """List a file's tensors: name, shape, type, and how to read it."""
    if file.suffix == ".safetensors":
        yield from _open_safetensors(file)
        return
    for name, value in _open_pickle(file, weights, notes, config).items():
        yield name, tuple(value.shape), str(value.dtype), partial(_same, value)


def _same(value: Tensor, name: str) -> Tensor:
    return value


def _open_safetensors(file: Path) -> Iterator[_Entry]:
    try:
        opened: Any = safe_open(file, "pt")
        for name in opened.keys():
            part = opened.get_slice(name)
            yield name, tuple(part.get_shape()), part.get_dtype(), opened.get_tensor
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged, or not a safetensors file ({error}); copy it again") from error


def _open_pickle(file: Path, weights: str | None, notes: list[str], config: dict[str, Any]) -> dict[str, Tensor]:
    try:
        try:
            saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap" not in str(error):
                raise
            saved = torch.load(file, map_location="cpu", weights_only=True)  # of torch before 1.6
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError, ValueError and more
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise UserError(f"{file}: holds more than weights, which isn't run; save its state dict alone") from error
        raise UserError(f"{file}: damaged, or not a file of weights ({type(error).__name__}); copy it again") from error
    if not isinstance(saved, Mapping):
        raise UserError(f"{file}: holds a {type(saved).__name__}, not a state dict")
    metadata = saved.get("metadata")  # of descript-audio-codec
    if isinstance(metadata, Mapping):
        config |= dict(metadata.get("kwargs") or {})
    return _choose(file, saved, weights, notes)


def _choose(file: Path, saved: Mapping[str, Any], weights: str | None, notes: list[str]) -> dict[str, Tensor]:
    """Return one set of weights of a pickle, the moving average if nothing else is asked for."""
    sets = {name: _tensors(saved[name]) for name in (*AVERAGED, *PLAIN) if isinstance(saved.get(name), Mapping)}
    sets = {name: found for name, found in sets.items() if found}
    if weights is not None and weights not in sets:
        raise UserError(f"{file}: has no weights {weights!r}; it has {', '.join(sets) or 'a single set'}")
    if not sets:
        return _tensors(saved)
    chosen = weights or next(iter(sets))
    if len(sets) > 1:
        others = ", ".join(name for name in sets if name != chosen)
        notes.append(f"took the weights {chosen!r}, not {others}; --weights chooses")
    return sets[chosen]


def shorten(names: list[str]) -> str:
    """Return a list of names as text, the first few if it is long."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _tensors(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {str(name): value for name, value in found.items() if isinstance(value, Tensor)}
