"""What bundles of images and clips share: signals whose last two axes are height and width."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import Array, Bundle, to_pixels
from .memory import Side
from .tiling import Tile, decode_tiled, encode_tiled

__all__ = ["PixelBundle"]


class PixelBundle(Bundle):
    """An exported codec of images or clips, of any height and width if its tokens are on a grid.

    Attributes:
        given: Noun for the input in error messages.
        sides: Names of the axes of a signal.
        steps: Names of the axes of a token's box.
        unit: Unit of height and width.
        frame_size: Height and width of images or frames; None for any.
    """

    given: ClassVar[str]
    sides: ClassVar[str]
    steps: ClassVar[str]
    unit: ClassVar[str] = "pixels"
    frame_size: tuple[int, ...] | None = None

    def pixels(self, signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Convert signals `(b, c, *grid)` in [-1, 1] to uint8 `(b, *grid, c)`, rounded to the nearest integer."""
        return to_pixels(signal)

    def values(self, signal: Any) -> npt.NDArray[np.float32]:
        """Convert images or clips, perhaps of zero frames, to float32 `(b, c, *grid)` in [-1, 1]."""
        values, c, axes = np.asarray(signal), self.channels, len(self.hops)
        if values.dtype == np.uint8:
            values = values[None] if values.ndim == axes + 1 else values
            if values.ndim != axes + 2 or values.shape[-1] != c or not all((len(values), *values.shape[-3:-1])):
                raise UserError(f"{self.given}: pixels ({self.sides}, {c}) are expected, got {np.shape(signal)}")
            # (b, *grid, c) -> (b, c, *grid)
            return np.moveaxis(self._fit(values), -1, 1).astype(np.float32) / np.float32(127.5) - 1
        if values.dtype.kind != "f":
            raise UserError(f"{self.given}: uint8 pixels or floats in [-1, 1] are expected, got {values.dtype}")
        if values.ndim != axes + 2 or values.shape[1] != c or not all((len(values), *values.shape[-2:])):
            shape = f"(batch, {c}, {self.sides})"
            raise UserError(f"{self.given}: float values {shape} are expected, got {values.shape}")
        if not np.abs(values).max(initial=0) <= 1 + 1e-3:  # also False for NaN
            raise UserError(f"{self.given}: float values must be numbers in [-1, 1]; some aren't")
        self._check_size(*values.shape[-2:])
        return values.astype(np.float32)

    def encode_values(
        self,
        values: npt.NDArray[np.float32],
        *,
        tokens: int | None = None,
        num_codebooks: int | None = None,
        tile: Tile | None = None,
    ) -> Array:
        """Encode the output of `values`, larger images or frames than `tile` in tiles; see `encode`."""
        encode = partial(super().encode_values, tokens=tokens, num_codebooks=num_codebooks)
        tile = self._usual_tile("encoder") if tile is None else tile
        return encode(values) if tile is None else encode_tiled(encode, values, self._get_tile_steps(), tile)

    def _usual_tile(self, side: Side) -> Tile | None:
        """Return the tile of `encode` or `decode` if the caller gives none; None: signals are coded whole."""
        return None

    def _fit(self, pixels: Array) -> Array:
        """Return pixels `(b, *grid, c)` of the codec's size."""
        self._check_size(*pixels.shape[-3:-1])
        return pixels

    def _grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the number of steps of each axis of a signal of a size, rounded up."""
        pads = (self.causal_pad, *(0 for _ in size[1:]))
        return tuple(-(-(side + pad) // step) for side, pad, step in zip(size, pads, self.hops, strict=True))

    def _decode(self, codes: Any, size: Sequence[int] | None, tile: Tile | None) -> npt.NDArray[np.float32]:
        """Decode codes, larger grids than `tile` in tiles; crop the signals to `size` if given."""
        codes = self._codes(codes)
        if self.tokens:
            self._check_tokens(codes.shape[-1])
        if not codes.size:
            raise UserError(f"codes: shape {codes.shape} has none")
        if size is not None:
            self._check_grid(codes, size)
        if tile is None:
            tile = self._usual_tile("decoder")
        if tile is None:
            signal = self.run_decoder(codes)
        else:
            signal = decode_tiled(self.run_decoder, codes, self._get_tile_steps(), tile)
        return signal if size is None else signal[tuple(map(slice, (*signal.shape[:2], *size)))]

    def _check_grid(self, codes: Array, size: Sequence[int]) -> None:
        """Check that codes `(b, codebooks, *grid)` are of signals of a size."""
        if len(size) != len(self.hops) or min(size) < 1:
            raise UserError(f"size: ({self.sides}), each 1 or more, are expected, got {tuple(size)}")
        grid = self._grid(size)
        if self.tokens:
            self._check_tokens(codes.shape[-1])
            self._check_size(*size[-2:])
            grid = *grid[:-2], codes.shape[-1]
        if grid != codes.shape[2:]:
            raise UserError(f"size: {tuple(size)} has codes {grid}, these are {codes.shape[2:]}")

    def _get_tile_steps(self) -> tuple[int, ...]:
        """Return the downsampling factors of height and width; raise an error if frames can't be tiled."""
        if self.tokens:
            raise UserError("tile: this codec's frames have a fixed size; encode and decode them whole")
        return self.hops[-2:]

    def _check_size(self, height: int, width: int) -> None:
        if self.frame_size not in (None, (height, width)):
            assert self.frame_size is not None
            there = " x ".join(map(str, reversed(self.frame_size)))
            raise UserError(
                f"{self.given}: {width} x {height} {self.unit}, this codec takes {there}; resize them first"
            )

    def _describe_grid(self) -> dict[str, Any]:
        """Return the box of a token on a grid, and its bits per pixel."""
        rate = self.bits(1) / math.prod(self.hops)
        return {
            "tokens": f"one for {' x '.join(map(str, self.hops))} {self.steps}",
            "rates": {"all codebooks": f"{rate:.4g} bits a pixel"},
        }
