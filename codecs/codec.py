"""The one codec shape: an encoder makes latents, a bottleneck makes codes, a decoder makes the signal back.

              +---------+ (b, n, width)                +-------------+ (b, n, d) +------------+
    signal -->| encoder |----------------------------->| project_in  |---------->|            |--> codes
              +---------+                              +-------------+           | bottleneck |
              +---------+ k of N tokens +--------+     +-------------+ (b, n, d) |            |
    signal <--| decoder |<--------------| length |<----| project_out |<----------|            |<-- codes
              +---------+               +--------+     +-------------+           +------------+

Shapes: b signals, or blocks of clips, each a signal of its own; c channels; q codebooks; n tokens, N the most of them,
k those that are kept; d the bottleneck's width; t, h, w steps in time, rows and columns; grid all axes of a signal, or
of its codes. Codes are `(b, q, *grid)`, ordered ones `(b, q, k)` or `(b, q, t, k)`; see `layout.py`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from .bottlenecks.contract import Bottleneck
from .bottlenecks.perturbation import Perturbation
from .layout import token_layout
from .lengths.distributions import Full
from .lengths.policy import LengthPolicy
from .masking import prefix_mask
from .networks.contract import Decoder, Encoder
from .result import Quantized, Reconstruction

__all__ = ["Codec"]


def _fit(encoder: Encoder, inputs: int, outputs: int) -> nn.Module:
    """Make the map between a network and the bottleneck."""
    if not encoder.direct:
        return nn.Linear(inputs, outputs)
    if inputs != outputs:
        raise UserError(f"codec: widths {inputs} and {outputs} should be equal, there is no map between them")
    return nn.Identity()


class Codec(nn.Module):
    """A variable-length tokenizer.

    Two linear maps fit the bottleneck between networks of any width.

    Args:
        encoder: Signals to latents; see `networks/contract.py`.
        bottleneck: Latents `(b, n, bottleneck.dim)` to codes and back.
        decoder: Latents to signals.
        length: How many tokens and codebooks are kept while training, and how the rest is hidden; its halting head, if
            it has one, learns in the codec's own training step.
        unit_latents: Scale each sample's latents, or each block's, to a root mean square of 1 over width and the tokens
            that all have; on the grid of a clip each token's alone, so that chunks are scaled as the whole. A decoder
            that knows nothing yet hears latents as noise, and its first wish is that they be small: the codes
            collapse. They can't where the scale is given (ours).
        perturbation: Replaces tokens by neighbors in training, so that the decoder tolerates a generator's mistakes;
            None: never.
        sample_rate: Sample rate of audio, in Hz; None for other modalities.
        frame_rate: Frame rate of video; None if unknown, or for other modalities.
        bounded: Signals are in [-1, 1], like pixels and audio; otherwise they are standardized features of any range.

    Attributes:
        feature_mean: Codecs that aren't bounded: mean of each raw channel, `(c,)`. The codec itself takes standardized
            features; a user needs both to standardize raw ones.
        feature_deviation: Standard deviation of each raw channel, `(c,)`.

    Raises:
        UserError: The bottleneck doesn't have the perturbation's neighbors, or placed tokens are to be dropped.
    """

    def __init__(
        self,
        encoder: Encoder,
        bottleneck: Bottleneck,
        decoder: Decoder,
        length: LengthPolicy,
        unit_latents: bool = False,
        perturbation: Perturbation | None = None,
        sample_rate: int | None = None,
        frame_rate: float | None = None,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        if perturbation is not None:
            perturbation.check(bottleneck)
        self.unit_latents = unit_latents
        self.encoder = encoder
        self.project_in = _fit(encoder, encoder.width, bottleneck.dim)
        if isinstance(self.project_in, nn.Linear):
            nn.init.zeros_(self.project_in.bias)  # or quiet signals' latents would be alike
            # Features of unit size give latents of unit size; torch's own start would bring all near one code.
            nn.init.kaiming_normal_(self.project_in.weight, nonlinearity="linear")
        self.bottleneck = bottleneck
        self.project_out = _fit(encoder, bottleneck.dim, decoder.width)
        self.decoder = decoder
        self.length = length
        self.perturbation = perturbation
        self.sample_rate = sample_rate
        self.frame_rate = frame_rate
        self.bounded = bounded
        if not bounded:
            self.register_buffer("feature_mean", torch.zeros(encoder.channels))
            self.register_buffer("feature_deviation", torch.ones(encoder.channels))
        self.layout = token_layout(encoder.downsample, encoder.causal_pad, encoder.tokens, encoder.later_tokens)
        if not self.layout.ordered and not isinstance(length.distribution, Full):
            raise UserError("length: tokens on a grid can't be dropped; choose full or quantizer_dropout")

    @property
    def tokens(self) -> int:
        """The most tokens that a signal, or a block of frames, has, N.

        Raises:
            UserError: The codec has tokens on a grid.
        """
        if not self.layout.ordered:
            raise UserError("this codec has tokens on a grid: their number follows from the signal's size")
        return self.layout.tokens

    @property
    def downsample(self) -> tuple[int, ...]:
        """Samples (pixels, frames) of each axis to a step of the grid."""
        return tuple(self.layout.downsample)

    @property
    def num_codebooks(self) -> int:
        """How many codebooks each token has; 0 if the bottleneck is continuous."""
        return len(self.bottleneck.codebook_sizes)

    @property
    def runs(self) -> bool:
        """Whether unchanged tokens repeat, so that a run is coded once."""
        return self.encoder.repeats

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Count the payload bits of `tokens` tokens, exactly; of the first `num_codebooks`, all if None."""
        return self.bottleneck.payload(tokens, num_codebooks)

    def features(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the encoder alone: `(b, n, encoder.width)`, what the halting head reads.

        Args:
            signal: `(b, c, *grid)`; the last steps of the grid are filled up (`TokenLayout.pad`).
            lengths: int64 `(b,)`, valid tokens; all if None.

        Raises:
            UserError: The patch doesn't divide the image's sides.
        """
        grid, whole = self.layout.grid(signal.shape[2:]), self.layout.pad(signal, self.layout.causal_pad)
        mask = None if lengths is None or self.layout.ordered else prefix_mask(lengths, math.prod(grid))
        features: Tensor = self.encoder(whole, mask)
        return features

    def latents(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode to continuous latents `(b, n, d)`; see `features`."""
        return self.to_bottleneck(self.features(signal, lengths), lengths)

    def to_bottleneck(self, features: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Bring the encoder's latents to the bottleneck's width and scale."""
        latents: Tensor = self.project_in(features)
        return self.layout.normalize(latents, lengths) if self.unit_latents else latents

    def paint(
        self, latents: Tensor, lengths: Tensor | None, grid: Sequence[int] = (), memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode quantized latents `(b, n, d)` to a signal of whole steps; `lengths` are kept, all if None."""
        visible, mask = self.project_out(latents), None
        if lengths is not None:
            visible, mask = self.length.mechanism(visible, lengths)
        signal: Tensor = self.decoder(visible, mask, list(grid), memory)
        return signal

    def forward(
        self, signal: Tensor, lengths: Tensor | None = None, n_codebooks: Tensor | None = None
    ) -> Reconstruction:
        """Send signals through the codec.

        Args:
            signal: `(b, c, *grid)` in [-1, 1].
            lengths: int64 `(b * blocks,)`, kept tokens if they are ordered, valid tokens if they are placed; all if
                None.
            n_codebooks: int64 `(b * blocks,)`, codebooks kept; all if None.
        """
        size = signal.shape[2:]
        features = self.features(signal, lengths)
        latents = self.to_bottleneck(features, lengths)
        shown = lengths  # a mask that hides nothing costs a convolutional decoder 6 % of its time
        if lengths is None:
            lengths = self.layout.valid(torch.full((len(signal),), size[0], device=signal.device), size)
        n_codebooks = n_codebooks if n_codebooks is not None else self.bottleneck.depths(latents)
        quantized: Quantized = self.bottleneck(latents, lengths, n_codebooks)
        put = quantized.latents
        if self.training and self.perturbation is not None:
            put = self.perturbation(self.bottleneck, latents, quantized, lengths, n_codebooks)
        painted = self.layout.crop(self.paint(put, shown, self.layout.grid(size)), size)
        if self.training and self.length.halting is not None:
            # Only with all of its codebooks does a sample say what a number of tokens comes to.
            error = self.layout.signal_means((painted.detach().float() - signal).abs())
            loss = self.length.halting.loss(features, error, lengths, n_codebooks >= self.num_codebooks)
            quantized = quantized._replace(penalties=quantized.penalties | {"halting": loss})
        return Reconstruction(painted, quantized)

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn signals into codes.

        Args:
            signal: `(b, c, *grid)`.
            lengths: int64 `(b,)`, valid placed tokens; all if None.

        Returns:
            int64 `(b, codebooks, N)` where tokens are ordered, of clips `(b, codebooks, blocks, N)`: keep a prefix of
            the last axis for a shorter code. Else `(b, codebooks, *grid)`: keep a prefix of the codebooks.
        """
        latents = self.latents(signal, lengths)
        if lengths is None or self.layout.ordered:
            codes = self.bottleneck.encode(latents)
        else:
            codes = self.bottleneck.encode_valid(latents, lengths)
        return self.layout.to_grid(codes, len(signal), self.layout.grid(signal.shape[2:]))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Turn codes into signals.

        Args:
            codes: `(b, codebooks, k)` or `(b, codebooks, blocks, k)`, k from 1 to N, where tokens are ordered, else
                `(b, codebooks, *grid)`; a prefix of the codebooks is allowed.
            size: The signals' size; if None that of training, or of whole steps, without the causal pad.
            lengths: int64 `(b,)`, or of clips `(b, blocks)`, how many of the tokens each sample keeps; all if None.

        Raises:
            UserError: k is 0 or above N, a length is 0 or above k, or there are other blocks than the size has.
        """
        grid = self.layout.decoder_grid(codes, size)
        codes, lengths = self.layout.prefix(codes, lengths)
        return self.layout.crop(self.paint(self.bottleneck.decode(codes), lengths, grid), size)
