"""Run one clip that is exported as a network; numpy and ONNX Runtime alone."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import DECODER, Array, Opened, to_pixels

__all__ = ["SingleClipBundle"]

AT_ONCE = 8  # frames that a network paints at once


class SingleClipBundle(Opened):
    """One clip, as a network that paints its frames.

    Attributes:
        frames: Number of its frames.
        height: Height of a frame, in pixels.
        width: Width of a frame, in pixels.
        frame_rate: Frames a second; None if unknown.
    """

    modality = "clip"
    graphs = (DECODER,)

    def _read(self) -> None:
        self.frames, self.height, self.width = (int(self.config[key]) for key in ("frames", "height", "width"))
        rate = self.config.get("frame_rate")
        self.frame_rate = None if rate is None else float(rate)

    def __repr__(self) -> str:
        return f"SingleClipBundle({str(self.folder)!r}: {self.frames} frames of {self.width} x {self.height} pixels)"

    def describe(self, files: Mapping[str, int]) -> dict[str, Any]:
        """Return what a user should know, as plain values."""
        return {"signals": f"one clip of {self.frames} frames", "rates": {"file": f"{files['weights.bin']} bytes"}}

    def decode(self, frames: Any = None) -> npt.NDArray[np.uint8]:
        """Paint frames, in any order: uint8 `(t, h, w, 3)`.

        Args:
            frames: Their numbers, from 0 on, or one number; all if None.

        Raises:
            UserError: It has no such frame.
        """
        numbers = np.atleast_1d(np.asarray(range(self.frames) if frames is None else frames))
        if numbers.dtype.kind not in "iu" or numbers.ndim != 1:
            raise UserError(f"frames: whole numbers (t,) are expected, got {numbers.dtype} {numbers.shape}")
        for wrong in numbers[(numbers < 0) | (numbers >= self.frames)]:
            raise UserError(f"frames: {wrong} is not there; this clip has 0 to {self.frames - 1}")
        blocks = (numbers[at : at + AT_ONCE] for at in range(0, len(numbers), AT_ONCE))
        painted = [to_pixels(self.run_decoder(block.astype(np.int64))) for block in blocks]
        return np.concatenate(painted)

    def run_decoder(self, numbers: Array) -> npt.NDArray[np.float32]:
        """Paint frames of these numbers, int64 `(t,)`: float32 `(t, 3, h, w)` in [-1, 1]; nothing is checked."""
        graph = self._decoder
        painted: npt.NDArray[np.float32] = graph.run(None, {graph.get_inputs()[0].name: numbers})[0]
        return painted
