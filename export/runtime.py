"""Runs an exported bundle with numpy and onnxruntime alone: neither torch nor the code that trained it is loaded.

Only JSON and ONNX are read, both of which are data. Range checks are made here: ONNX Runtime silently takes code -1 as
the last entry of a table.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

if TYPE_CHECKING:
    import onnxruntime

__all__ = ["FORMAT_VERSION", "Bundle", "load"]

FORMAT_VERSION = 1

Array = npt.NDArray[Any]


def load(path: str | PathLike[str], *, providers: Sequence[str] | None = None, verify: bool = True) -> "Bundle":
    """Open a bundle.

    Args:
        path: The bundle's folder.
        providers: ONNX Runtime's execution providers; the CPU's where None.
        verify: Hold the files against the checksums in `export.json`.

    Raises:
        UserError: It isn't a bundle, or one of its files is missing, altered or of an unknown format.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that `export=bundle` wrote")
    config, report = _read_json(folder / "config.json"), _read_json(folder / "export.json")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(f"{folder}: bundle format {version!r}; this varitok reads {FORMAT_VERSION}: update varitok")
    names = ["onnx/encoder_model.onnx", "onnx/decoder_model.onnx"]
    for name in [*names, "config.json"]:
        expected = report.get("sha256", {}).get(name)
        if expected is None or not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing from the bundle; export it again with the format onnx")
        if verify and hashlib.sha256((folder / name).read_bytes()).hexdigest() != expected:
            raise UserError(f"{folder / name}: altered since its export; export or fetch the bundle again")
    import onnxruntime  # noqa: PLC0415 (half a second that a mistake need not wait for)

    try:
        sessions = [
            onnxruntime.InferenceSession(folder / name, providers=list(providers or ["CPUExecutionProvider"]))
            for name in names
        ]
    except Exception as error:  # onnxruntime has a dozen kinds of its own
        raise UserError(f"{folder}: onnxruntime can't open the graphs ({str(error).splitlines()[0]})") from error
    return Bundle(config, *sessions)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: not there; is this the folder of a bundle?") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON; export or fetch the bundle again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a JSON object; export or fetch the bundle again")
    return content


class Bundle:
    """A tokenizer out of a bundle.

    Attributes:
        config: What the codec is, as plain data.
        tokens: Most tokens of a signal, N.
        book_sizes: Entries of each book.
        image_size: Side of its images, in pixels.
    """

    def __init__(
        self,
        config: dict[str, Any],
        encoder: "onnxruntime.InferenceSession",
        decoder: "onnxruntime.InferenceSession",
    ) -> None:
        self.config = config
        self.tokens = int(config["tokens"])
        self.book_sizes = tuple(int(size) for size in config["book_sizes"])
        self.image_size = int(config["image_size"])
        self._encoder = encoder
        self._decoder = decoder

    def __repr__(self) -> str:
        """Say what it is in one line."""
        side, books = self.image_size, " x ".join(map(str, self.book_sizes))
        return f"Bundle({self.config['modality']} {side} x {side}, 1 to {self.tokens} tokens of {books} codes)"

    def bits(self, tokens: int) -> float:
        """Count the payload bits of a signal's first `tokens` tokens."""
        return tokens * sum(math.log2(size) for size in self.book_sizes)

    def encode(self, image: Any, tokens: int | None = None) -> npt.NDArray[np.int64]:
        """Turn images into codes.

        Args:
            image: uint8 pixels `(h, w, 3)` or `(b, h, w, 3)` (a Pillow image too), or float `(b, 3, h, w)` in
                [-1, 1]; h and w are `image_size`.
            tokens: Codes to keep of each image; all N where None. The first ones say most.

        Returns:
            int64 `(b, books, tokens)`.

        Raises:
            UserError: Size, type or number of tokens is wrong, or a value is not finite.
        """
        kept = self.tokens if tokens is None else tokens
        self._check_kept(kept)
        (codes,) = self._encoder.run(None, {"pixel_values": self._signal(np.asarray(image))})
        result: npt.NDArray[np.int64] = np.ascontiguousarray(codes[..., :kept])
        return result

    def decode(self, codes: Any) -> npt.NDArray[np.float32]:
        """Turn codes `(b, books, k)`, k from 1 to N, into images: float32 `(b, 3, h, w)` in [-1, 1].

        Raises:
            UserError: Shape or type is wrong, k is out of range, or a code is not in its book.
        """
        codes = np.asarray(codes)
        if codes.ndim != 3 or not np.issubdtype(codes.dtype, np.integer) or codes.shape[1] != len(self.book_sizes):
            shape = f"{codes.dtype} {codes.shape}"
            raise UserError(f"codes: expected integers of shape (batch, {len(self.book_sizes)}, k), got {shape}")
        self._check_kept(codes.shape[2])
        for book, size in enumerate(self.book_sizes):
            wrong = codes[:, book][(codes[:, book] < 0) | (codes[:, book] >= size)]
            if wrong.size:
                raise UserError(f"codes: {wrong[0]} in book {book}, whose codes go from 0 to {size - 1}")
        (signal,) = self._decoder.run(None, {"image_codes": np.ascontiguousarray(codes, dtype=np.int64)})
        result: npt.NDArray[np.float32] = signal
        return result

    def pixels(self, signal: Array) -> npt.NDArray[np.uint8]:
        """Turn images `(b, 3, h, w)` in [-1, 1] into uint8 pixels `(b, h, w, 3)`, rounded to the nearest."""
        scaled = np.clip(np.rint((np.asarray(signal) + 1) * 127.5), 0, 255)
        return scaled.astype(np.uint8).transpose(0, 2, 3, 1)

    def _check_kept(self, kept: int) -> None:
        if not 1 <= kept <= self.tokens:
            raise UserError(f"{kept} tokens: this codec keeps from 1 to {self.tokens}")

    def _signal(self, image: Array) -> npt.NDArray[np.float32]:
        """Bring any accepted form to float32 `(b, 3, h, w)`."""
        side = self.image_size
        if image.dtype == np.uint8:
            image = image[None] if image.ndim == 3 else image
            if image.ndim == 4 and image.shape[3] == 3:
                image = (image.astype(np.float32) / np.float32(127.5) - np.float32(1)).transpose(0, 3, 1, 2)
        if not np.issubdtype(image.dtype, np.floating) or image.ndim != 4 or image.shape[1:] != (3, side, side):
            raise UserError(
                f"image: expected uint8 (batch, {side}, {side}, 3) or float (batch, 3, {side}, {side}),"
                f" got {image.dtype} {image.shape}; crop and resize it first"
            )
        if not np.isfinite(image).all():
            raise UserError("image: has values that are not finite")
        return np.ascontiguousarray(image, dtype=np.float32)
