"""Runs an exported bundle with numpy and ONNX Runtime; neither torch nor the rest of varitok is needed.

Only ONNX graphs and JSON are read, which are data; nothing in a bundle is executed as code.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .stream import DecodingStream, EncodingStream

__all__ = ["DECODER", "ENCODER", "FORMAT_VERSION", "Bundle", "ImageBundle", "SoundBundle", "load"]

FORMAT_VERSION = 1
ENCODER, DECODER = "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"
STREAMING = "onnx/encoder_model_streaming.onnx", "onnx/decoder_model_streaming.onnx"
AGAIN = "export it again with varitok-export"

Array = npt.NDArray[Any]


def load(
    path: str | PathLike[str], *, providers: Sequence[str] | None = None, verify: bool = True
) -> "ImageBundle | SoundBundle":
    """Open an exported bundle.

    Args:
        path: The bundle's folder.
        providers: ONNX Runtime's execution providers, best first; the CPU where None.
        verify: Compare the files that will be read with their recorded checksums.

    Raises:
        UserError: It is not a bundle, a file is missing or altered, its format is unknown, or a provider isn't there.
    """
    folder = Path(path)
    config = _read_json(folder / "config.json")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        known = f"this varitok reads format {FORMAT_VERSION}"
        raise UserError(f"{folder / 'config.json'}: format_version {version!r}, {known}; update varitok or {AGAIN}")
    for name in (ENCODER, DECODER):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; {AGAIN}, with onnx among its formats")
    if verify:
        _verify(folder)
    available = _runtime().get_available_providers()
    for provider in providers or ():
        if provider not in available:
            raise UserError(f"providers: {provider} is not there; this ONNX Runtime has {', '.join(available)}")
    kinds: dict[Any, type[ImageBundle | SoundBundle]] = {"image": ImageBundle, "audio": SoundBundle}
    if config.get("modality") not in kinds:
        raise UserError(
            f"{folder / 'config.json'}: modality {config.get('modality')!r} is not known; update varitok or {AGAIN}"
        )
    return kinds[config["modality"]](folder, config, list(providers or ["CPUExecutionProvider"]))


class Bundle:
    """An exported codec, opened by `load`: an `ImageBundle` or a `SoundBundle`.

    Each direction's graph is read when it is first used.

    Args:
        folder: Where it lies.
        config: Its config.json.
        providers: ONNX Runtime's execution providers.

    Attributes:
        config: Its config.json.
        tokens: The most tokens of a signal, N; 0 where their number follows from its length.
        channels: Of a signal.
        book_sizes: Entries of each book; none where codes are continuous.
        book_strides: Tokens for which a code of each book stands, itself repeated.
        rows: Rows of a code: books, or the channels of continuous ones.
    """

    def __init__(self, folder: Path, config: dict[str, Any], providers: list[str]) -> None:
        self.folder = folder
        self.config = config
        self.providers = providers
        try:
            self.tokens = int(config["tokens"])
            self.channels = int(config["channels"])
            self.book_sizes = tuple(int(size) for size in config["book_sizes"])
            self.book_strides = tuple(int(step) for step in config.get("book_strides", [1] * len(self.book_sizes)))
            self.rows = int(config.get("code_rows", len(self.book_sizes)))
            self._read()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'}: {error} is missing or wrong; {AGAIN}") from error

    def _read(self) -> None:
        """Take what only one modality has out of the config."""

    def bits(self, tokens: int) -> float:
        """Count the payload bits of `tokens` tokens, exactly."""
        if not self.book_sizes:
            return tokens * 32.0 * self.rows
        books = zip(self.book_sizes, self.book_strides, strict=True)
        return sum(-(-tokens // stride) * math.log2(size) for size, stride in books)

    def decode(self, codes: Any) -> npt.NDArray[np.float32]:
        """Turn codes `(b, books, k)` into signals, float32 `(b, c, *grid)` in [-1, 1].

        Codes may be of any integer type, and a prefix of the books; continuous ones are floats, all channels. k is
        from 1 to N, or any where the number of tokens follows from the signal's length.

        Raises:
            UserError: A shape, type or code that the codec doesn't have.
        """
        codes = self._codes(codes)
        self._check_tokens(codes.shape[2])
        graph = self._decoder
        signal: npt.NDArray[np.float32] = graph.run(None, {graph.get_inputs()[0].name: codes})[0]
        return signal

    def run_encoder(self, signal: npt.NDArray[np.float32]) -> Array:
        """Turn signals, float32 `(b, c, *grid)` in [-1, 1], into codes; nothing is checked."""
        graph = self._encoder
        codes: Array = graph.run(None, {graph.get_inputs()[0].name: signal})[0]
        return codes

    def _codes(self, codes: Any) -> Array:
        """Check codes, of which there may be none yet; give them in the graph's type."""
        codes = np.asarray(codes)
        kind, least, what = ("iu", 1, "whole numbers") if self.book_sizes else ("f", self.rows, "floats")
        if codes.dtype.kind not in kind:
            raise UserError(f"codes: {what} are expected, got {codes.dtype}")
        if codes.ndim != 3 or not least <= codes.shape[1] <= self.rows or not codes.shape[0]:
            rows = f"{least} to {self.rows}" if least < self.rows else self.rows
            most = f"1 to {self.tokens}" if self.tokens else "tokens"
            raise UserError(f"codes: shape (batch, {rows}, {most}) is expected, got {codes.shape}")
        # ONNX Runtime would take -1 for the last entry.
        for book, size in zip(range(codes.shape[1]), self.book_sizes, strict=False):
            low, high = codes[:, book].min(initial=0), codes[:, book].max(initial=0)
            if low < 0 or high >= size:
                raise UserError(f"codes: book {book} has codes 0 to {size - 1}, got {low if low < 0 else high}")
        checked: Array = codes.astype(np.int64 if self.book_sizes else np.float32)
        return checked

    def _check_tokens(self, tokens: int) -> None:
        if tokens < 1 or (self.tokens and tokens > self.tokens):
            raise UserError(f"{tokens} tokens: this codec takes from 1 {f'to {self.tokens}' if self.tokens else 'on'}")

    @cached_property
    def _encoder(self) -> Any:
        return self._session(ENCODER)

    @cached_property
    def _decoder(self) -> Any:
        return self._session(DECODER)

    def _session(self, name: str) -> Any:
        try:
            return _runtime().InferenceSession(str(self.folder / name), providers=self.providers)
        except Exception as error:  # ONNX Runtime's own classes, made in C++
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.folder / name}: ONNX Runtime can't read it ({first}); {AGAIN}") from error


