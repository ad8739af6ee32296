"""A codec of one clip: training is the encoder, a network's weights are the code (NeRV, arXiv 2110.13903, section 3.2).

Each weight is a token, and its codebooks are its bits, the most significant first: a prefix of the codebooks is a
shorter code.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from varitok import UserError

from ..bottlenecks.fsq import ResidualScalarQuantizer
from ..codec import Codec
from ..layout import PlacedLayout
from ..lengths.policy import LengthPolicy
from ..networks.contract import Encoder
from ..networks.nerv import NeRV
from ..result import Quantized, Reconstruction
from .bitplane_coder import CodedPlanes, pack, unpack

__all__ = ["ImplicitCodec"]

FRAMES = 8  # that are painted at once


class _Trained(Encoder):
    """In the encoder's place: one step of the grid is the whole clip, whose latents are the weights themselves."""

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """There is nothing to read: training has put the clip into the decoder."""
        raise NotImplementedError


class _WeightLayout(PlacedLayout):
    """Each weight is a token, whatever a signal's size: all of them take part in each frame.

    Args:
        downsample: The clip's size, which is one step.
        weights: How many there are.
    """

    def __init__(self, downsample: Sequence[int], weights: int) -> None:
        super().__init__(downsample)
        self.weights = weights

    def count(self, size: Sequence[int]) -> int:
        """Count the weights."""
        return self.weights

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the weights for each signal."""
        return torch.full_like(lengths, self.weights)

    def obstacle(self, unit_latents: bool) -> str:
        """Describe why it can't code chunk by chunk."""
        return "its weights are about the whole clip"


