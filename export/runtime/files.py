"""Ordinary files that signals come from and go to; the libraries that open them are loaded when they are needed."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy.typing as npt

from varitok import UserError

__all__ = ["PICTURES", "STREAM", "Part", "open_input", "read_file", "read_picture", "write_output"]

STREAM = Path("-")  # standard input or output, in the place of a file
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Part(NamedTuple):
    """A signal's codes as they arrived; a file may hold several, one after the other.

    Attributes:
        codes: `(1, codebooks, steps, *inner)`.
        units: How much of the signal they stand for, samples or frames; None if their end is missing.
        facts: The container's about the signal, as `Bundle.facts` gave them.
    """

    codes: npt.NDArray[Any]
    units: int | None
    facts: tuple[int, ...]


def read_file(path: Path, read: Callable[[], Any]) -> Any:
    """Return what a library reads of a file.

    Raises:
        UserError: It can't; every library's errors become one line.
    """
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # of several libraries, each with classes of its own
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: can't be read ({reason})") from error


def open_input(path: Path) -> str | BinaryIO:
    """Return what libraries open: a file's name, or what standard input has, as a file."""
    return io.BytesIO(sys.stdin.buffer.read()) if path == STREAM else str(path)


def read_picture(path: Path) -> Any:
    """Read a picture as it is to be seen: a Pillow image in color."""
    from PIL import Image, ImageOps  # noqa: PLC0415 (other modalities don't need it)

    return read_file(path, lambda: ImageOps.exif_transpose(Image.open(open_input(path))).convert("RGB"))


def write_output(path: Path, data: bytes) -> None:
    """Write a file, which appears whole or not at all; or to standard output.

    Raises:
        UserError: It can't be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if path == STREAM:
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        if path != STREAM:
            partial.unlink(missing_ok=True)
        raise UserError(f"{path}: can't be written ({error.strerror})") from error
