"""Read and write media files; their libraries are imported on first use."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy.typing as npt

from varitok import UserError

__all__ = ["PICTURES", "STREAM", "Part", "open_input", "read_file", "read_picture", "write_output"]

STREAM = Path("-")  # stands for standard input or output
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Part(NamedTuple):
    """The received codes of one signal; a container file may hold several signals.

    Attributes:
        codes: `(1, codebooks, steps, *inner)`.
        units: Length of the signal in samples or frames; None if the file is truncated.
        facts: Facts about the signal from the container's header, as `Bundle.facts` returns them.
    """

    codes: npt.NDArray[Any]
    units: int | None
    facts: tuple[int, ...]


def read_file(path: Path, read: Callable[[], Any]) -> Any:
    """Return `read()`, a library call that reads a file.

    Raises:
        UserError: The call failed; the library's error becomes one line.
    """
    try:
        return read()
    except UserError:
        raise
    except Exception as error:  # each library has exception classes of its own
        reason = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: can't be read ({reason})") from error


def open_input(path: Path) -> str | BinaryIO:
    """Return a file's name, or the content of standard input as a file object."""
    return io.BytesIO(sys.stdin.buffer.read()) if path == STREAM else str(path)


def read_picture(path: Path) -> Any:
    """Read an image file as a Pillow RGB image, and apply its EXIF orientation."""
    from PIL import Image, ImageOps  # noqa: PLC0415 (only images need it)

    return read_file(path, lambda: ImageOps.exif_transpose(Image.open(open_input(path))).convert("RGB"))


def write_output(path: Path, data: bytes) -> None:
    """Write a file atomically, or write to standard output.

    Raises:
        UserError: The file can't be written.
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
