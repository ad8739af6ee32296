"""Adapter from bundles to the codec interface, so that evaluation and reports accept bundles."""

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
    """A bundle with a codec's methods on torch tensors (`varitok.codecs.evaluation.ladder.Evaluable`), on the CPU.

    Args:
        bundle: A bundle of any modality.

    Attributes:
        layout: Token layout.
        tokens: Maximum number of ordered tokens, N; 0 for tokens on a grid.
        downsample: Downsampling factor of each axis of the signal.
        bounded: Whether signals are in [-1, 1]; features aren't.
        sample_rate: Sample rate of audio, in Hz; None for other modalities.
        frame_rate: Frame rate of video, in frames per second; None if unknown.
    """

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.tokens = bundle.tokens
        self.bottleneck = SimpleNamespace(
            codebook_sizes=bundle.codebook_sizes,
            codebook_strides=bundle.codebook_strides,
            codebook_layers=bundle.codebook_layers,
        )
        self.bounded = bundle.config.get("value_range") is not None
        self.sample_rate = bundle.sample_rate
        self.frame_rate = bundle.frame_rate
        self.downsample = bundle.hops
        self.layout = token_layout(
            bundle.hops, bundle.causal_pad, bundle.tokens, bundle.config.get("later_tokens"), bundle.multiple
        )

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Return the exact payload in bits of `tokens` tokens in the first `num_codebooks` codebooks, all if None."""
        return self.bundle.bits(tokens, num_codebooks)

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode signals `(b, c, *grid)`; `lengths` is ignored."""
        return torch.from_numpy(self.bundle.encode_values(self.bundle.values(signal.numpy())))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Decode codes `(b, codebooks, *grid)`, or a prefix of them; crop the signals to `size` if given."""
        back = torch.from_numpy(self.bundle.decode(codes.numpy()))
        for axis, side in enumerate(size or ()):
            back = back.narrow(2 + axis, 0, side)
        return back


def quality(bundle: Bundle, name: str, wanted: float) -> Quality:
    """Return a target quality by one of the evaluation's metrics, under the same protocol.

    Args:
        bundle: A bundle of any modality.
        name: Name of a metric of single signals.
        wanted: Value to reach.

    Raises:
        UserError: The metric is unknown, needs a set of signals, or lacks a package or weights.
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
        UserError: The bundle is of one clip, and has no encoder.

    Example:
        >>> import torch
        >>> codec = as_codec(varitok.load("image_tokenizer"))
        >>> codec.decode(codec.encode(torch.zeros(2, 3, 16, 16))[..., :4]).shape  # the first 4 tokens
        torch.Size([2, 3, 16, 16])
    """
    if not isinstance(bundle, Bundle):
        raise UserError(f"{bundle.folder}: a bundle of one clip has no encoder; name the run that it comes from")
    return BundleCodec(bundle)