class ImageBundle(Bundle):
    """A tokenizer of images.

    Attributes:
        image_size: Side of its images in pixels, S.
    """

    def _read(self) -> None:
        self.image_size = int(self.config["image_size"])

    def __repr__(self) -> str:
        side, books = self.image_size, " x ".join(str(size) for size in self.book_sizes)
        return f"ImageBundle({str(self.folder)!r}: {side} x {side} images, up to {self.tokens} tokens of {books} codes)"

    def encode(self, image: Any, *, tokens: int | None = None) -> Array:
        """Turn images into codes.

        Args:
            image: A Pillow image, uint8 pixels `(h, w, c)` or `(b, h, w, c)`, or float values `(b, c, S, S)` in
                [-1, 1]. Pillow images and pixels of another size are cropped to their centred square and resized.
            tokens: Keep only so many tokens, 1 to N; all where None.

        Returns:
            int64 `(b, books, tokens)`; float32 `(b, channels, tokens)` where codes are continuous.

        Raises:
            UserError: A shape, type or value that the codec doesn't take.
        """
        kept = self.tokens if tokens is None else tokens
        self._check_tokens(kept)
        return self.run_encoder(self._signal(image))[..., :kept]

    def pixels(self, signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Turn images `(b, c, h, w)` in [-1, 1] into uint8 `(b, h, w, c)`, rounded to the nearest."""
        values = (np.asarray(signal, dtype=np.float32) + 1) * np.float32(127.5)
        return np.moveaxis(np.clip(np.round(values), 0, 255), 1, -1).astype(np.uint8)

    def _signal(self, image: Any) -> npt.NDArray[np.float32]:
        """Bring whatever an image is given as to float32 `(b, c, S, S)` in [-1, 1]."""
        if hasattr(image, "convert"):  # a Pillow image; Pillow itself need not be there
            image = np.asarray(image.convert("RGB" if self.channels == 3 else "L")).reshape(*image.size[::-1], -1)
        values = np.asarray(image)
        side, c = self.image_size, self.channels
        if values.dtype == np.uint8:
            values = values[None] if values.ndim == 3 else values
            if values.ndim != 4 or values.shape[3] != c or not values.size:
                raise UserError(f"image: pixels (height, width, {c}) or (batch, ...) are expected, got {values.shape}")
            if values.shape[1:3] != (side, side):
                values = np.stack([_square(pixels, side) for pixels in values])
            return np.moveaxis(values, -1, 1).astype(np.float32) / np.float32(127.5) - 1
        if values.dtype.kind != "f":
            raise UserError(f"image: uint8 pixels or floats in [-1, 1] are expected, got {values.dtype}")
        if values.ndim != 4 or values.shape[1:] != (c, side, side) or not values.size:
            raise UserError(f"image: float values (batch, {c}, {side}, {side}) are expected, got {values.shape}")
        if not np.abs(values).max() <= 1 + 1e-3:  # NaN too fails this
            raise UserError("image: float values must lie in [-1, 1]; some don't, or aren't numbers")
        return values.astype(np.float32)


class SoundBundle(Bundle):
    """A codec of sounds.

    Attributes:
        sample_rate: Of its sounds, Hz.
        hop: Samples to a token.
        latency_ms: Milliseconds of sound that a stream waits for before it can give a token; None: it can't stream.
    """

    def _read(self) -> None:
        self.sample_rate = int(self.config["sampling_rate"])
        self.hop = int(self.config["hop_length"])
        streaming = self.config.get("streaming")
        self.latency_ms = float(streaming["latency_ms"]) if streaming else None

    def __repr__(self) -> str:
        rate, books = self.sample_rate / self.hop, " x ".join(str(size) for size in self.book_sizes)
        return f"SoundBundle({str(self.folder)!r}: {self.sample_rate} Hz, {rate:g} tokens of {books} codes a second)"

    def encode(self, wave: Any, sample_rate: int, *, books: int | None = None) -> Array:
        """Turn sounds into codes; the last token's sound is filled up with zeros.

        Args:
            wave: float values in [-1, 1] or int16, `(t,)`, `(c, t)` or `(b, c, t)`.
            sample_rate: Of the sounds, Hz. Only the codec's own is taken: resample before.
            books: Keep only so many books; all where None.

        Returns:
            int64 `(b, books, n)`, a token for every `hop` samples begun; float32 where codes are continuous.

        Raises:
            UserError: A shape, type, value or rate that the codec doesn't take.
        """
        kept = self._kept(sample_rate, books)
        values = self._values(wave)
        if not values.size:
            raise UserError(f"wave: samples (batch, {self.channels}, 1 or more) are expected, got {np.shape(wave)}")
        return self.run_encoder(values)[:, :kept]

    def encoding(self, sample_rate: int, *, books: int | None = None, batch: int = 1) -> EncodingStream:
        """Start a stream of sound into codes: it takes chunks of any number of samples.

        All its codes together are those that `encode` gives for the whole sound.

        Args:
            sample_rate: Of the sounds, Hz. Only the codec's own is taken.
            books: Keep only so many books; all where None.
            batch: Sounds that go side by side.

        Raises:
            UserError: The codec can't stream, or a rate or number of books that it doesn't have.
        """
        kept = self._kept(sample_rate, books)
        graph, about = self.streaming_graphs[0], self.config["streaming"]
        return EncodingStream(graph, self._values, int(about["chunk_samples"]), batch, kept)

    def decoding(self, *, batch: int = 1) -> DecodingStream:
        """Start a stream of codes into sound: all its sound together is what `decode` gives for all codes.

        Args:
            batch: Sounds that go side by side.

        Raises:
            UserError: The codec can't stream.
        """
        graph, about = self.streaming_graphs[1], self.config["streaming"]
        return DecodingStream(graph, self._codes, int(about["chunk_tokens"]), batch, self.channels)

    @cached_property
    def streaming_graphs(self) -> tuple[Any, Any]:
        """The encoder's and the decoder's graphs that go chunk by chunk, as ONNX Runtime's sessions.

        Raises:
            UserError: The codec can't stream.
        """
        if self.latency_ms is None:
            raise UserError(f"{self.folder}: this codec can't stream, it looks ahead; encode and decode whole sounds")
        return self._session(STREAMING[0]), self._session(STREAMING[1])

    def _kept(self, sample_rate: int, books: int | None) -> int:
        """Check what is asked for; give the number of books."""
        if sample_rate != self.sample_rate:
            raise UserError(
                f"sample_rate={sample_rate}: this codec takes {self.sample_rate} Hz; resample the sound before"
            )
        kept = self.rows if books is None else books
        if not 1 <= kept <= self.rows or (not self.book_sizes and kept != self.rows):
            raise UserError(
                f"{kept} books: this codec has {self.rows}" + (", or fewer" if self.book_sizes else ", all needed")
            )
        return kept

    def _values(self, wave: Any) -> npt.NDArray[np.float32]:
        """Bring whatever a sound is given as, perhaps of no samples, to float32 `(b, c, t)` in [-1, 1]."""
        values = np.asarray(wave)
        if values.dtype == np.int16:
            values = values.astype(np.float32) / np.float32(32768)
        if values.dtype.kind != "f":
            raise UserError(f"wave: floats in [-1, 1] or int16 are expected, got {values.dtype}")
        values = values.reshape((1,) * (3 - values.ndim) + values.shape) if values.ndim < 3 else values
        if values.ndim != 3 or values.shape[1] != self.channels or not values.shape[0]:
            raise UserError(f"wave: samples (batch, {self.channels}, 1 or more) are expected, got {np.shape(wave)}")
        if not np.abs(values).max(initial=0) <= 1 + 1e-3:  # NaN too fails this
            raise UserError("wave: values must lie in [-1, 1]; some don't, or aren't numbers")
        return values.astype(np.float32)


def _runtime() -> Any:
    try:
        import onnxruntime  # noqa: PLC0415 (looking at a bundle's folder should not need it)
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed; pip install onnxruntime") from error
    return onnxruntime


def _square(pixels: Array, side: int) -> Array:
    """Crop pixels `(h, w, c)` to their centred square and resize it: the protocol of training and evaluation."""
    try:
        from PIL import Image  # noqa: PLC0415 (images of the right size don't need it)
    except ImportError as error:
        raise UserError(f"image: give {side} x {side} pixels, or pip install Pillow to have it resized") from error
    height, width, c = pixels.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = pixels[top : top + short, left : left + short]
    resized = Image.fromarray(square if c > 1 else square[..., 0]).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(resized).reshape(side, side, c)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); is {path.parent} a bundle of varitok?") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged; {AGAIN}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a bundle's; {AGAIN}")
    return found


def _verify(folder: Path) -> None:
    """Compare the files that the runtime reads with export.json."""
    files = _read_json(folder / "export.json").get("files")
    if not isinstance(files, dict) or not {"config.json", ENCODER, DECODER} <= files.keys():
        raise UserError(f"{folder / 'export.json'}: lacks the checksums of the graphs; {AGAIN}")
    for name, known in files.items():
        if name != "config.json" and not name.startswith("onnx/"):
            continue
        path, digest = folder / name, hashlib.sha256()
        if not path.is_file():
            raise UserError(f"{path}: missing; {AGAIN}")
        with path.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != known["sha256"]:
            raise UserError(f"{path}: altered since it was exported; copy the bundle anew or {AGAIN}")
