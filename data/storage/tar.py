"""Tar files: the offset of each member's content. Nothing is ever unpacked, and no name becomes a path.

`tarfile` parses each header. Its walk from one to the next is ours: `tarfile` stops at damage after a long name, and
allocates what a header says.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["BLOCK", "MOST_BYTES", "end_of", "header_of", "padding_of", "read_header", "scan"]

BLOCK = tarfile.BLOCKSIZE
MOST_BYTES = 1 << 33  # of a member: what a header's octal digits can say; more is nonsense, or an attack
MOST_ABOUT = 1 << 20  # bytes of what stands before a member about it (a long name); GNU tar itself reads any number
ABOUT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def header_of(name: str, size: int) -> bytes:
    """Make what stands before a member: the same for the same name and size, on any machine and at any time.

    Raises:
        ValueError: The name can't stand in a tar file.
    """
    if not name or "\0" in name:
        raise ValueError(f"{name!r}: not a name")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding_of(size: int) -> bytes:
    """Return the zeros after content of a size."""
    return bytes(-size % BLOCK)


def end_of(size: int) -> bytes:
    """Return the zeros that end a tar file of a size."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def scan(stream: BinaryIO, length: int) -> Iterator[tuple[str, int, int]]:
    """Go through a tar file from header to header; give each member's name, the offset of its first byte, and its size.

    Bytes of a name that are not UTF-8 are surrogates. A member that the end of the file cuts off is given with the
    size that it should have. Behind a damaged header the next sound one is looked for. Allocation is bounded whatever
    the headers say.
    """
    at, told = 0, dict[str, str]()
    while at + BLOCK <= length:
        stream.seek(at)
        info = read_header(stream.read(BLOCK))
        at += BLOCK
        if info is None:  # the end, or damage: an extended header before it belongs to a lost member
            told = {}
            continue
        if info.type in ABOUT:
            if info.size > MOST_ABOUT:
                continue
            told |= _read_about(info.type, stream.read(info.size))
            at += info.size + len(padding_of(info.size))
            continue
        size = int(told["size"]) if told.get("size", "").isdecimal() else info.size
        if size > MOST_BYTES:
            told = {}
            continue
        if info.type in tarfile.REGULAR_TYPES and not info.name.endswith("/"):
            yield told.get("path", info.name), at, size
        has_content = info.type in tarfile.REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES
        at += (size + len(padding_of(size))) if has_content else 0
        told = {}


def read_header(block: bytes) -> tarfile.TarInfo | None:
    """Parse a 512-byte block as a header; None if it is none."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if info.size >= 0 else None


def _read_about(kind: bytes, content: bytes) -> dict[str, str]:
    """Read what stands before a member about it: its name, or records "LENGTH KEY=VALUE" of pax."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": content.partition(b"\0")[0].decode("utf-8", "surrogateescape")}
    found: dict[str, str] = {}
    while kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) and content:
        digits, _, rest = content.partition(b" ")
        length = int(digits) if digits.isdigit() and len(digits) < 9 else 0
        key, equals, value = rest[: length - len(digits) - 2].partition(b"=")
        if length <= len(digits) + 1 or not equals:
            break
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[length:]
    return {key: value for key, value in found.items() if key in ("path", "size") and value}
