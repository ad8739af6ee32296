"""Names of folders that mean a split: training, validation or test."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from varitok import UserError

from .folders import printable

__all__ = ["HELD_OUT", "TEST", "TRAINING", "VALIDATION", "join_folders", "require_undivided", "shorten"]

TRAINING = ("train", "training")
VALIDATION = ("val", "valid", "validation", "dev", "eval", "evaluation")
TEST = ("test", "testing")
HELD_OUT = VALIDATION + TEST


def require_undivided(root: str | Path, folders: Iterable[str]) -> None:
    """Check that no subfolder of a folder without `split_folders` looks like a split: a test set isn't trained on.

    Args:
        root: The folder.
        folders: Folders of its files, as paths relative to it with slashes, or what `shorten` leaves of them.

    Raises:
        UserError: Some folder has `train/` beside `test/`, `train2017/` beside `val2017/` and so on, or the folder
            itself has other files beside `test/`.
    """
    children = defaultdict[str, set[str]](set)
    folders = set(folders)
    for parts in (folder.split("/") for folder in folders if folder):
        for depth, own in enumerate(parts):
            children["/".join(parts[:depth])].add(own)
    for parent, owns in sorted(children.items()):
        paths = {own: f"{parent}/{own}" if parent else own for own in sorted(owns)}
        train, held = ([paths[own] for own in paths if _first_word(own) in known] for known in (TRAINING, HELD_OUT))
        if train and held:
            raise UserError(
                f"data.root={root}: has {join_folders([*train, *held])}, which look like splits; give a folder with one"
                " train/ and one val/, or rename these"
            )
    held = sorted(own for own in children[""] if own.lower() in HELD_OUT)
    if held and ("" in folders or len(held) < len(children[""])):
        raise UserError(
            f"data.root={root}: has {join_folders(held)}, but no train/; move the training files to train/, or rename"
            f" {held[0]}/"
        )


def shorten(folder: str) -> str:
    """Return what `require_undivided` needs of a folder's path: all up to the last part that looks like a split.

    Of a path without such a part, that is its first part. So an index of millions of folders stores a few.
    """
    parts = folder.split("/")
    while len(parts) > 1 and _first_word(parts[-1]) not in TRAINING + HELD_OUT:
        parts.pop()
    return "/".join(parts)


def _first_word(name: str) -> str:
    """Return the letters before the first other character, in lower case: "val" of "val2017"."""
    return re.split(r"[^a-z]", name.lower(), maxsplit=1)[0]


def join_folders(names: Sequence[str]) -> str:
    """Return names of folders as a part of a sentence."""
    return " beside ".join(f"{printable(name)}/" for name in names)
