"""Run an exported codec of vision-transformer features of clips, with NumPy and ONNX Runtime."""

from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .video import VideoBundle

__all__ = ["FeatureBundle"]


class FeatureBundle(VideoBundle):
    """An exported codec of a vision transformer's features of clips, unbounded floats `(b, c, t, h, w)`.

    Codes, blocks and streams are those of a `VideoBundle`. Inputs are standardized features; outputs are not clamped.

    Example:
        >>> bundle = varitok.load("feature_tokenizer")
        >>> features = np.random.default_rng(0).normal(size=(1, 8, 4, 16, 16))  # (b, c, t, h, w)
        >>> codes = bundle.encode(bundle.standardize(features))
        >>> bundle.restore_scale(bundle.decode(codes)).shape
        (1, 8, 4, 16, 16)
    """

    modality = "features"
    suffixes = written = ()  # no media format stores features
    unit = "positions"

    def standardize(self, features: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Standardize each channel of features `(b, c, t, h, w)`: (x - mean) / deviation, both from config.json."""
        return (self.values(features) - self._of_channels("feature_mean")) / self._of_channels("feature_deviation")

    def restore_scale(self, clips: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Undo `standardize` for decoded clips: x deviation + mean."""
        return self.values(clips) * self._of_channels("feature_deviation") + self._of_channels("feature_mean")

    def _of_channels(self, name: str) -> npt.NDArray[np.float32]:
        return np.array(self.config[name], np.float32)[:, None, None, None]

    def pixels(self, clips: npt.ArrayLike) -> npt.NDArray[np.uint8]:
        """Raise an error: this codec's output is features, not pixels.

        Raises:
            UserError: Always.
        """
        raise UserError("pixels: this codec decodes to features; a generator must turn them into pixels")

    def values(self, frames: Any) -> npt.NDArray[np.float32]:
        """Check feature clips, perhaps of zero frames; return float32 `(b, c, t, h, w)`."""
        values, shape = np.asarray(frames), f"(batch, {self.channels}, frames, rows, columns)"
        if values.dtype.kind != "f":
            raise UserError(f"frames: features are expected, floats {shape}, got {values.dtype}")
        if values.ndim != 5 or values.shape[1] != self.channels or not all(values.shape[3:]) or not values.shape[0]:
            raise UserError(f"frames: features {shape} are expected, got {values.shape}")
        if not np.isfinite(values).all():
            raise UserError("frames: features must be finite; some are NaN or infinite")
        self._check_size(*values.shape[3:])
        return values.astype(np.float32)
