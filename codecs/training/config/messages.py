"""One-line messages, with near matches, for errors of Hydra and OmegaConf. This module doesn't import torch."""

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from varitok import UserError, configs

from ...renamed import OPTIONS, new_keys

__all__ = ["HERE", "command_line", "explain", "groups", "no_such_key", "one_line", "paths"]

HERE = Path(str(configs.__file__)).parent
LISTED = 60  # maximum number of names listed in a message


def explain(error: Exception) -> str:
    """Summarize an error of Hydra, OmegaConf or varitok in one line."""
    if isinstance(error, UserError):
        # A loader's worker sends its error as a traceback that ends with the message.
        return one_line(error) if "\n" not in str(error) else str(error).strip().splitlines()[-1].split("Error: ")[-1]
    if isinstance(error, OverrideParseException):
        return f"{error.override}: can't be read; give KEY=VALUE, and quote a value that has special signs"
    words, folders = command_line()
    if isinstance(error, MissingConfigException):
        return _explain_missing(error, folders)
    found = re.search(r"Could not (override|delete)[^']*'([^']+)'", str(error))
    if found is None:
        return one_line(error)
    key = found[2].removeprefix("~")
    if key in groups(folders):
        return f"{key}: there is no group {key} to choose in this configuration; set its values, as {key}.KEY=VALUE"
    known = [*groups(folders), *_keys([word for word in words if not word.lstrip("+~").startswith(key)])]
    same_depth = list(dict.fromkeys(name for name in known if name.rpartition(".")[0] == key.rpartition(".")[0]))
    return no_such_key(key, known, same_depth, "no such key or group")


def no_such_key(key: str, known: list[str], listed: list[str], what: str = "no such key") -> str:
    """Return the message for an unknown key: its new name, near matches, or the existing keys.

    Args:
        key: The whole key.
        known: Whole keys to search for near matches.
        listed: Keys to list if there is no near match.
        what: Description of the mistake.
    """
    before, point, old = key.rpartition(".")
    if now := sorted(name for name in new_keys(old) if f"{before}{point}{name}" in known):
        return f"{key}: is called {now[0]} now"
    return f"{key}: {what}" + _did_you_mean(_near(key, known), listed)


def _explain_missing(error: MissingConfigException, folders: list[Path]) -> str:
    name = (error.missing_cfg_file or "").removesuffix(".yaml")
    group = next((group for group in groups(folders) if name.startswith(f"{group}/")), None)
    if group is None:
        group, _, name = name.rpartition("/")
        if not group:
            known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
            return f"--config-name {name}: no such configuration" + _did_you_mean(_near(name, known), known)
        known = [str(option) for option in error.options or []]
    else:
        name = name.removeprefix(f"{group}/")
        known = [option for option in _options(group, folders) if not option.startswith("base/")]  # parts of others
    if now := OPTIONS.get(group, {}).get(name):
        return f"{group}={name}: is called {group}={now} now"
    near = [f"{group}={option}" for option in _near(name, known)]
    return f"{group}={name}: no such option" + _did_you_mean(near, []) + _have(known)


def command_line() -> tuple[list[str], list[Path]]:
    """Return the overrides and the configuration folders of the command line."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-path", "-cp")
    parser.add_argument("--config-name", "-cn")
    known, rest = parser.parse_known_args(sys.argv[1:])
    folders = [Path(known.config_dir)] if known.config_dir else []
    return [word for word in rest if not word.startswith("-")], [*folders, HERE]


def groups(folders: Iterable[Path]) -> list[str]:
    """List the configuration groups: folders with YAML files."""
    return sorted({path.name for folder in folders for path in folder.iterdir() if any(path.rglob("*.yaml"))})


def _options(group: str, folders: list[Path]) -> list[str]:
    """List the options of a group."""
    roots = [folder / group for folder in folders]
    return sorted(
        {path.relative_to(root).with_suffix("").as_posix() for root in roots for path in root.rglob("*.yaml")}
    )


def _keys(words: list[str]) -> list[str]:
    """List the keys of the configuration composed from overrides `words`; if that fails, from train.yaml alone."""
    _, folders = command_line()
    search = [f"hydra.searchpath=[{','.join(f'file://{folder.absolute()}' for folder in folders[:-1])}]"]
    for overrides in ([*words, *(search if folders[:-1] else [])], []):
        try:
            GlobalHydra.instance().clear()
            with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
                return list(paths(hydra.compose("train", overrides)))
        except (HydraException, OmegaConfBaseException):
            continue
    return list(paths(OmegaConf.load(HERE / "train.yaml")))


def paths(config: Any, prefix: str = "") -> Iterator[str]:
    """List the whole keys of a configuration."""
    for key in config:
        yield f"{prefix}{key}"
        child = config._get_node(key)
        if isinstance(child, DictConfig) and not child._is_none() and not child._is_missing():
            yield from paths(child, f"{prefix}{key}.")


def _near(name: str, known: list[str]) -> list[str]:
    """Return up to three near matches, nearest first, of whole names or of their last parts."""

    def likeness(one: str, other: str) -> float:
        last = re.split(r"[./]", one)[-1], re.split(r"[./]", other)[-1]
        return max(SequenceMatcher(None, one, other).ratio(), SequenceMatcher(None, *last).ratio())

    ranked = sorted(((likeness(name, other), other) for other in dict.fromkeys(known)), key=lambda pair: -pair[0])
    return [other for ratio, other in ranked if ratio >= 0.75][:3]


def _did_you_mean(near: list[str], known: list[str]) -> str:
    return f"; did you mean {' or '.join(near)}?" if near else _have(known)


def _have(known: list[str]) -> str:
    if not known:
        return ""
    return f" (have: {', '.join(known[:LISTED])}{', ...' if len(known) > LISTED else ''})"


def one_line(error: Exception) -> str:
    """Return the first line of an error's message, with the key that OmegaConf adds in a later line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = getattr(error, "full_key", None)
    text = lines[0] if lines else type(error).__name__
    if several := re.fullmatch(r"Ambiguous value for argument '(.+)'", text):
        return f"{several[1]}: has several values; give -m to run each, or [...] for a list, or quotes for one text"
    if missing := re.fullmatch(r"Interpolation key '(.+)' not found", text):
        text = f"takes the value of {missing[1]}, which isn't there; are data, codec and objective of one modality?"
    return f"{key}: {text}" if key and key not in text else text
