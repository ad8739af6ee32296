"""Implicit codec of one clip: the code is a network's quantized weights (NeRV, arXiv 2110.13903, section 3.2).

Training replaces the encoder. Each weight is a token, and its codebooks are its bits, most significant first: a prefix
of the codebooks is a shorter code.
"""

from collections.abc import Sequence
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from varitok import UserError

from ..bottlenecks.fsq import ResidualScalarQuantizer
from ..codec import Codec
from ..layout import GridLayout
from ..lengths.policy import LengthPolicy
from ..networks.contract import Encoder
from ..networks.nerv import NeRV
from ..result import Quantized, Reconstruction
from .bitplane_coder import CodedPlanes, pack, unpack

__all__ = ["ImplicitCodec"]

FRAMES = 8  # frames rendered per forward pass


class _Trained(Encoder):
    """Placeholder encoder: one step of the grid is the whole clip, and the latents are the weights."""

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Raise NotImplementedError: training, not an encoder, computes the weights."""
        raise NotImplementedError


class _WeightLayout(GridLayout):
    """Token layout with one token per weight, independent of the signal's size.

    Args:
        downsample: Size of the clip, which is one step.
        weights: Number of weights.
    """

    def __init__(self, downsample: Sequence[int], weights: int) -> None:
        super().__init__(downsample)
        self.weights = weights

    def count(self, size: Sequence[int]) -> int:
        """Return the number of weights."""
        return self.weights

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Return the number of weights for each sample."""
        return torch.full_like(lengths, self.weights)

    def obstacle(self, unit_latents: bool) -> str:
        """Return why the codec can't stream."""
        return "each weight depends on the whole clip"


