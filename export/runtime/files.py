"""Read and write media files; their libraries are imported on first use."""

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.decoding.errors import BadSample
from varitok.data.storage.members import File, InMemory, Source

__all__ = ["STREAM", "SignalFile", "open_input", "open_output"]

STREAM = Path("-")  # stands for standard input or output


class SignalFile(NamedTuple):
    """An open media file, read in the form of `Bundle.values`.

    Attributes:
        length: Length of its signal in samples or frames; for some lossy audio files an estimate.
        chunks: Function (count) -> the whole signal, float32 `(1, c, n, ...)` with n = `count` in all but the last. It
            raises `UserError` if the file can't be read.
        frame_rate: Frames per second of a clip; None for other signals.
        changes: How its signal differs from the file, such as "44100 Hz resampled to 16000 Hz"; empty if it doesn't.
    """

    length: int
    chunks: Callable[[int], Iterator[npt.NDArray[np.float32]]]
    frame_rate: float | None = None
    changes: str = ""

    def read(self) -> npt.NDArray[np.float32]:
        """Read the whole signal."""
        parts = list(self.chunks(max(1, self.length)))
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)


@contextmanager
def open_input(path: File) -> Iterator[Source]:
    """Return a file in the form that `varitok.data.decoding` reads; `STREAM` is standard input, read whole.

    Raises:
        UserError: Within the `with` block, the file can't be decoded.
    """
    try:
        yield InMemory("standard input", sys.stdin.buffer.read()) if path == STREAM else path
    except BadSample as error:
        raise UserError(str(error)) from error


@contextmanager
def open_output(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write, which takes the place of `path` once it is complete; after an error nothing is left.

    Standard output gets the whole file at the end: formats whose headers hold sizes need to seek.

    Raises:
        UserError: The file can't be written.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        if path == STREAM:
            with tempfile.TemporaryFile() as file:
                yield file
                file.seek(0)
                shutil.copyfileobj(file, sys.stdout.buffer)
                sys.stdout.buffer.flush()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w+b") as file:
                yield file
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror or error})") from error
