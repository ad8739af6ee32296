"""Find the offset of each member's content in a tar file. Nothing is unpacked, and no name becomes a path.

`tarfile` parses single headers only. Its iteration isn't used: it stops at a damaged header after a long name, and
allocates as many bytes as a header claims.
"""

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

__all__ = ["BLOCK", "MOST_BYTES", "end_of", "header_of", "padding_of", "read_header", "scan"]

BLOCK = tarfile.BLOCKSIZE
MOST_BYTES = 1 << 33  # bytes of a member: the limit of a header's octal digits; larger sizes are damage or an attack
MOST_ABOUT = 1 << 20  # bytes of an extended header (a long name); GNU tar itself has no limit
ABOUT = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


def header_of(name: str, size: int) -> bytes:
    """Return the header of a member; it depends on name and size alone, not on machine or time.

    Raises:
        ValueError: The name can't be stored in a tar file.
    """
    if not name or "\0" in name:
        raise ValueError(f"{name!r}: not a valid member name")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")


def padding_of(size: int) -> bytes:
    """Return the zeros that pad content of `size` bytes to whole blocks."""
    return bytes(-size % BLOCK)


def end_of(size: int) -> bytes:
    """Return the zeros that end a tar file after `size` bytes."""
    return bytes(2 * BLOCK + -(size + 2 * BLOCK) % tarfile.RECORDSIZE)


def scan(stream: BinaryIO, length: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name of each member of a tar file, the offset of its first byte, and its size in bytes.

    Bytes of a name that aren't UTF-8 become surrogates. A member that is truncated by the end of the file is yielded
    with the size in its header. After a damaged header, the scan goes on at the next valid one. Memory is bounded
    whatever the headers claim.
    """
    at, header = 0, dict[str, str]()
    while at + BLOCK <= length:
        stream.seek(at)
        info = read_header(stream.read(BLOCK))
        at += BLOCK
        if info is None:  # the end, or damage: drop the extended header of the lost member
            header = {}
            continue
        if info.type in ABOUT:
            if info.size > MOST_ABOUT:
                continue
            header |= _read_about(info.type, stream.read(info.size))
            at += info.size + len(padding_of(info.size))
            continue
        size = int(header["size"]) if header.get("size", "").isdecimal() else info.size
        if size > MOST_BYTES:
            header = {}
            continue
        if info.type in tarfile.REGULAR_TYPES and not info.name.endswith("/"):
            yield header.get("path", info.name), at, size
        has_content = info.type in tarfile.REGULAR_TYPES or info.type not in tarfile.SUPPORTED_TYPES
        at += (size + len(padding_of(size))) if has_content else 0
        header = {}


def read_header(block: bytes) -> tarfile.TarInfo | None:
    """Parse a 512-byte block as a header; return None if it isn't a valid one."""
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError, OverflowError):
        return None
    return info if info.size >= 0 else None


def _read_about(kind: bytes, content: bytes) -> dict[str, str]:
    """Parse the content of an extended header: a long name (GNU), or pax records "LENGTH KEY=VALUE"."""
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
