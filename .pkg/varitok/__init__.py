"""Varitok: variable-length tokenizers for images, video and audio.

One codec shape, any signal: an encoder makes latents, a bottleneck makes codes, a decoder makes the signal back; how
many codes are kept is a free choice, at training and at use. This file is the package's root; its folders are links
to the checkout's top level (ARCHITECTURE.md, "Where the package is").
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from varitok.export.exporters.frozen import FrozenCodec
    from varitok.export.runtime.bundle import Opened
    from varitok.export.runtime.codes import Codes

__all__ = ["UserError", "__version__", "codes", "exit_on_closed_output", "load", "load_torch", "progress"]
__version__ = "0.1.0"
Item = TypeVar("Item")


class UserError(ValueError):
    """A user's mistake; its text is one line: the mistake, where, and the remedy."""


def progress(items: Iterable[Item], total: int, noun: str) -> Iterator[Item]:
    """Iterate over items; on a terminal, show their progress and the remaining time.

    Commands that run without torch use it, so it does without rich, which comes with training.

    Args:
        items: What is gone through.
        total: How many there are.
        noun: What they are called.
    """
    began, shown = time.monotonic(), sys.stderr.isatty()
    for done, item in enumerate(items):
        if shown:
            left = (time.monotonic() - began) / done * (total - done) if done else None
            rest = "" if left is None else f", {left // 60:.0f}:{left % 60:02.0f} left"
            # The cursor goes back, so that the next line that is printed takes this one's place.
            print(f"\x1b[K{done}/{total} {noun}{rest}\r", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\x1b[K", end="", file=sys.stderr, flush=True)


@contextmanager
def exit_on_closed_output() -> Iterator[None]:
    """Exit with status 141, as after SIGPIPE, if the reader of standard output has ended, such as `head`."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)
        except BrokenPipeError:
            # The interpreter flushes once more at its end, which would print a traceback.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        raise  # it was another pipe


def load(path: str | PathLike[str], *, int8: bool = False) -> "Opened":
    """Open an exported bundle for `encode` and `decode` with numpy and onnxruntime alone.

    Args:
        path: The bundle's folder, as `export=` wrote it; or `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION` on the hub.
        int8: Use the decoder with 8-bit weights, if the bundle was exported with one.

    Raises:
        UserError: A file of the bundle is missing, altered or of an unknown format.

    Example:
        >>> bundle = load("image_tokenizer")
        >>> codes = bundle.encode(np.zeros((16, 16, 3), np.uint8), tokens=4)
        >>> bundle.pixels(bundle.decode(codes)).shape
        (1, 16, 16, 3)
    """
    from varitok.export.runtime.load import load as load_bundle  # noqa: PLC0415 (keeps `import varitok` instant)

    return load_bundle(path, int8=int8)


def codes(path: str | PathLike[str], *, partial: bool = False) -> "Codes":
    """Open the codes of a corpus, which `varitok tokenize` wrote, with numpy alone; arrays are read on access.

    Args:
        path: The folder of shards, or an fsspec URL of it.
        partial: Accept a folder in which shards are missing: `varitok tokenize` hasn't ended, or some weren't copied.

    Raises:
        UserError: The folder has no codes, codes of several bundles, or too few shards.

    Example:
        >>> corpus = codes("image_codes")  # varitok tokenize PHOTOS --bundle image_tokenizer --out image_codes
        >>> len(corpus), corpus.codebook_sizes
        (1, (37,))
        >>> name, array, facts = corpus[0]
        >>> name, array.shape, array.dtype.name  # codes are (codebooks, *grid)
        ('photo.png', (1, 6), 'uint8')
        >>> facts["signal_size"], facts["caption"]
        ([16, 16], 'a gray square')
        >>> load("image_tokenizer").decode(array[None]).shape
        (1, 3, 16, 16)
    """
    from varitok.export.runtime.codes import read_codes  # noqa: PLC0415 (keeps `import varitok` instant)

    return read_codes(path, partial=partial)


def load_torch(path: str | PathLike[str]) -> "FrozenCodec":
    """Rebuild a bundle's codec as a torch module from its configuration and weights; no code of the bundle is run.

    Example:
        >>> codec = load_torch("image_tokenizer")
        >>> codec.encode(torch.zeros(1, 3, 16, 16)).shape
        torch.Size([1, 1, 6])

    Args:
        path: The bundle's folder, as `export=` wrote it.

    Raises:
        UserError: A file of the bundle is missing, altered or of an unknown format, or torch is not installed.
    """
    try:
        from varitok.export.exporters.rebuild import rebuild  # noqa: PLC0415 (keeps `import varitok` instant)
    except ModuleNotFoundError as error:
        if (error.name or "varitok").startswith("varitok"):
            raise
        raise UserError(f"a torch module needs the package {error.name}; pip install 'varitok[train]'") from error
    return rebuild(path)
