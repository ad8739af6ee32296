"""The codec: an encoder maps a signal to latents, a bottleneck quantizes them, a decoder maps them back to a signal.

              +---------+ (b, n, width)                +-------------+ (b, n, d) +------------+
    signal -->| encoder |----------------------------->| project_in  |---------->|            |--> codes
              +---------+                              +-------------+           | bottleneck |
              +---------+ k of N tokens +--------+     +-------------+ (b, n, d) |            |
    signal <--| decoder |<--------------| length |<----| project_out |<----------|            |<-- codes
              +---------+               +--------+     +-------------+           +------------+

Shape legend, for the whole package:

    b     signals of a batch; of clips with ordered tokens, blocks of all signals
    c     channels
    grid  axes of a signal: (h, w) of an image, (t,) of audio, (t, h, w) of video; of codes, the same after downsampling
    n     tokens of a signal or block; N at most, k kept
    d     width of the bottleneck's latents; `width` is that of the encoder's or the decoder's
    q     codebooks

Codes are `(b, q, *grid)` if tokens are on a grid, `(b, q, k)` or, for clips, `(b, q, blocks, k)` if they are ordered
(`layout.py`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from .bottlenecks.contract import Bottleneck
from .bottlenecks.perturbation import Perturbation
from .layout import token_layout
from .lengths.policy import LengthPolicy
from .masking import prefix_mask
from .networks.contract import Decoder, Encoder
from .networks.projections import DirectProjection, LinearProjection, Projection
from .precision import exact_float32
from .result import Quantized, Reconstruction

__all__ = ["Codec"]


def _fit(encoder: Encoder, inputs: int, outputs: int, make: Callable[[int, int], Projection] | None) -> Projection:
    """Return the map between a network and the bottleneck: a linear one if not given, none for a direct encoder."""
    if make is not None:
        return make(inputs, outputs)
    if not encoder.direct:
        return LinearProjection(inputs, outputs)
    if inputs != outputs:
        raise UserError(f"codec: widths {inputs} and {outputs} should be equal, there is no map between them")
    return DirectProjection()


class Codec(nn.Module):
    """A variable-length tokenizer.

    Linear maps, or those of `networks/projections.py`, fit the bottleneck's width to those of the networks.

    >>> import hydra
    >>> from varitok.codecs.build import build_codec
    >>> with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
    ...     config = hydra.compose("train", ["experiment=image/demo"])
    >>> codec = build_codec(config).eval()
    >>> images = torch.rand(2, 3, 64, 64) * 2 - 1
    >>> codes = codec.encode(images)  # int64 (b, q, N)
    >>> codes.shape
    torch.Size([2, 1, 64])
    >>> codec.decode(codes[..., :4]).shape  # from the first 4 tokens
    torch.Size([2, 3, 64, 64])
    >>> codec.bits(4)  # of each image
    48.0

    Args:
        encoder: Maps signals to latents (`networks/contract.py`).
        bottleneck: Quantizes latents `(b, n, bottleneck.inputs)` and looks codes up.
        decoder: Maps latents to signals.
        length: Distribution of the numbers of tokens and codebooks kept in training, and how the decoder is shown that
            the others are missing. Its halting head, if any, is trained in `forward`.
        unit_latents: Normalize latents to a root mean square of 1: over all tokens and channels of a sample or block
            if tokens are ordered, else over the channels of each token, so that chunks equal the whole. An untrained
            decoder treats latents as noise and shrinks them towards zero, which collapses the codebook; normalizing
            them prevents it (ours).
        perturbation: Replaces tokens by near ones in training, so that the decoder tolerates a generator's errors;
            None: never.
        project_in: Factory of the map from the encoder to the bottleneck, given both widths; None: linear. Others
            (`networks/projections.py`) are for images on a grid.
        project_out: Factory of the map from the bottleneck to the decoder; None: linear.
        sample_rate: Sample rate of audio, in Hz; None for other modalities.
        frame_rate: Frame rate of video, in Hz; None if unknown, or for other modalities.
        bounded: Whether signals are in [-1, 1], as pixels and audio are; otherwise they are standardized features.

    Attributes:
        feature_mean: Mean of each raw channel, `(c,)`; only if not `bounded`. `(raw - mean) / deviation` is what the
            codec takes.
        feature_deviation: Standard deviation of each raw channel, `(c,)`; only if not `bounded`.

    Raises:
        UserError: The perturbation doesn't support this bottleneck, `length` drops tokens that are on a grid, or tokens
            that aren't those of an image on a grid have a map that isn't linear.
    """

    def __init__(
        self,
        encoder: Encoder,
        bottleneck: Bottleneck,
        decoder: Decoder,
        length: LengthPolicy,
        unit_latents: bool = False,
        perturbation: Perturbation | None = None,
        project_in: Callable[[int, int], Projection] | None = None,
        project_out: Callable[[int, int], Projection] | None = None,
        sample_rate: int | None = None,
        frame_rate: Annotated[float | None, "(0, inf)"] = None,
        bounded: bool = True,
    ) -> None:
        super().__init__()
        if perturbation is not None:
            perturbation.check(bottleneck)
        self.unit_latents = unit_latents
        self.encoder = encoder
        self.project_in = _fit(encoder, encoder.width, bottleneck.inputs, project_in)
        if isinstance(self.project_in, LinearProjection):
            self.project_in.keep_scale()
        self.bottleneck = bottleneck
        self.project_out = _fit(encoder, bottleneck.dim, decoder.width, project_out)
        self.decoder = decoder
        self.length = length
        self.perturbation = perturbation
        self.sample_rate = sample_rate
        self.frame_rate = frame_rate
        self.bounded = bounded
        if not bounded:
            self.register_buffer("feature_mean", torch.zeros(encoder.channels))
            self.register_buffer("feature_deviation", torch.ones(encoder.channels))
        self.layout = token_layout(
            encoder.downsample, encoder.causal_pad, encoder.tokens, encoder.later_tokens, encoder.multiple
        )
        length.fit(self.layout.ordered, self.num_codebooks)
        if (project_in or project_out) and (self.layout.ordered or len(encoder.downsample) != 2):
            raise UserError("codec: project_in and project_out are for images on a grid; give null, a linear map")

    @property
    def tokens(self) -> int:
        """Maximum number of tokens of a signal, or of a block of frames, N.

        Raises:
            UserError: The codec has tokens on a grid.
        """
        if not self.layout.ordered:
            raise UserError("this codec has tokens on a grid: their number follows from the signal's size")
        return self.layout.tokens

    @property
    def downsample(self) -> tuple[int, ...]:
        """Downsampling factor of each axis: pixels, frames or samples to a step of the grid."""
        return tuple(self.layout.downsample)

    @property
    def num_codebooks(self) -> int:
        """Number of codebooks, q; 0 if the bottleneck is continuous."""
        return len(self.bottleneck.codebook_sizes)

    @property
    def runs(self) -> bool:
        """Whether a token that doesn't change repeats its code in the next step, for run-length coding."""
        return self.encoder.repeats

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Return the bits of `tokens` tokens at fixed length, for the first `num_codebooks`, all if None."""
        return self.bottleneck.payload(tokens, num_codebooks)

    def features(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the encoder alone; the halting head reads its output.

        Args:
            signal: `(b, c, *grid)`; the end of each free axis is padded to whole steps (`TokenLayout.pad`).
            lengths: int64 `(b,)`, number of valid tokens on the grid; all if None.

        Returns:
            `(b, n, encoder.width)`.

        Raises:
            UserError: The patch doesn't divide the image's sides.
        """
        grid = self.layout.grid(signal.shape[2:])
        mask = None if lengths is None or self.layout.ordered else prefix_mask(lengths, math.prod(grid))
        if mask is not None or not self.encoder.partial:
            signal = self.layout.pad(signal, self.layout.causal_pad)
        features: Tensor = self.encoder(signal, mask)
        return features

    def latents(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode to the latents `(b, n, d)` that the bottleneck quantizes; arguments as `features`."""
        return self.to_bottleneck(self.features(signal, lengths), lengths, self.layout.grid(signal.shape[2:]))

    def to_bottleneck(self, features: Tensor, lengths: Tensor | None, grid: list[int]) -> Tensor:
        """Project the encoder's output `(b, n, width)` to latents `(b, n, d)`; normalize them if `unit_latents`."""
        latents: Tensor = self.project_in(features, lengths, grid)
        return self.layout.normalize(latents, lengths) if self.unit_latents else latents

    def paint(
        self,
        latents: Tensor,
        lengths: Tensor | None,
        grid: Sequence[int] = (),
        memory: list[Tensor] | None = None,
        common: int | None = None,
    ) -> Tensor:
        """Decode quantized latents `(b, n, d)` to signals `(b, c, *grid)` of whole steps.

        Args:
            latents: Quantized latents.
            lengths: int64 `(b,)`, number of tokens kept; all if None.
            grid: Grid of the tokens; empty if they are ordered.
            memory: States of causal layers, updated in place; None: no streaming.
            common: The number of tokens kept of every sample, if it is the same and known on the CPU.
        """
        visible, mask = self.show(latents, lengths, grid, common)
        signal: Tensor = self.decoder(visible, mask, list(grid), memory)
        return signal

    def show(
        self, latents: Tensor, lengths: Tensor | None, grid: Sequence[int], common: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return what the decoder sees of quantized latents, and its mask (`Mechanism`); arguments as `paint`."""
        visible: Tensor = self.project_out(latents, lengths, list(grid))
        return (visible, None) if lengths is None else self.length.mechanism(visible, lengths, common)

    def forward(
        self,
        signal: Tensor,
        lengths: Tensor | None = None,
        n_codebooks: Tensor | None = None,
        common: int | None = None,
    ) -> Reconstruction:
        """Encode, quantize and decode signals, with gradients; in training, a generative decoder learns instead.

        Args:
            signal: `(b, c, *grid)` in [-1, 1].
            lengths: int64 `(b * blocks,)`, number of tokens kept if they are ordered, valid if they are on a grid; all
                if None.
            n_codebooks: int64 `(b * blocks,)`, number of codebooks kept; all if None.
            common: The number of tokens kept of every sample, if it is the same and known on the CPU.
        """
        size, grid = signal.shape[2:], self.layout.grid(signal.shape[2:])
        features = self.features(signal, lengths)
        latents = self.to_bottleneck(features, lengths, grid)
        shown = lengths  # None stays None: an all-true mask costs a convolutional decoder 6 % of its time
        if lengths is None:
            lengths = self.layout.valid(torch.full((len(signal),), size[0], device=signal.device), size)
        n_codebooks = n_codebooks if n_codebooks is not None else self.bottleneck.depths(latents)
        with exact_float32():
            quantized: Quantized = self.bottleneck(latents, lengths, n_codebooks)
        put = quantized.latents
        if self.training and self.perturbation is not None:
            put = self.perturbation(self.bottleneck, latents, quantized, lengths, n_codebooks)
        visible, mask = self.show(put, shown, grid, common)
        penalties: dict[str, Tensor] = {}
        if self.training:
            painted, penalties = self.decoder.reconstruct(visible, mask, grid, signal)
        else:
            painted = self.decoder(visible, mask, grid)
        painted = self.layout.crop(painted, size)
        if self.training and self.length.halting is not None:
            # Samples with fewer codebooks don't show the error at a number of tokens.
            error = self.layout.signal_means((painted.detach().float() - signal).abs())
            loss = self.length.halting.loss(features, error, lengths, n_codebooks >= self.num_codebooks)
            quantized = quantized._replace(penalties=quantized.penalties | {"halting": loss})
        return Reconstruction(painted, quantized, penalties)

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode signals to codes.

        Args:
            signal: `(b, c, *grid)`.
            lengths: int64 `(b,)`, number of valid tokens on a grid; all if None.

        Returns:
            int64 `(b, q, N)`, for clips `(b, q, blocks, N)`, if tokens are ordered: a prefix of the last axis is a
            shorter code. Else `(b, q, *grid)`: a prefix of the codebooks is one.
        """
        latents = self.latents(signal, lengths)
        if lengths is None or self.layout.ordered:
            codes = self.bottleneck.encode(latents)
        else:
            codes = self.bottleneck.encode_valid(latents, lengths)
        return self.layout.to_grid(codes, len(signal), self.layout.grid(signal.shape[2:]))

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Decode codes to signals `(b, c, *size)`.

        Args:
            codes: `(b, q, k)` or, for clips, `(b, q, blocks, k)`, with 1 <= k <= N, if tokens are ordered, else
                `(b, q, *grid)`. Fewer codebooks, the first ones, are allowed.
            size: Size of the signals; if None, that of training or of whole steps, without the causal pad.
            lengths: int64 `(b,)`, for clips `(b, blocks)`, number of tokens kept of each sample; all if None.

        Raises:
            UserError: k is 0 or above N, a length is 0 or above k, or the number of blocks doesn't fit the size.
        """
        grid = self.layout.decoder_grid(codes, size)
        common = codes.shape[-1] if self.layout.ordered and lengths is None else None
        codes, lengths = self.layout.prefix(codes, lengths)
        return self.layout.crop(self.paint(self.bottleneck.decode(codes), lengths, grid, common=common), size)
