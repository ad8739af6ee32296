"""The index beside a shard: where each member is, and what its header says."""

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from . import captions
from .members import Member
from .tar import scan

__all__ = ["index_shard"]

_log = logging.getLogger(__name__)
SUFFIX, INDEX = ".tar", ".index.jsonl"
FORMAT = 1
CHUNK = 1 << 20  # bytes of a file that are held while it is written


def index_of(shard: str) -> str:
    """Return the path of a shard's index."""
    return shard.removesuffix(SUFFIX) + INDEX


def index_shard(shard: str, facts: Callable[[Member], Mapping[str, Any]] = lambda member: {}) -> list[bytes]:
    """Make the index of a shard on this machine, beside it; give its lines, one for each member.

    Where it can't be written, it is only given.

    Args:
        shard: Path of the tar file.
        facts: Returns the entries of the index for a member; a caption's own are its text.

    Raises:
        OSError: The shard can't be read.
    """
    length = os.stat(shard).st_size
    with open(shard, "rb") as file:
        members = _attach_captions([Member(shard, *entry) for entry in scan(file, length)])
    lines = [_line(one.name, one.offset, one.size, {**one.facts, **facts(one)}) for one in members]
    if members and members[-1].offset + members[-1].size > length:
        _log.warning("%s ends within %s: the rest is lost", shard, members[-1])
    try:
        _write_index(Path(index_of(shard)), Path(shard).name, length, lines)
    except OSError as error:
        _log.warning("%s can't be written (%s): it is made at each start", index_of(shard), error.strerror)
    return lines


def _attach_captions(members: Sequence[Member]) -> list[Member]:
    """Attach to each member the caption with its key."""
    texts = {_key(member.name): member for member in members if member.suffix == captions.SUFFIX}
    found = []
    for member in members:
        text = texts.get(_key(member.name))
        about = {}
        if text is not None and text is not member:
            with suppress(OSError):  # of a shard that was cut off
                about = {"caption": captions.read_caption(text)}
        found.append(member._replace(facts=about))
    return found


def _key(name: str) -> str:
    """Return the key of a sample's members: all up to the first dot of the file name (WebDataset's layout)."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _line(name: str, offset: int, size: int, facts: Mapping[str, Any]) -> bytes:
    about = {"name": name, "offset": offset, "size": size, **facts}
    return json.dumps(about, separators=(",", ":")).encode() + b"\n"


def _write_index(path: Path, shard: str, length: int, lines: Sequence[bytes], **more: Any) -> None:
    """Write an index whole, or not at all."""
    head = {"format": FORMAT, "shard": shard, "bytes": length, "members": len(lines), **more}
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_path.write_bytes(b"".join([json.dumps(head).encode() + b"\n", *lines]))
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)
