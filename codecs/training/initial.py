"""The weights that a run starts from: those of another run, all or parts of them."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from varitok import UserError

from ..build import build, checkpoint_of, misfit, read_checkpoint
from ..codec import Codec
from .config.launch import detect_launch
from .resume import differing

__all__ = ["keep_trainable", "load_initial"]

_log = logging.getLogger(__name__)

CODEBOOK = re.compile(r"(bottleneck\.(?:.+\.)?parts\.)(\d+)\.")  # a codebook of a list, in the name of a weight


def load_initial(codec: Codec, config: DictConfig) -> list[str]:
    """Load the weights of `init_from` into a codec: those of `init_parts`, or all.

    Returns:
        Names of the codebooks that the codec has behind those of `init_from`; they start anew.

    Raises:
        UserError: The weights can't be read or are of another codec, or a part has none.
    """
    path = str(config.init_from)
    saved, changes = _read(path, config)
    built = codec.state_dict()
    parts = OmegaConf.select(config, "init_parts")  # older runs have no such key
    if parts is not None:
        for part in parts:
            if not _within(saved, [part]):
                raise UserError(f"init_parts: {path} has no weights of {part!r}; it has {', '.join(_parts(saved))}")
        saved, built = _within(saved, parts), _within(built, parts)
    added = _added_codebooks(saved, built)
    if odd := misfit(saved, {name: value for name, value in built.items() if not name.startswith(tuple(added))}):
        reason = f"; this run has {changes}" if changes else ""
        raise UserError(f"init_from={path}: its codec isn't the one that this run builds ({odd}){reason}")
    codec.load_state_dict(saved, strict=False)
    if added and not detect_launch().rank:
        _log.info("not in %s, and starting anew: %s", path, ", ".join(name.rstrip(".") for name in added))
    return [name.rstrip(".") for name in added]


def keep_trainable(codec: nn.Module, part: str, added: Sequence[str]) -> list[str]:
    """Return the names that freeze a part of the codec, without the added codebooks in it."""
    if part in added:
        return []
    if not any(name.startswith(f"{part}.") for name in added):
        return [part]
    children = [f"{part}.{name}" for name, _ in codec.get_submodule(part).named_children()]
    return [name for child in children for name in keep_trainable(codec, child, added)]


def _read(path: str, config: DictConfig) -> tuple[dict[str, Tensor], str]:
    """Read a codec's weights of a run, a checkpoint or a bundle, and describe what the run's configuration changes."""
    if path.startswith("hf://") or (Path(path) / "export.json").is_file():
        # `codecs` may not import `export`.
        return build({"_target_": "varitok.export.exporters.rebuild.trainable_state", "path": path}), ""
    state, before = read_checkpoint(checkpoint_of(path))
    return state, differing(before, config, ("codec", "bottleneck", "length"))


def _within(state: dict[str, Tensor], parts: Iterable[str]) -> dict[str, Tensor]:
    """Return the weights of parts."""
    prefixes = tuple(f"{part}." for part in parts)
    return {name: value for name, value in state.items() if f"{name}.".startswith(prefixes)}


def _parts(state: dict[str, Tensor]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in state))


def _added_codebooks(saved: dict[str, Tensor], built: dict[str, Tensor]) -> list[str]:
    """List codebooks, as prefixes of weights' names, that follow those of the saved list."""
    lists = {found[1] for name in saved if (found := CODEBOOK.match(name))}
    there = {found[0] for name in saved if (found := CODEBOOK.match(name))}
    ours = dict.fromkeys(found[0] for name in built if (found := CODEBOOK.match(name)) and found[1] in lists)
    return [codebook for codebook in ours if codebook not in there]
