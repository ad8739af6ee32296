"""The error of files that can't be read."""

from collections.abc import Iterator
from contextlib import contextmanager

from ..storage.members import Source

__all__ = ["BadSample", "convert_errors"]


class BadSample(Exception):
    """Raised for a file that can't be read or decoded.

    Args:
        path: The file.
        reason: Why it can't be read, in a few words.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)  # both arguments unchanged, so that workers can pickle it

    def __str__(self) -> str:
        """Return "path: reason"."""
        return "{}: {}".format(*self.args)


@contextmanager
def convert_errors(path: str | Source) -> Iterator[None]:
    """Convert any exception that a decoder raises into a `BadSample` with a one-line reason."""
    try:
        yield
    except BadSample:
        raise
    except Exception as error:  # OSError, SyntaxError, RuntimeError, ValueError, MemoryError, FFmpeg's own and more
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BadSample(str(path), " ".join(reason.replace(str(path), "file").split())) from None
