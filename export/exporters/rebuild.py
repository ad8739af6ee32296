"""A bundle's codec as a torch module again, built from data alone: config.json and model.safetensors."""

import importlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.renamed import CLASSES, modernize, new_state

from ..runtime.bundle import REEXPORT_HINT, read_config, read_json, sha256
from ..runtime.hub import download
from .frozen import FrozenCodec, freeze

__all__ = ["WEIGHTS", "frozen_of", "rebuild", "shapes_of", "trainable_state"]

WEIGHTS = "model.safetensors"
PARTS = ("networks", "bottlenecks", "lengths", "implicit")  # folders of `varitok.codecs` with parts of codecs
SPARE = 1 << 24  # elements that a codec may have beside its weights: tables, masks


def rebuild(path: str | PathLike[str]) -> FrozenCodec:
    """Rebuild a bundle's codec.

    Args:
        path: The bundle's folder.

    Returns:
        A module in evaluation mode with `encode(signal)` and `decode(codes)`, as in the bundle's TorchScript. Its
        parameters require no gradient until `requires_grad_()` is called.

    Raises:
        UserError: A file is missing, altered or of an unknown format, or names a class that this varitok lacks.
    """
    folder = Path(path)
    config = read_config(folder)
    weights = _weights(folder)
    try:
        frozen = frozen_of(config, weights)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    frozen.load_state_dict({new_state(name): value for name, value in load_file(folder / WEIGHTS).items()})
    return frozen


def frozen_of(config: Mapping[str, Any], weights: Mapping[str, tuple[int, ...]]) -> FrozenCodec:
    """Build the codec that a bundle's config.json describes, with initial weights.

    Args:
        config: Contents of the bundle's config.json.
        weights: Shapes of the weights to be loaded, by name.

    Raises:
        UserError: The codec can't be built, or its weights have other names or shapes.
    """
    if config.get("modality") == "clip":
        raise UserError("a bundle of one clip can't be rebuilt; use its codec.ts, or varitok.load")
    if not isinstance(config.get("architecture"), Mapping):
        raise UserError(f"config.json doesn't say how its codec was built; {REEXPORT_HINT}")
    count = sum(math.prod(shape) for shape in weights.values())
    try:
        with _Bounded(2 * count + SPARE):
            frozen = freeze(_codec_of(config), "streaming" in config)
    except UserError as error:
        raise UserError(f"config.json: {error}") from error
    except Exception as error:  # a constructor may raise anything on arguments that it doesn't expect
        raise UserError(f"config.json: its codec can't be built ({error}); {REEXPORT_HINT}") from error
    expected = {name: tuple(value.shape) for name, value in frozen.state_dict().items()}
    if expected != weights:
        odd = next(name for name in sorted({*expected, *weights}) if expected.get(name) != weights.get(name))
        raise UserError(f"{WEIGHTS}: {odd} is not as config.json has it; {REEXPORT_HINT}")
    return frozen.eval()


def trainable_state(path: str | PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of the codec that a bundle was exported from, to train it further.

    Args:
        path: The bundle's folder; or `hf://OWNER/NAME`, as for `varitok.load`.

    Raises:
        UserError: See `rebuild`; or the bundle lacks weights that its bottleneck trains.
    """
    folder = download(str(path).removeprefix("hf://")) if str(path).startswith("hf://") else Path(path)
    frozen, codec = rebuild(folder), _codec_of(read_config(folder))
    for name in ("encoder", "project_in", "project_out", "decoder"):
        _unfold(codec.get_submodule(name), frozen.get_submodule(name).state_dict())
    if frozen.masks and isinstance(token := codec.length.mechanism.fill(), nn.Parameter):
        token.data.copy_(frozen.mask_token)
    try:
        codec.bottleneck.thaw(frozen.bottleneck)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from error
    return codec.state_dict()


def _codec_of(config: Mapping[str, Any]) -> Codec:
    """Build the codec that a bundle's config.json describes, with initial weights."""
    return build_codec(OmegaConf.create(_targets(modernize(config["architecture"]))))


@torch.no_grad()
def _unfold(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Set a module's weights, parametrized ones to what folds to the given."""
    for name, value in weights.items():
        owner, _, own = name.rpartition(".")
        part = module.get_submodule(owner)
        if parametrize.is_parametrized(part, own):
            setattr(part, own, value)
        else:
            getattr(part, own).copy_(value)


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A dispatch mode that refuses to create tensors of more than `most` elements."""

    def __init__(self, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.most = most

    def __torch_dispatch__(self, call: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        size = args[0] if args else None
        if (
            isinstance(size, list | tuple)
            and all(isinstance(side, int) for side in size)
            and math.prod(size) > self.most
        ):
            raise UserError(
                f"asks for a tensor of {math.prod(size)} elements, far more than its weights have; {REEXPORT_HINT}"
            )
        return call(*args, **(kwargs or {}))


def _weights(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a bundle's weights, after verifying the file's checksum."""
    path, files = folder / WEIGHTS, read_json(folder / "export.json").get("files") or {}
    if not path.is_file():
        raise UserError(f"{path}: missing; {REEXPORT_HINT}, with safetensors among its formats")
    if sha256(path) != (files.get(WEIGHTS) or {}).get("sha256"):
        raise UserError(f"{path}: altered since it was exported; copy the bundle anew or {REEXPORT_HINT}")
    return shapes_of(path)


def shapes_of(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights in a file, without reading them.

    Raises:
        UserError: It can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return {new_state(name): tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: can't be read ({error}); {REEXPORT_HINT}") from error


def _targets(node: Any) -> Any:
    """Convert an architecture to a configuration: `type`, the name of a class, becomes its `_target_`."""
    if isinstance(node, Mapping):
        found = {str(key): _targets(value) for key, value in node.items() if key not in ("type", "partial")}
        if any(key.startswith("_") for key in found):
            raise UserError(f"architecture: {next(key for key in found if key.startswith('_'))} is no argument")
        if "type" not in node:
            return found
        name = CLASSES.get(node["type"], node["type"])
        if name not in _list_classes():
            raise UserError(f"architecture: this varitok has no {node['type']!r}; update it or {REEXPORT_HINT}")
        return found | {"_target_": _list_classes()[name]} | ({"_partial_": True} if node.get("partial") else {})
    return [_targets(value) for value in node] if isinstance(node, list) else node


@cache
def _list_classes() -> dict[str, str]:
    """Map each public name in the modules of `varitok.codecs` to its import path."""
    found: dict[str, str] = {}
    for name in _modules():
        module = importlib.import_module(f"varitok.codecs.{name}")
        found |= {each: f"varitok.codecs.{name}.{each}" for each in getattr(module, "__all__", ())}
    return found


def _modules() -> Iterator[str]:
    root = Path(importlib.import_module("varitok.codecs.codec").__file__ or "").parent
    for path in sorted([*root.glob("*.py"), *(path for part in PARTS for path in (root / part).rglob("*.py"))]):
        yield ".".join(path.relative_to(root).with_suffix("").parts)
