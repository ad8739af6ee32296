"""The one codec shape: an encoder makes latents, a bottleneck makes codes, a decoder makes the signal back.

signal --encoder--> latents --bottleneck--> codes --(length: how many are kept)--> latents --decoder--> signal

Tokens are of one of two kinds. *Ordered* tokens are answers to an encoder's queries, each about the whole signal, and a
prefix of them is a shorter code; of clips, each block of frames has its own. *Placed* tokens lie on a grid over the
signal, one for each step; their number follows from the signal's size, and a shorter code has fewer books.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from .bottlenecks.contract import Bottleneck
from .bottlenecks.perturbation import Perturbation
from .lengths.distributions import Full
from .lengths.policy import LengthPolicy
from .masking import prefix_mask
from .padding import filled
from .result import Quantized, Reconstruction
from .streaming import arrange, arrange_frames, at_grid, check_chunk, obstacle, pack, state_size, unpack

__all__ = ["Codec"]


def _fit(encoder: nn.Module, inputs: int, outputs: int) -> nn.Module:
    """Make the map between a network and the bottleneck."""
    if not getattr(encoder, "direct", False):
        return nn.Linear(inputs, outputs)
    if inputs != outputs:
        raise UserError(f"codec: widths {inputs} and {outputs} should be equal, there is no map between them")
    return nn.Identity()


class Codec(nn.Module):
    """A variable-length tokenizer.

    Two linear maps fit the bottleneck between networks of any width.

    Args:
        encoder: `(b, c, *grid)` to `(b, n, encoder.width)`. Has `hop`, the samples of each axis to a step of the grid;
            `tokens`, their number, where they are ordered (then it gives `(b * blocks, n, width)` of clips); `lead`,
            where copies of the first frame go before it; and `direct`, where its latents, and so the decoder's, are
            the bottleneck's own, with no maps.
        bottleneck: Latents `(b, n, bottleneck.dim)` to codes and back.
        decoder: `(b, n, decoder.width)`, a mask and the grid's size to a signal.
        length: How many tokens and books are kept while training, and how the rest is hidden; its halting head, if it
            has one, learns in the codec's own training step.
        unit_latents: Scale each sample's latents, or each block's, to a root mean square of 1 over width and the tokens
            that all have; on the grid of a clip each token's alone, so that chunks are scaled as the whole. A decoder
            that knows nothing yet hears latents as noise, and its first wish is that they be small: the codes
            collapse. They can't where the scale is given (ours).
        perturbation: Replaces tokens by neighbours while training, so that the decoder learns to bear a generator's
            mistakes; None: never.
        sample_rate: Of sounds, Hz; None where signals are something else.
        frame_rate: Of clips, frames a second; None where it isn't known, or signals are something else.
        bounded: Signals lie in [-1, 1], as pixels and sounds do; otherwise they are standardised features, of any size.

    Attributes:
        feature_mean: Of codecs that aren't bounded: what was taken off each channel before, `(c,)`. The codec itself
            takes standardised features; who loads it needs this to make them.
        feature_deviation: What each channel was divided by then.

    Raises:
        UserError: The bottleneck doesn't have the perturbation's neighbours, or placed tokens are to be dropped.
    """

    def __init__(
        self,
        encoder: nn.Module,
        bottleneck: Bottleneck,
        decoder: nn.Module,
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
        self.project_in = _fit(encoder, int(encoder.width), bottleneck.dim)  # type: ignore[arg-type]
        if isinstance(self.project_in, nn.Linear):
            nn.init.zeros_(self.project_in.bias)  # or quiet signals' latents would be alike
            # Features of unit size give latents of unit size; torch's own start would bring all near one code.
            nn.init.kaiming_normal_(self.project_in.weight, nonlinearity="linear")
        self.bottleneck = bottleneck
        self.project_out = _fit(encoder, bottleneck.dim, int(decoder.width))  # type: ignore[arg-type]
        self.decoder = decoder
        self.length = length
        self.perturbation = perturbation
        self.sample_rate = sample_rate
        self.frame_rate = frame_rate
        self.bounded = bounded
        if not bounded:
            channels = int(encoder.channels)  # type: ignore[arg-type]
            self.register_buffer("feature_mean", torch.zeros(channels))
            self.register_buffer("feature_deviation", torch.ones(channels))
        self._layouts: dict[str, list[list[int]]] = {}
        if not self.ordered and not isinstance(length.distribution, Full):
            raise UserError("length: this codec's tokens lie on a grid, none can go; choose full or quantizer_dropout")

    @property
    def ordered(self) -> bool:
        """Whether tokens answer queries about the whole signal; they lie on a grid over it otherwise."""
        return hasattr(self.encoder, "tokens")

    @property
    def blocked(self) -> bool:
        """Whether each block of a clip's frames, a step of the first axis, has ordered tokens of its own."""
        return self.ordered and len(self.hop) == 3

    @property
    def code_axis(self) -> int:
        """The axis of codes along which there may be fewer of them: ordered tokens, or steps of the first axis."""
        return 3 if self.blocked else 2

    @property
    def tokens(self) -> int:
        """The most tokens that a signal, or a block of frames, has, N.

        Raises:
            UserError: Tokens lie on a grid.
        """
        if not self.ordered:
            raise UserError("this codec's tokens lie on a grid: their number follows from the signal's size")
        return int(self.encoder.tokens)  # type: ignore[arg-type]

    @property
    def later_tokens(self) -> int:
        """The most tokens that a block behind a clip's first has."""
        return int(getattr(self.encoder, "later_tokens", self.tokens))

    @property
    def hop(self) -> tuple[int, ...]:
        """Samples (pixels, frames) of each axis to a step of the grid."""
        hop: tuple[int, ...] = self.encoder.hop  # type: ignore[assignment]
        return hop

    @property
    def lead(self) -> int:
        """Copies of the first frame that go before it, so that it alone makes the first step of the first axis.

        A causal codec of clips has one less than frames to a step: an image is a clip of one frame.
        """
        return int(getattr(self.encoder, "lead", 0))

    @property
    def books(self) -> int:
        """How many books each token has; 0 where the bottleneck is continuous."""
        return len(self.bottleneck.book_sizes)

    @property
    def runs(self) -> bool:
        """Whether a token that nothing changes is repeated in its place, so that a run of it need be told once only."""
        return getattr(self.encoder, "run_length", None) is not None

    @property
    def on_grid(self) -> bool:
        """Whether tokens are placed on several axes, as those of clips are."""
        return not self.ordered and len(self.hop) > 1

    @property
    def obstacle(self) -> str:
        """Why it can't code chunk by chunk, in a few words; empty where it can."""
        if self.ordered and not self.blocked:
            return "its tokens are about the whole signal"
        if self.unit_latents and not self.blocked and not self.on_grid:
            return "unit_latents scales by the whole signal"
        return obstacle(self.encoder) or obstacle(self.decoder)

    @property
    def streams(self) -> bool:
        """Whether it codes chunk by chunk as it codes a whole signal: it looks back only, and not without end."""
        return not self.obstacle

    @property
    def chunk_tokens(self) -> int:
        """Tokens that are made at once: of the books of several rates, those of the slowest code; else 1."""
        rates = (getattr(module, "book_strides", ()) for module in self.bottleneck.modules())
        return math.lcm(*(stride for strides in rates for stride in strides))

    @property
    def latency(self) -> int:
        """Samples that a codec that streams waits for before it can give a token, of which every chunk is made."""
        return self.hop[0] * self.chunk_tokens

    def state_sizes(self, grid: Sequence[int] = ()) -> tuple[int, int]:
        """Count the numbers of a sample's state, of the encoder and of the decoder.

        Args:
            grid: Of frames, the rows and columns of their latents.

        Raises:
            UserError: It can't code chunk by chunk.
        """
        encoder, decoder = (state_size(self._shapes(side, grid)) for side in ("encoder", "decoder"))
        return encoder, decoder

    def memory_layout(self, side: str) -> list[list[int]]:
        """Tell what the `encoder` or `decoder` remembers between chunks; see `streaming.arrange_frames`.

        Raises:
            UserError: It can't code chunk by chunk.
        """
        if self.obstacle:
            raise UserError(f"this codec can't code chunk by chunk: {self.obstacle}")
        if side not in self._layouts:
            encoder, decoder, here = self.encoder, self.decoder, next(self.parameters())

            def encode(memory: list[Tensor], *grid: int) -> None:
                sides = [step * count for step, count in zip(self.hop, (1, *grid), strict=False)]
                encoder(here.new_zeros(1, int(encoder.channels), *sides), memory=memory)  # type: ignore[arg-type]

            def decode(memory: list[Tensor], *grid: int) -> None:
                steps = (1, *grid)[: len(self.hop)]
                count = self.tokens if self.blocked else math.prod(steps)
                latents = here.new_zeros(1, count, int(decoder.width))  # type: ignore[arg-type]
                decoder(latents, None, *(steps if len(steps) > 1 else ()), memory=memory)

            network, run = (encoder, encode) if side == "encoder" else (decoder, decode)
            if self.blocked:  # frames are of one size
                sides = int(network.rows), int(network.columns)  # type: ignore[arg-type]
                shapes = arrange(network, lambda memory: run(memory, *sides))
                self._layouts[side] = [[n for count in shape for n in (count, 0, 0)] for shape in shapes]
            else:
                self._layouts[side] = arrange_frames(network, run)
        return self._layouts[side]

    def _shapes(self, side: str, grid: Sequence[int]) -> list[list[int]]:
        """Give the shapes of a memory of latents of a grid, without its first axis."""
        rows, columns = (*grid, 1, 1)[:2]
        return at_grid(self.memory_layout(side), rows, columns)

    def bits(self, tokens: int, books: int | None = None) -> float:
        """Count the payload bits of `tokens` tokens, exactly; of their first `books` books, all where None."""
        return self.bottleneck.payload(tokens, books)

    def grid(self, size: Sequence[int]) -> tuple[int, ...]:
        """Count the steps of a signal of a size, the last of them perhaps not full.

        Raises:
            UserError: Tokens are ordered, and a step isn't full: their encoder has no place for it.
        """
        if self.ordered and not self.blocked and any(side % step for side, step in zip(size, self.hop, strict=True)):
            sides = " x ".join(str(side) for side in reversed(size))
            raise UserError(f"image of {sides} pixels: both sides must be multiples of the patch, {self.hop[0]}")
        leads = (self.lead, *(0 for _ in size[1:]))
        return tuple(-(-(side + lead) // step) for side, lead, step in zip(size, leads, self.hop, strict=True))

    def blocks(self, size: Sequence[int]) -> int:
        """Count the blocks with tokens of their own, in which all below goes, of a signal of a size; 1 for most."""
        return self.grid(size)[0] if self.blocked else 1

    def count(self, size: Sequence[int]) -> int:
        """Count the tokens of a signal, or of each of its blocks, of a size `(*grid)`, in samples."""
        return self.tokens if self.ordered else math.prod(self.grid(size))

    def valid(self, lengths: Tensor, size: Sequence[int]) -> Tensor:
        """Count the tokens, int64 `(b * blocks,)`, of signals of which `lengths` steps of the first axis are valid."""
        if self.blocked:
            begin = torch.arange(self.blocks(size), device=lengths.device) * self.hop[0] - self.lead
            most = torch.where(begin > 0, self.later_tokens, self.tokens)
            return ((begin.clamp(min=0) < lengths[:, None]) * most).flatten()
        if self.ordered:
            return torch.full_like(lengths, self.tokens)
        steps = (lengths + self.lead + self.hop[0] - 1) // self.hop[0] * (lengths > 0)
        return steps * math.prod(self.grid(size)[1:])

    def features(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Run the encoder alone: `(b, n, encoder.width)`, what the halting head reads.

        Args:
            signal: `(b, c, *grid)`; the last steps of the grid are filled up (`filling.filled`).
            lengths: int64 `(b,)`, valid tokens; all where None.

        Raises:
            UserError: The patch doesn't divide the image's sides.
        """
        grid = self.grid(signal.shape[2:])
        if self.ordered:
            whole = filled(signal, list(self.hop), self.lead) if self.blocked else signal
            features: Tensor = self.encoder(whole)
            return features
        mask = None if lengths is None else prefix_mask(lengths, math.prod(grid))
        features = self.encoder(filled(signal, list(self.hop), self.lead), mask)
        return features

    def latents(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Encode to continuous latents `(b, n, d)`; see `features`."""
        return self._narrowed(self.features(signal, lengths), lengths)

    def _narrowed(self, features: Tensor, lengths: Tensor | None) -> Tensor:
        """Bring the encoder's latents to the bottleneck's width and scale."""
        latents: Tensor = self.project_in(features)
        if self.unit_latents:
            power = latents.square().mean(2)
            if self.on_grid:
                scale = power
            elif self.ordered:
                scale = power[:, : self.later_tokens].mean(1, keepdim=True)
            elif lengths is None:
                scale = power.mean(1, keepdim=True)
            else:
                valid = torch.where(prefix_mask(lengths, power.shape[1]), power, 0.0)
                scale = valid.sum(1, keepdim=True) / lengths.clamp(min=1).unsqueeze(1)
            latents = latents * (scale + 1e-6).rsqrt().unsqueeze(2)
        return latents

    def paint(
        self,
        latents: Tensor,
        lengths: Tensor | None,
        grid: Sequence[int] = (),
        memory: list[Tensor] | None = None,
    ) -> Tensor:
        """Decode quantized latents `(b, n, d)` to a signal of whole steps; `lengths` are kept, all where None."""
        visible, mask = self.project_out(latents), None
        if lengths is not None:
            visible, mask = self.length.mechanism(visible, lengths)
        # Along one axis the number of latents says the grid.
        more = {} if memory is None else {"memory": memory}
        signal: Tensor = self.decoder(visible, mask, *(grid if len(self.hop) > 1 else ()), **more)
        return signal

    def forward(self, signal: Tensor, lengths: Tensor | None = None, depth: Tensor | None = None) -> Reconstruction:
        """Send signals through the codec.

        Args:
            signal: `(b, c, *grid)` in [-1, 1].
            lengths: int64 `(b * blocks,)`, tokens kept where they are ordered, tokens that are valid where they are
                placed; all where None.
            depth: int64 `(b * blocks,)`, books kept; all where None.
        """
        size = signal.shape[2:]
        features = self.features(signal, lengths)
        latents = self._narrowed(features, lengths)
        shown = lengths  # a mask that hides nothing costs a convolutional decoder 6 % of its time
        if lengths is None:
            lengths = self.valid(torch.full((len(signal),), size[0], device=signal.device), size)
        depth = depth if depth is not None else self.bottleneck.depths(latents)
        quantized: Quantized = self.bottleneck(latents, lengths, depth)
        put = quantized.latents
        if self.training and self.perturbation is not None:
            put = self.perturbation(self.bottleneck, latents, quantized, lengths, depth)
        painted = self._cropped(self.paint(put, shown, self.grid(size)), size)
        if self.training and self.length.halting is not None:
            # Only with all of its books does a sample say what a number of tokens comes to.
            error = (painted.detach().float() - signal).abs()
            if self.blocked:
                steps = filled(error, list(self.hop), self.lead).transpose(1, 2)
                error = steps.reshape(-1, self.hop[0], *steps.shape[2:])
            error = error.flatten(1).mean(1)
            loss = self.length.halting.loss(features, error, lengths, depth >= self.books)
            quantized = quantized._replace(penalties=quantized.penalties | {"halting": loss})
        return Reconstruction(painted, quantized)

    def _cropped(self, painted: Tensor, size: Sequence[int]) -> Tensor:
        """Cut a signal of whole steps to its size, and the lead off."""
        for axis, side in enumerate(size):
            painted = painted.narrow(2 + axis, 0 if axis else self.lead, side)
        return painted

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Turn signals into codes.

        Args:
            signal: `(b, c, *grid)`.
            lengths: int64 `(b,)`, valid tokens where they are placed; all where None.

        Returns:
            int64 `(b, books, N)` where tokens are ordered, of clips `(b, books, blocks, N)`: keep a prefix of the last
            axis for a shorter code. Else `(b, books, *grid)`: keep a prefix of the books.
        """
        latents = self.latents(signal, lengths)
        if lengths is None or self.ordered:
            codes = self.bottleneck.encode(latents)
        else:
            codes = self.bottleneck.encode_valid(latents, lengths)
        return self._gridded(codes, len(signal), self.grid(signal.shape[2:]))

    def _gridded(self, codes: Tensor, batch: int, grid: Sequence[int]) -> Tensor:
        """Lay codes `(b * blocks, books, n)` out on their grid."""
        if self.blocked:
            return codes.reshape(batch, -1, *codes.shape[1:]).transpose(1, 2)
        return codes if self.ordered else codes.reshape(*codes.shape[:2], *grid)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        """Turn codes into signals.

        Args:
            codes: `(b, books, k)` or `(b, books, blocks, k)`, k from 1 to N, where tokens are ordered, else
                `(b, books, *grid)`; a prefix of the books is allowed.
            size: The signals' size; where None that of training, or of whole steps (without a lead).
            lengths: int64 `(b,)`, or of clips `(b, blocks)`, how many of the tokens each sample keeps; all where None.

        Raises:
            UserError: k is 0 or above N, a length is 0 or above k, or there are other blocks than the size has.
        """
        steps: Sequence[int] = self.grid(size) if size is not None else ()
        if self.blocked:
            blocks = codes.shape[2]
            if size is not None and blocks != steps[0]:
                raise UserError(f"codes of {blocks} blocks: a clip of {size[0]} frames has {steps[0]}")
            steps = steps or (blocks, 0, 0)
            if lengths is not None:
                lengths = lengths.reshape(-1, 1 if lengths.ndim == 1 else blocks).expand(-1, blocks).flatten()
        elif not self.ordered:
            steps = codes.shape[2:]
        painted = self._painted(codes, lengths, steps)
        return painted[:, :, self.lead :] if size is None else self._cropped(painted, size)

    def _painted(
        self, codes: Tensor, lengths: Tensor | None, steps: Sequence[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode codes on their grid to a signal of whole steps."""
        codes = codes.transpose(1, 2).flatten(0, 1) if self.blocked else codes.flatten(2)
        kept = codes.shape[-1]
        if not kept or (self.ordered and kept > self.tokens):
            most = f"to {self.tokens}" if self.ordered else "on"
            raise UserError(f"{kept} tokens: this codec decodes from 1 {most}")
        if lengths is None and self.ordered:
            lengths = torch.full((len(codes),), kept, device=codes.device)
        elif lengths is not None and not 1 <= int(lengths.min()) <= int(lengths.max()) <= kept:
            raise UserError(f"lengths from {int(lengths.min())} to {int(lengths.max())}: there are 1 to {kept} tokens")
        if self.ordered:
            codes = nn.functional.pad(codes, (0, self.tokens - kept))
        return self.paint(self.bottleneck.decode(codes), lengths, steps, memory)

    def encode_chunk(self, signal: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Turn the next chunk of signals into codes: all chunks' codes together are those of the whole signals.

        Args:
            signal: `(b, c, t, ...)`, t a multiple of `latency`, in the first chunk less the `lead`; of the last chunk
                any, which is filled up as a whole signal is.
            state: What the chunk before gave, float32 `(b, S)`; None at the start. It is not changed.
            last: Whether the signals end here.

        Returns:
            Codes `(b, books, n, ...)` and the state for the next chunk.

        Raises:
            UserError: The codec can't code chunk by chunk (`obstacle`), or a shape is wrong.
        """
        self.memory_layout("encoder")  # before all else, it says why where there is none
        lead = self.lead if state is None else 0
        size = (signal.shape[2] + lead, *signal.shape[3:])
        grid = tuple(-(-side // step) for side, step in zip(size, self.hop, strict=True))
        shapes = self._shapes("encoder", grid[1:])
        check_chunk(size[0], self.latency, last, "samples", lead)
        before = self._state(state, len(signal), shapes)
        memory = unpack(before, shapes)
        features = self.encoder(filled(signal, list(self.hop), lead), memory=memory)
        codes = self.bottleneck.encode(self._narrowed(features, None))
        return self._gridded(codes, len(signal), grid), pack(memory, shapes, before)

    def decode_chunk(self, codes: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Turn the next chunk of codes into signals: all chunks' signals together are those of all codes.

        Args:
            codes: `(b, books, n, ...)`, n a multiple of `chunk_tokens`, of the last chunk any; a prefix of the books
                is allowed, and of each block's tokens.
            state: What the chunk before gave, float32 `(b, S)`; None at the start. It is not changed.
            last: Whether the codes end here.

        Returns:
            Signals of whole steps `(b, c, n * hop, ...)`, the first without the lead, and the state for the next chunk.

        Raises:
            UserError: The codec can't code chunk by chunk (`obstacle`), or a shape is wrong.
        """
        grid = codes.shape[2:]
        shapes = self._shapes("decoder", grid[1:])
        check_chunk(grid[0], self.chunk_tokens, last, "tokens")
        before = self._state(state, len(codes), shapes)
        memory = unpack(before, shapes)
        signal = self._painted(codes, None, (grid[0], 0, 0) if self.blocked else grid, memory)
        return signal[:, :, self.lead if state is None else 0 :], pack(memory, shapes, before)

    def _state(self, state: Tensor | None, batch: int, shapes: list[list[int]]) -> Tensor:
        """Check a state; make that of the start where there is none."""
        size = state_size(shapes)
        if state is None:
            return torch.zeros(batch, size, device=next(self.parameters()).device)
        if state.shape != (batch, size):
            raise UserError(
                f"state: {tuple(state.shape)}, this codec's is {(batch, size)}; give what the last chunk gave"
            )
        return state
