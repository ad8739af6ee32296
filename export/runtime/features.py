"""Run an exported codec of features that a vision transformer sees in clips; numpy and ONNX Runtime alone."""

from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .video import VideoBundle

__all__ = ["FeatureBundle"]


class FeatureBundle(VideoBundle):
    """A codec of the features that a vision transformer sees in clips: floats of any size, standardized.

    Codes, blocks and streams are those of a `VideoBundle`; the output is not clamped, and has no `pixels`. The round
    trip in the transformer's scale is `codec.restore_scale(codec.decode(codec.encode(codec.standardize(features))))`.
    """

    modality = "features"
    suffixes = written = ()  # no file holds features
    unit = "positions"

    def standardize(self, features: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Bring each channel of a transformer's features `(b, c, t, rows, columns)` to mean 0 and variance 1."""
        return (self.values(features) - self._of_channels("feature_mean")) / self._of_channels("feature_deviation")

    def restore_scale(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Return decoded clips in the scale of a transformer's features."""
        return self.values(clips) * self._of_channels("feature_deviation") + self._of_channels("feature_mean")

    def _of_channels(self, name: str) -> npt.NDArray[np.float32]:
        return np.array(self.config[name], np.float32)[:, None, None, None]

    def pixels(self, clips: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Refuse: what this codec gives back are features.

        Raises:
            UserError: Always.
        """
        raise UserError("pixels: this codec gives features back, from which a generator has to paint")

    def values(self, frames: Any) -> npt.NDArray[np.float32]:
        """Check feature clips, perhaps of no frames: float32 `(b, c, t, rows, columns)`."""
        values, shape = np.asarray(frames), f"(batch, {self.channels}, frames, rows, columns)"
        if values.dtype.kind != "f":
            raise UserError(f"frames: features are expected, floats {shape}, got {values.dtype}")
        if values.ndim != 5 or values.shape[1] != self.channels or not all(values.shape[3:]) or not values.shape[0]:
            raise UserError(f"frames: features {shape} are expected, got {values.shape}")
        if not np.isfinite(values).all():
            raise UserError("frames: some features aren't numbers")
        self._check_size(*values.shape[3:])
        return values.astype(np.float32)
