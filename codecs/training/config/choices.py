"""Options of groups that a command line chooses in the place of an experiment's. This module doesn't import torch."""

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

__all__ = ["drop_foreign"]

_log = logging.getLogger(__name__)

GROUPS = ("bottleneck", "data", "length")  # each file of these has all keys of its option


def drop_foreign(config: DictConfig, words: Sequence[str], folders: Sequence[Path]) -> None:
    """Remove in place, and log, the keys that the options chosen on a command line don't have.

    An experiment sets them for the option that it chose itself, such as `bottleneck.num_codebooks` for `rvq`.

    Args:
        config: The composed configuration.
        words: Overrides of the command line; keys that these set stay.
        folders: Folders of configurations.
    """
    chosen = dict(word.partition("=")[::2] for word in words)
    given = {".".join(word.lstrip("+").partition("=")[0].split(".")[:2]) for word in words}
    dropped = []
    for group in GROUPS:
        own = _keys([folder / group for folder in folders], chosen[group]) if group in chosen else set()
        if own and OmegaConf.is_dict(config.get(group)):
            foreign = [str(key) for key in config[group] if key not in own and f"{group}.{key}" not in given]
            with open_dict(config[group]):
                for key in foreign:
                    del config[group][key]
            dropped += [f"{group}.{key}" for key in foreign]
    if dropped:
        _log.info("without %s, which the experiment sets for another option", ", ".join(dropped))


def _keys(folders: Sequence[Path], option: str) -> set[str]:
    """Return the keys of an option's file and of those that it begins with; none if there is no such file."""
    path = next((path for folder in folders if (path := folder / f"{option}.yaml").is_file()), None)
    if path is None:
        return set()
    node = OmegaConf.load(path)
    assert isinstance(node, DictConfig)
    keys = {str(key) for key in node}
    for word in node.get("defaults", []):
        if isinstance(word, str) and word != "_self_":
            name, _, package = word.partition("@")
            keys |= {package} if package else _keys(folders, name)
    return keys
