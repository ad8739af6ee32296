"""A bundle in the shape of a codec, so that what measures and shows codecs takes bundles too."""

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from varitok import UserError
from varitok.codecs.layout import token_layout
from varitok.codecs.modalities.registry import modality_of

from ..bitstream.rate_control import Quality
from ..runtime.bundle import Bundle, Opened

__all__ = ["BundleCodec", "as_codec", "quality"]


class BundleCodec:
    """A bundle's graphs with a codec's methods (`varitok.codecs.evaluation.ladder.Evaluable`), on the CPU.

    Args:
        bundle: A bundle of any modality.

    Attributes:
        layout: The layout of its tokens.
        tokens: The most tokens of a signal, N; 0 for tokens on a grid.
        downsample: Samples of each axis per step of the codes' grid.
        bounded: Whether signals are in [-1, 1]; features aren't.
        sample_rate: Sample rate of audio, in Hz; None for other modalities.
        frame_rate: Frame rate of video; None if unknown.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokens = bundle.tokens
        self.bottleneck = SimpleNamespace(
            codebook_sizes=bundle.codebook_sizes, codebook_strides=bundle.codebook_strides
        )
        self.bounded = bundle.config.get("value_range") is not None
        self.sample_rate = bundle.sample_rate
        self.frame_rate = bundle.frame_rate
        self.downsample = bundle.hops
        self.layout = token_layout(self.downsample, bundle.causal_pad, bundle.tokens, bundle.config.get("later_tokens"))

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Count the payload bits of `tokens` tokens, exactly; of the first `num_codebooks`, all if None."""
        return self.bundle.bits(tokens, num_codebooks)

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn signals `(b, c, *grid)` into codes; all of a batch are taken as valid."""
        return torch.from_numpy(self.bundle.encode_values(self.bundle.values(signal.numpy())))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Turn codes, or a prefix of them, into signals of whole steps, or of a size."""
        back = torch.from_numpy(self.bundle.decode(codes.numpy()))
        for axis, side in enumerate(size or ()):
            back = back.narrow(2 + axis, 0, side)
        return back


def quality(bundle: Bundle, name: str, wanted: float) -> Quality:
    """Ask for a quality by one of the evaluation's metrics, measured as there.

    Args:
        bundle: A bundle of any modality.
        name: Name of the metric, one that compares signals one by one.
        wanted: The value to reach.

    Raises:
        UserError: The metric is unknown, compares many signals at once, or lacks what it needs.
    """
    modality = modality_of(BundleCodec(bundle))
    compare = modality.comparison(name, "cpu")

    def measure(back: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> float:
        fake, real = (modality.as_written(torch.from_numpy(np.ascontiguousarray(side))) for side in (back, original))
        return float(compare(fake, real, torch.tensor([original.shape[2]])))

    return Quality(name, wanted, measure, not modality.metric(name).higher_is_better)


def as_codec(bundle: Opened) -> BundleCodec:
    """Wrap a bundle as a codec.

    Raises:
        UserError: It is of one clip, and has nothing that encodes.
    """
    if not isinstance(bundle, Bundle):
        raise UserError(f"{bundle.folder}: a bundle of one clip has no encoder; name the run that it comes from")
    return BundleCodec(bundle)
