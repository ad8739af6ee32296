"""List the files of a folder, for every dataset and command; it needs the standard library alone."""

import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from heapq import heappop, heappush
from pathlib import Path, PurePath, PurePosixPath
from typing import NamedTuple

__all__ = ["FolderFiles", "changed_at", "describe_skipped", "find_files", "printable", "skip_reason"]

MOST_REASONS = 6  # named in a line
TICK = 2 * 10**9  # nanoseconds: the coarsest clock of a file system


class FolderFiles(NamedTuple):
    """The files of a folder.

    Attributes:
        files: Their paths, sorted.
        skipped: Number of skipped entries by reason; a suffix is a reason.
        linked: Real paths of the files that were reached through a link below the folder, by their paths.
        searched: Time of the last change of each searched folder, in nanoseconds, by its path; 0 if that was just now.
    """

    files: list[Path]
    skipped: Counter[str]
    linked: dict[Path, str]
    searched: dict[str, int]


def find_files(folder: Path, suffixes: Collection[str]) -> FolderFiles:
    """Find the regular files with given suffixes at any depth of a folder.

    Hidden files and folders are skipped. Links are followed after all else, and lead to each file and folder once; one
    to a folder that contains it or `folder` is a loop and is skipped.

    Args:
        folder: An existing folder.
        suffixes: Suffixes in lower case, with their dots; those of files may be in any case.
    """
    files: list[Path] = []
    skipped = Counter[str]()
    linked: dict[Path, str] = {}
    links: list[Path] = []
    changed: dict[str, int] = {}
    for found, real, through_link in _walk(folder, suffixes, skipped, changed):
        path = Path(found.path)
        (links if found.is_symlink() else files).append(path)
        if through_link:
            linked[path] = os.path.join(real, found.name)
    root = os.path.realpath(folder)
    own = {linked.get(file) or os.path.join(root, file.relative_to(folder)) for file in files if links}
    for link in sorted(links):
        real = os.path.realpath(link)
        if real in own:
            skipped["linked again"] += 1
        else:
            own.add(real)
            files.append(link)
            linked[link] = real
    return FolderFiles(sorted(files), skipped, linked, changed)


def _walk(
    folder: Path, suffixes: Collection[str], skipped: Counter[str], changed: dict[str, int]
) -> Iterator[tuple[os.DirEntry[str], str, bool]]:
    """Yield each file, the real path of its folder, and whether a link to a folder led there.

    Count skipped entries, and store when each folder was changed.
    """
    root = os.path.realpath(folder)
    waiting = [(str(folder), root)]  # path below `folder`, and the real path
    links: list[tuple[str, str]] = []  # a heap: path of the link, and real path of the folder that contains it
    searched = set[str]()
    through_link = False
    while waiting:
        path, real = waiting.pop()
        if real in searched:
            skipped["linked again"] += 1
        else:
            searched.add(real)
            changed[path] = changed_at(path)
            for entry in _scan(path, skipped):
                kind, reason = _kind(entry), skip_reason(entry.name, suffixes)
                if reason == "hidden":
                    skipped[reason] += 1
                elif kind == "folder":
                    waiting.append((entry.path, os.path.join(real, entry.name)))
                elif kind == "linked folder":
                    heappush(links, (entry.path, real))
                elif reason or kind:
                    skipped[reason or kind] += 1
                else:
                    yield entry, real, through_link
        while links and not waiting:
            path, parent = heappop(links)
            real = os.path.realpath(path)
            if PurePath(root).is_relative_to(real) or PurePath(parent).is_relative_to(real):
                skipped["linked again"] += 1
            else:
                waiting.append((path, real))
                through_link = True  # so are all that follow


def skip_reason(name: str, suffixes: Collection[str]) -> str:
    """Return why a file of this name is skipped: "hidden", or its suffix; empty if it isn't.

    Args:
        name: Name of a file, or its path with slashes; if any part is hidden, the file is.
        suffixes: See `find_files`.
    """
    if any(part.startswith(".") and part not in (".", "..") for part in name.split("/")):
        return "hidden"
    suffix = PurePosixPath(name).suffix.lower()
    return "" if suffix in suffixes else suffix or "without a suffix"


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Return the end of a message, such as "; skipped 3 hidden, 2 .txt"; empty if nothing was skipped."""
    ranked = sorted(skipped.items(), key=lambda one: (-one[1], one[0]))
    shown = [f"{count:,} {printable(reason)}" for reason, count in ranked[:MOST_REASONS]]
    others = sum(count for _, count in ranked[MOST_REASONS:])
    return "; skipped " + ", ".join([*shown, *([f"{others:,} others"] if others else [])]) if shown else ""


def printable(name: object) -> str:
    """Return a name with its unprintable characters escaped, among them bytes that aren't UTF-8."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(name))


def changed_at(path: str) -> int:
    """Return when a folder was changed last, in nanoseconds; 0 if that was just now, or if it is missing.

    Another file may come within the same tick of the file system's clock.
    """
    try:
        changed = os.stat(path).st_mtime_ns
    except OSError:
        return 0
    return changed if changed < time.time_ns() - TICK else 0


def _scan(path: str, skipped: Counter[str]) -> list[os.DirEntry[str]]:
    """List the entries of a folder; count one that can't be read."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        skipped["unreadable"] += 1
        return []


def _kind(entry: os.DirEntry[str]) -> str:
    """Return the kind of an entry: "folder", "linked folder", "unreadable", "special"; empty for a regular file."""
    try:
        if entry.is_dir():
            return "linked folder" if entry.is_symlink() else "folder"
        if entry.is_file():
            return ""
        return "special" if os.path.exists(entry.path) else "unreadable"  # pipes and devices; broken links
    except OSError:  # a link to itself
        return "unreadable"
