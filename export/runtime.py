"""Runs an exported bundle with numpy and ONNX Runtime; neither torch nor the rest of varitok is needed.

Only ONNX graphs and JSON are read, which are data; nothing in a bundle is executed as code.
"""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .clips import ClipBundle, FeatureBundle, VideoBundle
from .graphs import (
    AGAIN,
    DECODER_INT8,
    FORMAT_VERSION,
    Array,
    Bundle,
    onnx_runtime,
    read_json,
    tensors,
    to_pixels,
    verify_files,
)
from .stream import DecodingStream, EncodingStream, stream_form

__all__ = ["ClipBundle", "FeatureBundle", "ImageBundle", "SoundBundle", "VideoBundle", "load"]


def load(
    path: str | PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    verify: bool = True,
    int8: bool = False,
) -> "ImageBundle | SoundBundle | VideoBundle | FeatureBundle | ClipBundle":
    """Open an exported bundle.

    Args:
        path: The bundle's folder; or `hf://OWNER/NAME`, `hf://OWNER/NAME@REVISION` on the Hugging Face hub.
        providers: ONNX Runtime's execution providers, best first; the CPU where None.
        verify: Compare the files that will be read with their recorded checksums.
        int8: Decode by a decoder of 8-bit weights, which is smaller, faster and not quite the same; what goes chunk by
            chunk stays exact.

    Raises:
        UserError: It is not a bundle, a file is missing or altered, its format is unknown, or a provider isn't there.
    """
    if str(path).startswith("hf://"):
        from .hub import fetched  # noqa: PLC0415 (an extra)

        path = fetched(str(path).removeprefix("hf://"))
    folder = Path(path)
    config = read_json(folder / "config.json")
    version = config.get("format_version")
    if version != FORMAT_VERSION:
        known = f"this varitok reads format {FORMAT_VERSION}"
        raise UserError(f"{folder / 'config.json'}: format_version {version!r}, {known}; update varitok or {AGAIN}")
    kinds: dict[Any, type[ImageBundle | SoundBundle | VideoBundle | ClipBundle]] = {
        "image": ImageBundle,
        "audio": SoundBundle,
        "video": VideoBundle,
        "features": FeatureBundle,
        "clip": ClipBundle,
    }
    if config.get("modality") not in kinds:
        raise UserError(
            f"{folder / 'config.json'}: modality {config.get('modality')!r} is not known; update varitok or {AGAIN}"
        )
    kind = kinds[config["modality"]]
    for name in kind.graphs:
        if not (folder / name).is_file():
            raise UserError(f"{folder / name}: missing; {AGAIN}, with onnx among its formats")
    if int8 and not (folder / DECODER_INT8).is_file():
        raise UserError(f"{folder / DECODER_INT8}: missing; {AGAIN} --formats safetensors,torchscript,onnx,onnx_int8")
    if verify:
        verify_files(folder, kind.graphs)
    available = onnx_runtime().get_available_providers()
    for provider in providers or ():
        if provider not in available:
            raise UserError(f"providers: {provider} is not there; this ONNX Runtime has {', '.join(available)}")
    return kind(folder, config, list(providers or ["CPUExecutionProvider"]), int8)


class ImageBundle(Bundle):
    """A tokenizer of images.

    Attributes:
        image_size: Side of its images in pixels, S.
    """

    def _read(self) -> None:
        super()._read()
        self.image_size = int(self.config["image_size"])

    def __repr__(self) -> str:
        side, books = self.image_size, " x ".join(str(size) for size in self.book_sizes)
        return f"ImageBundle({str(self.folder)!r}: {side} x {side} images, up to {self.tokens} tokens of {books} codes)"

    @tensors
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
        return self.run_encoder(self.values(image))[..., :kept]

    def pixels(self, signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Turn images `(b, c, h, w)` in [-1, 1] into uint8 `(b, h, w, c)`, rounded to the nearest."""
        return to_pixels(signal)

    def values(self, image: Any) -> npt.NDArray[np.float32]:
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
    """

    def _read(self) -> None:
        super()._read()
        self.sample_rate = int(self.config["sampling_rate"])
        self.hop = int(self.config["hop_length"])

    def __repr__(self) -> str:
        rate, books = self.sample_rate / self.hop, " x ".join(str(size) for size in self.book_sizes)
        return f"SoundBundle({str(self.folder)!r}: {self.sample_rate} Hz, {rate:g} tokens of {books} codes a second)"

    @tensors
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
        self._check_rate(sample_rate)
        kept = self.kept(books)
        values = self.values(wave)
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
        self._check_rate(sample_rate)
        kept = self.kept(books)
        graph = self.streaming_graphs[0]
        return EncodingStream(graph, self.values, stream_form(self.config, "encoder"), batch, kept)

    def decoding(self, *, batch: int = 1) -> DecodingStream:
        """Start a stream of codes into sound: all its sound together is what `decode` gives for all codes.

        Args:
            batch: Sounds that go side by side.

        Raises:
            UserError: The codec can't stream.
        """
        graph = self.streaming_graphs[1]
        return DecodingStream(graph, self._codes, stream_form(self.config, "decoder"), batch, self.channels)

    def _check_rate(self, sample_rate: int) -> None:
        if sample_rate != self.sample_rate:
            raise UserError(
                f"sample_rate={sample_rate}: this codec takes {self.sample_rate} Hz; resample the sound before"
            )

    def values(self, wave: Any) -> npt.NDArray[np.float32]:
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
