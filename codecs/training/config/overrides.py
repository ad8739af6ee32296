"""The words of a command line, in the order and with the quotes that Hydra needs. This module doesn't import torch."""

import contextlib
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from .locations import is_location

__all__ = ["arrange"]

FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")  # options whose value, the next word, may look like KEY=VALUE


def arrange(words: Sequence[str]) -> list[str]:
    """Return a command line that Hydra reads as it is meant.

    Overrides come first: Hydra refuses any after an option that follows another. Paths are quoted if they have signs
    of Hydra's grammar, or would be read as a number.

    >>> arrange(["experiment=image/demo", "-m", "data.root=Photos (2024)", "seed=1,2"])
    ['experiment=image/demo', "data.root='Photos (2024)'", 'seed=1,2', '-m']

    Args:
        words: Command-line arguments.
    """
    overrides: list[str] = []
    options: list[str] = []
    for before, word in zip(["", *words], words, strict=False):
        named = not word.startswith("-") and ("=" in word or word.startswith("~")) and before not in FOLDERS
        (overrides if named else options).append(word)
    sweeps = not {"-m", "--multirun"}.isdisjoint(options)
    return [*(_quote(word, sweeps) for word in overrides), *options]


def _quote(word: str, sweeps: bool) -> str:
    """Quote the value of an override if it is a path that Hydra would read as something else."""
    key, _, path = word.partition("=")
    if not path or not is_location(key.lstrip("+")) or "${" in path:
        return word
    with contextlib.suppress(HydraException):
        read = OverridesParser.create().parse_override(word)
        value, quoted = read.value(), path[0] in "'\"" and path[0] == path[-1]
        if quoted or value is None or value == path or isinstance(value, dict) or (sweeps and read.is_sweep_override()):
            return word
    return f"{key}={QuotedString(path, Quote.single).with_quotes()}"
