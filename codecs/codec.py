"""The one codec shape: an encoder makes latents, a bottleneck makes codes, a decoder makes the signal back.

signal --encoder--> latents --bottleneck--> codes --(length: how many are kept)--> latents --decoder--> signal
"""

import torch
from torch import Tensor, nn

from varitok import UserError

from .bottlenecks.contract import Bottleneck
from .lengths import LengthPolicy
from .perturbation import Perturbation
from .result import Quantized, Reconstruction

__all__ = ["Codec"]


class Codec(nn.Module):
    """A variable-length tokenizer.

    Two linear maps fit the bottleneck between networks of any width.

    Args:
        encoder: `(b, c, *grid)` to `(b, n, encoder.width)`; has `tokens`, the most that it makes, and `patch`.
        bottleneck: Latents `(b, n, bottleneck.dim)` to codes and back.
        decoder: `(b, n, decoder.width)` and a mask to a signal.
        length: How many tokens and books are kept while training, and how the rest is hidden; its halting head, if it
            has one, learns in the codec's own training step.
        unit_latents: Scale each sample's latents to a root mean square of 1 over tokens and width. A decoder that
            knows nothing yet hears latents as noise, and its first wish is that they be small: the codes
            collapse. They can't where the scale is given (ours).
        perturbation: Replaces tokens by neighbours while training, so that the decoder learns to bear a generator's
            mistakes; None: never.

    Raises:
        UserError: The bottleneck doesn't have the perturbation's neighbours.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: Bottleneck,
        decoder: nn.Module,
        length: LengthPolicy,
        unit_latents: bool = False,
        perturbation: Perturbation | None = None,
    ) -> None:
        super().__init__()
        if perturbation is not None:
            perturbation.check(bottleneck)
        self.unit_latents = unit_latents
        self.encoder = encoder
        self.project_in = nn.Linear(int(encoder.width), bottleneck.dim)  # type: ignore[arg-type]
        self.bottleneck = bottleneck
        self.project_out = nn.Linear(bottleneck.dim, int(decoder.width))  # type: ignore[arg-type]
        self.decoder = decoder
        self.length = length
        self.perturbation = perturbation

    @property
    def tokens(self) -> int:
        """The most tokens that a signal has, N."""
        return int(self.encoder.tokens)  # type: ignore[arg-type]

    @property
    def patch(self) -> int:
        """Side of a patch in pixels; it divides the sides of every image."""
        return int(self.encoder.patch)  # type: ignore[arg-type]

    def bits(self, tokens: int) -> float:
        """Count the payload bits of a signal's first `tokens` tokens, exactly."""
        return tokens * self.bottleneck.bits

    @property
    def books(self) -> int:
        """How many books each token has; 0 where the bottleneck is continuous."""
        return len(self.bottleneck.book_sizes)

    def features(self, signal: Tensor) -> Tensor:
        """Run the encoder alone: `(b, n, encoder.width)`, what the halting head reads.

        Raises:
            UserError: The patch doesn't divide the image's sides.
        """
        if signal.shape[-2] % self.patch or signal.shape[-1] % self.patch:
            size = f"{signal.shape[-1]} x {signal.shape[-2]}"
            raise UserError(f"image of {size} pixels: both sides must be multiples of the patch, {self.patch}")
        features: Tensor = self.encoder(signal)
        return features

    def latents(self, signal: Tensor) -> Tensor:
        """Encode to continuous latents `(b, n, d)`.

        Raises:
            UserError: The patch doesn't divide the image's sides.
        """
        return self._narrowed(self.features(signal))

    def _narrowed(self, features: Tensor) -> Tensor:
        """Bring the encoder's latents to the bottleneck's width and scale."""
        latents: Tensor = self.project_in(features)
        if self.unit_latents:
            latents = latents * (latents.square().mean((1, 2), keepdim=True) + 1e-6).rsqrt()
        return latents

    def paint(self, latents: Tensor, lengths: Tensor, height: int, width: int) -> Tensor:
        """Decode quantized latents `(b, n, d)`, of which the first `lengths` are kept, to a grid in patches."""
        visible, mask = self.length.mechanism(self.project_out(latents), lengths)
        signal: Tensor = self.decoder(visible, mask, height, width)
        return signal

    def forward(self, signal: Tensor, lengths: Tensor | None = None, depth: Tensor | None = None) -> Reconstruction:
        """Send signals through the codec.

        Args:
            signal: `(b, c, *grid)` in [-1, 1].
            lengths: int64 `(b,)`, tokens kept; all where None.
            depth: int64 `(b,)`, books kept; all where None.
        """
        features = self.features(signal)
        latents = self._narrowed(features)
        lengths = lengths if lengths is not None else latents.new_full((len(latents),), self.tokens, dtype=torch.int64)
        depth = depth if depth is not None else self.bottleneck.depths(latents)
        quantized: Quantized = self.bottleneck(latents, lengths, depth)
        put = quantized.latents
        if self.training and self.perturbation is not None:
            put = self.perturbation(self.bottleneck, latents, quantized, lengths, depth)
        height, width = signal.shape[-2] // self.patch, signal.shape[-1] // self.patch
        painted = self.paint(put, lengths, height, width)
        if self.training and self.length.halting is not None:
            # Only with all of its books does a sample say what a number of tokens comes to.
            error = (painted.detach().float() - signal).abs().flatten(1).mean(1)
            loss = self.length.halting.loss(features, error, lengths, depth >= self.books)
            quantized = quantized._replace(penalties=quantized.penalties | {"halting": loss})
        return Reconstruction(painted, quantized)

    def encode(self, signal: Tensor) -> Tensor:
        """Turn signals into codes, int64 `(b, books, N)`; keep a prefix of the last axis for a shorter code."""
        return self.bottleneck.encode(self.latents(signal))

    def decode(self, codes: Tensor, grid: tuple[int, int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Turn codes into signals.

        Args:
            codes: `(b, books, k)`, k from 1 to N; a prefix of the books is allowed.
            grid: The signals' size in patches, that of training where None.
            lengths: int64 `(b,)`, how many of the k tokens each sample keeps; all where None.

        Raises:
            UserError: k is 0 or above N, or a length is 0 or above k.
        """
        kept = codes.shape[-1]
        if not 1 <= kept <= self.tokens:
            raise UserError(f"{kept} tokens: this codec decodes from 1 to {self.tokens}")
        if lengths is None:
            lengths = torch.full((len(codes),), kept, device=codes.device)
        elif not 1 <= int(lengths.min()) <= int(lengths.max()) <= kept:
            raise UserError(f"lengths from {int(lengths.min())} to {int(lengths.max())}: there are 1 to {kept} tokens")
        codes = nn.functional.pad(codes, (0, self.tokens - kept))
        height, width = grid or (0, 0)
        return self.paint(self.bottleneck.decode(codes), lengths, height, width)