class ImplicitCodec(Codec):
    """Codec of one clip by an implicit network.

    Each weight tensor is quantized uniformly between its minimum and maximum (both float16), with 2^k levels for k
    bits. The rate is the number of bytes of `compress`.

    Args:
        decoder: Network that renders the clip.
        bottleneck: Residual codebooks of two levels, one per bit of a weight.
        length: Its `codebooks` sample the number of bits kept in training (quantization-aware training); without it,
            weights are trained in full precision and quantized afterwards, as published.
        frame_rate: Frame rate of the clip, in Hz; None if unknown.

    Raises:
        UserError: The bottleneck has other codebooks.
    """

    decoder: NeRV
    counts: Tensor
    meanings = {  # noqa: RUF012 (never changed)
        "codebooks": "bits kept of each weight, the most significant first",
        "bits": "8 * bytes",
        "bytes": "of the coded weights: tensor ranges, probabilities, entropy-coded bits; they decode to the weights",
    }
    """Definitions of table columns that differ from those of other codecs."""

    def __init__(
        self,
        decoder: NeRV,
        bottleneck: ResidualScalarQuantizer,
        length: LengthPolicy,
        frame_rate: Annotated[float | None, "(0, inf)"] = None,
    ) -> None:
        if not isinstance(bottleneck, ResidualScalarQuantizer) or set(bottleneck.codebook_sizes) != {2}:
            raise UserError(
                "bottleneck: each codebook is a bit of a weight; use bottleneck=fsq_residual bottleneck.levels=[2]"
            )
        encoder = _Trained(width=decoder.width, downsample=decoder.downsample, channels=decoder.channels, direct=True)
        super().__init__(encoder, bottleneck, decoder, length, frame_rate=frame_rate)
        self.layout = _WeightLayout(self.downsample, self.weights)
        counts = torch.tensor([weight.numel() for weight in decoder.parameters()])
        self.register_buffer("counts", counts, persistent=False)  # of weights in each tensor
        # Quantization cells of two-level codebooks cover [-2, 2]; this is the center of the outermost cell.
        self.edge = 2 - 2 / 2**self.num_codebooks

    @property
    def weights(self) -> int:
        """Number of weights: the tokens of the code."""
        return sum(weight.numel() for weight in self.decoder.parameters())

    @torch.no_grad()
    def ranges(self) -> Tensor:
        """Return the minimum and maximum of each weight tensor, float16 `(tensors, 2)`."""
        ends = [torch.stack(weight.aminmax()) for weight in self.decoder.parameters()]
        return torch.stack(ends).half()

    def _spread(self, ranges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the center and half the width of each weight's range, `(n,)` each."""
        low, high = ranges.to(next(self.parameters()).device).float().T
        half = ((high - low) / 2).clamp(min=1e-8)  # constant tensors, such as initial biases
        middle, half = torch.stack([(low + high) / 2, half]).repeat_interleave(self.counts, 1, output_size=self.weights)
        return middle, half

    def features(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the weights as latents `(b, n, 1)`, the same for each sample.

        Raises:
            UserError: A sample doesn't have the clip's size.
        """
        if tuple(signal.shape[2:]) != self.downsample:
            there, own = (" x ".join(map(str, sides)) for sides in (signal.shape[2:], self.downsample))
            raise UserError(f"clip of {there} frames, rows and columns: this codec stores one clip of {own}")
        return self._flat().expand(len(signal), -1, -1)

    def _flat(self) -> Tensor:
        """Return the weights as latents `(1, n, 1)`."""
        middle, half = self._spread(self.ranges())
        flat = torch.cat([weight.flatten() for weight in self.decoder.parameters()])
        # float16 may round a range inwards; its ends then exceed 1 by less than half a quantization cell.
        most = 1 + 0.5**self.num_codebooks
        levels = ((flat - middle) / half).clamp(-most, most) * self.edge
        # Invert the bottleneck's tanh, since the weights are bounded already.
        return (2 * torch.atanh(levels / 2))[None, :, None]

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the bits of the weights, int64 `(b, bits, n)`; only the size of `signal` matters."""
        return self.bottleneck.encode(self.latents(signal))

    def painter(self, codes: Tensor, ranges: Tensor | None = None) -> dict[str, Tensor]:
        """Dequantize the bits of all weights, int64 `(1, bits, n)`, to the network's named weights.

        Args:
            codes: Bits from `encode`, or a prefix of them.
            ranges: Ranges of the weight tensors; this network's if None.
        """
        return self._to_weights(self.bottleneck.decode(codes), self.ranges() if ranges is None else ranges)

    def _to_weights(self, latents: Tensor, ranges: Tensor) -> dict[str, Tensor]:
        """Convert quantized latents `(1, n, 1)` to the network's named weights."""
        middle, half = self._spread(ranges)
        flat = middle + latents[0, :, 0] / self.edge * half
        named = dict(self.decoder.named_parameters())
        parts = torch.split(flat, [weight.numel() for weight in named.values()])
        return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Decode bits of all weights, `(b, bits, n)`, into the clip `(b, 3, frames, height, width)`."""
        numbers = torch.arange(self.downsample[0], device=codes.device)
        return torch.stack([self.render(one, numbers) for one in torch.split(codes, 1)]).transpose(1, 2)

    def render(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """Render the frames of these indices, int64 `(f,)`, from bits `(1, bits, n)`: `(f, 3, height, width)`."""
        weights = self.painter(codes)
        return torch.cat([functional_call(self.decoder, weights, (some,)) for some in torch.split(numbers, FRAMES)])

    def forward(
        self,
        signal: Tensor,
        lengths: Tensor | None = None,
        n_codebooks: Tensor | None = None,
        common: int | None = None,
    ) -> Reconstruction:
        """Encode and decode the clip, with all codebooks."""
        codes = self.encode(signal)
        return Reconstruction(self.decode(codes), Quantized(self.bottleneck.decode(codes), codes, {}, {}))

    def frames(self, numbers: Tensor, steps: int = 1, n_codebooks: Tensor | None = None) -> Reconstruction:
        """Render segments of frames, for training.

        Args:
            numbers: int64 `(b,)`, index of each segment's first frame.
            steps: Frames per segment.
            n_codebooks: int64 `(b,)`, bits kept of all weights, the first sample's for all; None for full precision.
        """
        every = (numbers[:, None] + torch.arange(steps, device=numbers.device)).flatten()
        if n_codebooks is None:
            painted = self.decoder(every)
            quantized = Quantized(painted[:0], numbers[:0], {}, {})  # empty: nothing is quantized
        else:
            quantized = self.bottleneck(self._flat(), n_codebooks.new_full((1,), self.weights), n_codebooks[:1])
            painted = functional_call(self.decoder, self._to_weights(quantized.latents, self.ranges()), (every,))
        # (b * steps, 3, h, w) -> (b, 3, steps, h, w)
        return Reconstruction(painted.unflatten(0, (len(numbers), steps)).transpose(1, 2), quantized)

    def compress(self, codes: Tensor) -> CodedPlanes:
        """Entropy-code the bits of all weights, int64 `(1, bits, n)`; the bytes may be cut at any of `ends`."""
        head = self.ranges().cpu().numpy().astype("<f2").tobytes()
        packed = pack(codes[0].cpu().numpy().astype(np.uint8))
        return CodedPlanes(head + packed.data, [len(head) + end for end in packed.ends])

    def read(self, data: bytes) -> tuple[Tensor, Tensor]:
        """Decode the bytes of `compress` to bits, int64 `(1, bits, n)`, and ranges; to fewer bits if they were cut.

        Raises:
            UserError: The bytes are damaged, or those of another network.
        """
        tensors = sum(1 for _ in self.decoder.parameters())
        try:
            ranges = np.frombuffer(data, "<f2", 2 * tensors).reshape(tensors, 2)
            planes = unpack(data[4 * tensors :], self.weights)
        except ValueError as error:
            raise UserError(f"coded weights: {len(data)} bytes are damaged, or of another network") from error
        return torch.from_numpy(planes.astype(np.int64))[None], torch.from_numpy(ranges.astype(np.float16))
