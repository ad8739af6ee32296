"""The index file of a shard: offset, size and header metadata of each member."""

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
HEAD = ("format", "shard", "bytes", "members")  # of the first line of each index
CHUNK = 1 << 20  # bytes that are copied at once when a file is written


def index_of(shard: str) -> str:
    """Return the path or URL of a shard's index."""
    return shard.removesuffix(SUFFIX) + INDEX


def index_shard(shard: str, facts: Callable[[Member], Mapping[str, Any]] = lambda member: {}) -> list[bytes]:
    """Build the index of a local shard, write it beside the shard, and return its lines, one per member.

    Facts that an existing index of the same members has are kept, as of codes and features, since the tar file doesn't
    contain them; of other members only `source`. If the index can't be written, a warning is logged.

    Args:
        shard: Path of the tar file.
        facts: Function that returns a member's metadata for the index; its caption is added in any case.

    Raises:
        OSError: The shard can't be read.
    """
    length = os.stat(shard).st_size
    with open(shard, "rb") as file:
        members = _attach_captions([Member(shard, *entry) for entry in scan(file, length)])
    head, known = _known(shard, length, members)
    lines = []
    for one in members:
        found = facts(one)
        kept = {key: value for key, value in known.get(one.name, {}).items() if key != "bad" or not found}
        lines.append(_line(one.name, one.offset, one.size, {**kept, **one.facts, **found}))
    if members and members[-1].offset + members[-1].size > length:
        _log.warning("%s is truncated within %s: the rest is lost", shard, members[-1])
    try:
        _write_index(Path(index_of(shard)), Path(shard).name, length, lines, **head)
    except OSError as error:
        _log.warning("%s can't be written (%s): it will be rebuilt at each start", index_of(shard), error.strerror)
    return lines


def _known(shard: str, length: int, members: Sequence[Member]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Read what an existing index has of a shard and, by name, of its members; see `index_shard`."""
    try:
        head, *entries = (json.loads(line) for line in Path(index_of(shard)).read_bytes().splitlines())
        places = [(one.pop("name"), one.pop("offset"), one.pop("size")) for one in entries]
        facts = {name: one for (name, _, _), one in zip(places, entries, strict=True)}
        if head["bytes"] == length and places == [one[1:4] for one in members]:
            return {key: value for key, value in head.items() if key not in HEAD}, facts
        return {}, {name: {"source": str(one["source"])} for name, one in facts.items() if "source" in one}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}, {}


def _attach_captions(members: Sequence[Member]) -> list[Member]:
    """Add the caption with the same key to each member's metadata."""
    texts = {_key(member.name): member for member in members if member.suffix == captions.SUFFIX}
    found = []
    for member in members:
        text = texts.get(_key(member.name))
        about = {}
        if text is not None and text is not member:
            with suppress(OSError):  # the shard may be truncated
                about = {"caption": captions.read_caption(text)}
        found.append(member._replace(facts=about))
    return found


def _key(name: str) -> str:
    """Return the sample key of a member: its path up to the first dot of the file name (WebDataset's layout)."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.partition(".")[0] or path.name))


def _line(name: str, offset: int, size: int, facts: Mapping[str, Any]) -> bytes:
    about = {"name": name, "offset": offset, "size": size, **facts}
    return json.dumps(about, separators=(",", ":")).encode() + b"\n"


def _write_index(path: Path, shard: str, length: int, lines: Sequence[bytes], **more: Any) -> None:
    """Write an index atomically."""
    head = {"format": FORMAT, "shard": shard, "bytes": length, "members": len(lines), **more}
    partial_path = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial_path.write_bytes(b"".join([json.dumps(head).encode() + b"\n", *lines]))
        partial_path.replace(path)
    finally:
        partial_path.unlink(missing_ok=True)