class ImplicitCodec(Codec):
    """A network that paints one clip, as a codec of that clip.

    Each tensor of weights is spread evenly between its smallest and its largest (both float16), and cut in halves again
    and again: with k bits there are 2^k levels. What is counted are the bytes of `compress`.

    Args:
        decoder: Paints the clip.
        bottleneck: Bits of a weight: residual codebooks of two levels.
        length: Its `codebooks` draw the number of bits kept in training, so that weights learn to be rounded; without
            it, weights are trained in full precision and rounded afterwards, as published.
        frame_rate: Frame rate of the clip; None if unknown.

    Raises:
        UserError: The bottleneck has codebooks of another kind.
    """

    decoder: NeRV
    meanings = {  # noqa: RUF012 (never changed)
        "codebooks": "bits kept of each weight, the most significant first",
        "bits": "8 * bytes",
        "bytes": "of the coded weights: ranges of all tensors, chances, entropy-coded bits; they decode to the weights",
    }
    """Definitions of table columns that differ from those of other codecs."""

    def __init__(
        self,
        decoder: NeRV,
        bottleneck: ResidualScalarQuantizer,
        length: LengthPolicy,
        frame_rate: float | None = None,
    ) -> None:
        if not isinstance(bottleneck, ResidualScalarQuantizer) or set(bottleneck.codebook_sizes) != {2}:
            raise UserError(
                "bottleneck: a weight's codebooks are bits; give bottleneck=fsq_residual bottleneck.levels=[2]"
            )
        encoder = _Trained(width=decoder.width, downsample=decoder.downsample, channels=decoder.channels, direct=True)
        super().__init__(encoder, bottleneck, decoder, length, frame_rate=frame_rate)
        self.layout = _WeightLayout(self.downsample, self.weights)
        # Of grids of two levels the cells go from -2 to 2; this is the middle of the outermost.
        self.edge = 2 - 2 / 2**self.num_codebooks

    @property
    def weights(self) -> int:
        """Count the weights: tokens of the code."""
        return sum(weight.numel() for weight in self.decoder.parameters())

    @torch.no_grad()
    def ranges(self) -> Tensor:
        """Return each tensor's smallest and largest weight, float16 `(tensors, 2)`."""
        ends = [torch.stack(weight.aminmax()) for weight in self.decoder.parameters()]
        return torch.stack(ends).half()

    def _spread(self, ranges: Tensor) -> tuple[Tensor, Tensor]:
        """Return the middle of each weight's range, and half of its size, `(n,)`."""
        low, high = ranges.to(next(self.parameters()).device).float().T
        counts = torch.tensor([weight.numel() for weight in self.decoder.parameters()], device=low.device)
        half = ((high - low) / 2).clamp(min=1e-8)  # biases that nothing has moved yet
        return ((low + high) / 2).repeat_interleave(counts), half.repeat_interleave(counts)

    def features(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the weights as latents `(b, n, 1)`, the same for each signal.

        Raises:
            UserError: A signal is not of the clip's size.
        """
        if tuple(signal.shape[2:]) != self.downsample:
            there, own = (" x ".join(map(str, sides)) for sides in (signal.shape[2:], self.downsample))
            raise UserError(f"clip of {there}: this codec is of one clip alone, of {own} frames, rows and columns")
        return self._flat().expand(len(signal), -1, -1)

    def _flat(self) -> Tensor:
        """Return the weights as latents `(1, n, 1)`."""
        middle, half = self._spread(self.ranges())
        flat = torch.cat([weight.flatten() for weight in self.decoder.parameters()])
        # Ends that float16 has rounded inwards are beyond 1, by less than half of a cell.
        most = 1 + 0.5**self.num_codebooks
        levels = ((flat - middle) / half).clamp(-most, most) * self.edge
        # The bottleneck bounds latents by a hyperbolic tangent; weights are bounded already.
        return (2 * torch.atanh(levels / 2))[None, :, None]

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return the weights' bits, int64 `(b, bits, n)`, whatever is in the clip."""
        return self.bottleneck.encode(self.latents(signal))

    def painter(self, codes: Tensor, ranges: Tensor | None = None) -> dict[str, Tensor]:
        """Turn the first bits of all weights, int64 `(1, bits, n)`, into the network's weights by name.

        Args:
            codes: As `encode` gives them; a prefix of the bits is allowed.
            ranges: Ranges of their tensors; this network's if None.
        """
        return self._to_weights(self.bottleneck.decode(codes), self.ranges() if ranges is None else ranges)

    def _to_weights(self, latents: Tensor, ranges: Tensor) -> dict[str, Tensor]:
        """Turn what the bottleneck gives, `(1, n, 1)`, into the network's weights by name."""
        middle, half = self._spread(ranges)
        flat = middle + latents[0, :, 0] / self.edge * half
        named = dict(self.decoder.named_parameters())
        parts = torch.split(flat, [weight.numel() for weight in named.values()])
        return {name: part.view_as(named[name]) for name, part in zip(named, parts, strict=True)}

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Paint the clip from the first bits of all weights: `(b, 3, frames, height, width)`."""
        numbers = torch.arange(self.downsample[0], device=codes.device)
        return torch.stack([self.render(one, numbers) for one in torch.split(codes, 1)]).transpose(1, 2)

    def render(self, codes: Tensor, numbers: Tensor) -> Tensor:
        """Paint the frames of these numbers, int64 `(n,)`, from bits `(1, bits, n)`: `(n, 3, height, width)`."""
        weights = self.painter(codes)
        return torch.cat([functional_call(self.decoder, weights, (some,)) for some in torch.split(numbers, FRAMES)])

    def forward(
        self, signal: Tensor, lengths: Tensor | None = None, n_codebooks: Tensor | None = None
    ) -> Reconstruction:
        """Send the clip through its code, with all codebooks."""
        codes = self.encode(signal)
        return Reconstruction(self.decode(codes), Quantized(self.bottleneck.decode(codes), codes, {}, {}))

    def frames(self, numbers: Tensor, steps: int = 1, n_codebooks: Tensor | None = None) -> Reconstruction:
        """Render segments of frames, for training.

        Args:
            numbers: int64 `(b,)`, index of each segment's first frame.
            steps: Frames of a segment.
            n_codebooks: int64 `(b,)`, number of bits kept of all weights; only the first sample's counts. None: the
                weights in full precision.
        """
        every = (numbers[:, None] + torch.arange(steps, device=numbers.device)).flatten()
        if n_codebooks is None:
            painted = self.decoder(every)
            quantized = Quantized(painted[:0], numbers[:0], {}, {})  # nothing is
        else:
            quantized = self.bottleneck(self._flat(), n_codebooks.new_full((1,), self.weights), n_codebooks[:1])
            painted = functional_call(self.decoder, self._to_weights(quantized.latents, self.ranges()), (every,))
        return Reconstruction(painted.unflatten(0, (len(numbers), steps)).transpose(1, 2), quantized)

    def compress(self, codes: Tensor) -> CodedPlanes:
        """Code the bits of all weights, int64 `(1, bits, n)`: a file's bytes, which may be cut at its `ends`."""
        head = self.ranges().cpu().numpy().astype("<f2").tobytes()
        packed = pack(codes[0].cpu().numpy().astype(np.uint8))
        return CodedPlanes(head + packed.data, [len(head) + end for end in packed.ends])

    def read(self, data: bytes) -> tuple[Tensor, Tensor]:
        """Return the bits and ranges from the bytes of `compress`; the first bits if these were cut.

        Raises:
            UserError: The bytes are not such weights.
        """
        tensors = sum(1 for _ in self.decoder.parameters())
        try:
            ranges = np.frombuffer(data, "<f2", 2 * tensors).reshape(tensors, 2)
            planes = unpack(data[4 * tensors :], self.weights)
        except ValueError as error:
            raise UserError(f"coded weights: {len(data)} bytes are damaged, or another network's") from error
        return torch.from_numpy(planes.astype(np.int64))[None], torch.from_numpy(ranges.astype(np.float16))
