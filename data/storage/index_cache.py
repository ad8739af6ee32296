"""Where the index of a dataset is kept, so that one process makes it and all map it: beside the data, or in a cache."""

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .file_index import FileIndex, map_index, write_index
from .folders import printable
from .members import is_url

__all__ = ["alone", "cached_path", "is_large", "share_index"]

_log = logging.getLogger(__name__)
MANY = 10_000  # files from which listing them takes longer than a file is worth


def is_large(count: int) -> bool:
    """Return whether a number of files is worth an index, or whatever else is kept about each."""
    return count >= MANY


def share_index(
    root: str,
    *,
    beside: Path | None,
    about: str,
    is_current: Callable[[FileIndex], bool],
    build: Callable[[], FileIndex],
) -> FileIndex:
    """Map the index of a dataset; if there is none, build it, one process of a machine at a time, and keep it.

    An index of less than 10,000 files isn't kept.

    Args:
        root: See `FileIndex`.
        beside: Path of the index beside the data; None if it may not be there.
        about: What it depends on besides `root`.
        is_current: Returns whether an index that was found still fits the data.
        build: Builds it.
    """
    about = f"{root if is_url(root) else os.path.abspath(root)}\0{about}"
    places = [*([beside] if beside else []), *_places(about, ".safetensors")]
    found = _find(places, root, is_current)
    if found is None:
        with alone(about):
            found = _find(places, root, is_current)  # another process may have made it meanwhile
            if found is None:
                found = _keep(build(), places)
    return found


def cached_path(about: str, suffix: str) -> Path | None:
    """Return the path in the cache of what depends on `about`; None if nothing can be written there."""
    for path in _places(about, suffix):
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            if os.access(path.parent, os.W_OK):
                return path
    return None


def _places(about: str, suffix: str) -> list[Path]:
    """Return the paths of a file in the user's cache and, for who has no writable home, among temporary files."""
    name = _hash(about) + suffix
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return [cache / "varitok" / "index" / name, Path(tempfile.gettempdir()) / f"varitok-{_user()}" / name]


def _hash(about: str) -> str:
    return hashlib.sha256(about.encode(errors="surrogateescape")).hexdigest()[:24]


def _user() -> int:
    return os.getuid() if hasattr(os, "getuid") else 0


def _find(places: Sequence[Path], root: str, is_current: Callable[[FileIndex], bool]) -> FileIndex | None:
    """Map the first index that is current."""
    for path in places:
        with suppress(OSError, ValueError):
            index = map_index(path, root)
            if is_current(index):
                return index
    return None


def _keep(index: FileIndex, places: Sequence[Path]) -> FileIndex:
    """Write an index to the first place that takes it, and map it; return a small one as it is."""
    if not is_large(len(index)):
        return index
    reason = ""
    for path in places:
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_index(index, path)
            return map_index(path, index.root)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
    _log.warning("%s: its index can't be kept (%s); every start lists all files", printable(index.root), reason)
    return index


@contextmanager
def alone(about: str) -> Iterator[None]:
    """Wait until no other process of this machine is in here with the same `about`, where the system has such locks."""
    path = Path(tempfile.gettempdir()) / f"varitok-{_user()}-{_hash(about)}.lock"
    with ExitStack() as held:
        with suppress(ImportError, OSError):
            import fcntl  # noqa: PLC0415 (not on Windows)

            lock = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
            held.callback(os.close, lock)
            held.callback(path.unlink, missing_ok=True)  # who waits finds the index, or makes it once more
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
