"""Build objects from configurations; the only module that resolves `_target_`."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, get_type_hints

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from varitok import UserError

from .codec import Codec
from .conversion import ANY, RANGES, convert
from .renamed import modernize, new_key, new_state, new_target

__all__ = [
    "build",
    "build_codec",
    "check_values",
    "checkpoint_of",
    "load_run",
    "misfit",
    "open_checkpoint",
    "read_checkpoint",
]

ALLOWED = ("varitok.", "torch.optim.", "pytorch_lightning.callbacks.", "pytorch_lightning.loggers.")
TOO_LARGE = ("allocate memory", "Storage size", "Maximum allowed dimension", "array is too big")  # torch's, NumPy's
SWITCHES = ("_target_", "_partial_", "_recursive_", "_convert_")


def build(config: Any, **extra: Any) -> Any:
    """Build the object that a configuration names by `_target_`, and those nested in it.

    Targets are restricted to this package, torch's optimizers, and Lightning's callbacks and loggers. Arguments are
    checked against the targets' signatures before anything is built. An integer may be written as `1e3`.

    Args:
        config: A mapping with `_target_`; without one it is returned as plain containers, None as None.
        extra: Further arguments of the outermost target, by name, passed on unchanged.

    Raises:
        UserError: A target is not allowed or doesn't exist, an argument is unknown or of a wrong type, or a
            constructor failed (`__cause__` is its error).
    """
    plain = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else config
    if plain is None:
        return None
    where = (config._get_full_key(None) if isinstance(config, DictConfig) else "") or "config"
    plain = _check(plain, where, extra)
    try:
        if not isinstance(plain, dict) or "_target_" not in plain:
            return instantiate(plain, _convert_="all")
        # Hydra would copy the extra arguments, and resolve any `_target_` in them.
        make = instantiate({**plain, "_partial_": True}, _convert_="all")
        return partial(make, **extra) if plain.get("_partial_") else make(**extra)
    except UserError:
        raise
    except Exception as error:
        message = _explain(error, where)
        raise message from (message.__cause__ or error.__cause__ or error)


def build_codec(config: DictConfig) -> Codec:
    """Build a run's codec from the configuration groups `codec`, `bottleneck` and `length`."""
    codec = build(config.codec, bottleneck=build(config.bottleneck), length=build(config.length))
    if not isinstance(codec, Codec):
        raise UserError(f"codec: {type(codec).__name__} is not a codec")
    return codec


def checkpoint_of(path: str | Path) -> Path:
    """Return the path of the last checkpoint of a run's folder; a checkpoint's own path is returned unchanged.

    Raises:
        UserError: There is no checkpoint.
    """
    path = Path(path)
    checkpoint = path / "checkpoints" / "last.ckpt" if path.is_dir() else path
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; name a run's folder or a .ckpt file")
    return checkpoint


