"""Run an exported implicit codec, a network that represents one clip, with NumPy and ONNX Runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .bundle import DECODER, Array, Opened, to_pixels

__all__ = ["SingleClipBundle"]

AT_ONCE = 8  # frames per call of the graph


class SingleClipBundle(Opened):
    """One clip as a network that maps a frame's index to its pixels.

    Attributes:
        frames: Number of frames.
        height: Height of the frames in pixels.
        width: Width of the frames in pixels.
        frame_rate: Frames per second; None if unknown.
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
        """Return a summary as JSON-serializable values."""
        return {"signals": f"one clip of {self.frames} frames", "rates": {"file": f"{files['weights.bin']} bytes"}}

    def decode(self, frames: Any = None) -> npt.NDArray[np.uint8]:
        """Decode frames in any order: uint8 `(t, h, w, 3)`.

        Args:
            frames: Frame indices from 0 on, `(t,)` or one integer; all if None.

        Raises:
            UserError: An index is out of range.

        Example:
            >>> clip = varitok.load("clip")
            >>> clip.decode([5, 0]).shape
            (2, 16, 16, 3)
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
        """Decode frames by their indices, int64 `(t,)`, without checks: float32 `(t, 3, h, w)` in [-1, 1]."""
        graph = self._decoder
        painted: npt.NDArray[np.float32] = graph.run(None, {graph.get_inputs()[0].name: numbers})[0]
        return painted