def open_checkpoint(path: Path, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read a checkpoint: the training module's state dict, and the run's configuration under its current names.

    No code in the file is executed (`weights_only=True`).

    Args:
        path: The file.
        options: Further options of `torch.load`.

    Raises:
        UserError: The file is not a varitok checkpoint, or is damaged.
    """
    try:
        saved = torch.load(path, weights_only=True, **options)
        return saved["state_dict"], modernize(saved["varitok"]["config"])
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError and more
        raise UserError(f"{path}: not a varitok checkpoint, or a damaged one ({type(error).__name__})") from error


def read_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], DictConfig]:
    """Read a checkpoint: the codec's state dict (of the EMA if there is one) and the run's configuration.

    Raises:
        UserError: The file is not a varitok checkpoint, or is damaged.
    """
    state, config = open_checkpoint(path, map_location="cpu")
    prefix = "average.codec." if any(name.startswith("average.codec.") for name in state) else "codec."
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    return {new_state(name): value for name, value in own.items()}, OmegaConf.create(config)


def misfit(saved: Mapping[str, torch.Tensor], built: Mapping[str, torch.Tensor]) -> str:
    """Describe the first weight, by name, that isn't the same in two state dicts; empty if they fit.

    >>> misfit({"bias": torch.zeros(2)}, {"bias": torch.zeros(3)})
    'bias has the shape [2], not [3]'
    """
    for name in sorted({*saved, *built}):
        if name not in saved or name not in built:
            return f"{name} is {'missing' if name in built else 'one too many'}"
        shapes = list(saved[name].shape), list(built[name].shape)
        if shapes[0] != shapes[1]:
            return f"{name} has the shape {shapes[0]}, not {shapes[1]}"
    return ""


def load_run(path: str | Path) -> tuple[Codec, DictConfig]:
    """Load a run's codec, in evaluation mode on the CPU, and its configuration, from a run's folder or checkpoint.

    Raises:
        UserError: There is no checkpoint, it can't be read, or its weights are of another version's codec.
    """
    checkpoint = checkpoint_of(path)
    state, config = read_checkpoint(checkpoint)
    codec = build_codec(config)
    if odd := misfit(state, codec.state_dict()):
        raise UserError(f"{checkpoint}: doesn't fit this varitok's codec, another version trained it ({odd})")
    codec.load_state_dict(state)
    return codec.eval(), config


def _explain(error: Exception, where: str) -> UserError:
    """Unwrap a constructor's error from Hydra's, and add its configuration key; return a UserError unchanged."""
    if isinstance(error, InstantiationException):
        inner = [line.removeprefix("full_key: ") for line in str(error).splitlines() if line.startswith("full_key: ")]
        where = ".".join([where, *inner])
    cause: BaseException = error
    while not isinstance(cause, UserError) and isinstance(cause, InstantiationException) and cause.__cause__:
        cause = cause.__cause__
    if isinstance(cause, UserError):
        return cause
    text = next((line for line in str(cause).splitlines() if line.strip()), "")
    if isinstance(cause, MemoryError) or any(words in text for words in TOO_LARGE):
        return UserError(f"{where}: is too large for the memory of this machine")
    return UserError(f"{where}: {type(cause).__name__}: {text} (HYDRA_FULL_ERROR=1 shows where)")


def check_values(found: Callable[..., Any], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Convert the arguments of a class or function to the annotated types, and check their ranges.

    Args:
        found: The class or function.
        given: Plain values by argument name.
        where: Key of the configuration that holds them; empty for its root.

    Raises:
        UserError: A value doesn't fit its annotation, or is out of range.
    """
    try:
        hints = get_type_hints(found.__init__ if inspect.isclass(found) else found, include_extras=True)
    except (NameError, TypeError):  # annotations that only a type checker can resolve
        hints = {}
    ranges = RANGES if found.__module__.startswith("varitok.") else ANY
    return {
        key: convert(value, hints[key], f"{where}.{key}".lstrip("."), ranges) if key in hints else value
        for key, value in given.items()
    }


def _check(node: Any, where: str, extra: Mapping[str, Any]) -> Any:
    """Check every target and its arguments' names, and convert their values to the annotated types."""
    if isinstance(node, Mapping):
        node = {key: _check(value, f"{where}.{key}", {}) for key, value in node.items()}
        return _check_call(node, where, extra) if "_target_" in node else node
    if isinstance(node, list | tuple):
        return [_check(value, f"{where}[{index}]", {}) for index, value in enumerate(node)]
    return node


def _check_call(node: dict[str, Any], where: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    found = _find(node["_target_"], where)
    name = str(node["_target_"]).rpartition(".")[2]
    given = {key: value for key, value in node.items() if key not in SWITCHES}
    known = inspect.signature(found).parameters
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    for key in (*given, *extra):
        if key.startswith("_") or (key not in known and not open_ended):
            if (now := new_key(key, node["_target_"], where)) in known:
                raise UserError(f"{where}.{key}: is called {now} now")
            near = get_close_matches(key, [name for name in known if name not in extra], n=3)
            raise UserError(
                f"{where}.{key}: {name} takes no such argument"
                + (f"; did you mean {' or '.join(near)}?" if near else f"; it takes {', '.join(known) or 'none'}")
            )
    node |= check_values(found, given, where)
    for key, parameter in known.items():
        named = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        needed = named and parameter.default is parameter.empty and not node.get("_partial_")
        if needed and key not in given and key not in extra:
            raise UserError(f"{where}.{key}: {name} needs this argument")
    return node


def _find(target: Any, where: str) -> Callable[..., Any]:
    """Import the class or function of a `_target_`, if it is allowed."""
    if not isinstance(target, str) or not target.startswith(ALLOWED):
        raise UserError(f"{where}._target_={target}: only {', '.join(ALLOWED)}* may be named")
    parts = target.split(".")
    found: Any = import_module(parts[0])
    for count, part in enumerate(parts[1:], start=2):
        path = ".".join(parts[:count])
        # `varitok.data.datasets.images` is a module to import, `.image_folder` an attribute of it.
        if not hasattr(found, part):
            try:
                import_module(path)
            except ModuleNotFoundError as error:
                if error.name and not path.startswith(error.name):
                    raise UserError(f"{where}._target_={target}: needs {error.name}, which is not installed") from error
        found = getattr(found, part, None)
        if found is None:
            now = new_target(target)
            message = "there is no such class or function" if now == target else f"is {now} now"
            raise UserError(f"{where}._target_={target}: {message}")
    # Check the module that defines the object too: an allowed module may have imported it from elsewhere.
    if not callable(found) or not f"{getattr(found, '__module__', '')}.".startswith(ALLOWED):
        raise UserError(f"{where}._target_={target}: not a class or function of {parts[0]}'s own")
    return found  # type: ignore[no-any-return]
