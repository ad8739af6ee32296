"""Codecs and networks that read or make a signal chunk by chunk, exactly as they do it whole.

A layer that looks back has a `slot`, its place in a list: the memory, which goes through a network beside the mask. It
takes from there what it kept of the chunks before, and puts there what the next one needs. To those outside, all of the
memory is one flat float32 tensor `(b, S)`, the state, whose zeros are the start: an exported graph takes it and gives
the next.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from .codec import Codec

__all__ = ["ChunkedCodec", "arrange", "arrange_frames", "at_grid", "obstacle", "pack", "state_size", "unpack"]


class ChunkedCodec:
    """A codec that goes chunk by chunk: all chunks together give what the whole gives.

    Args:
        codec: What codes; its networks' streaming layers get their slots in the memory.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._layouts: dict[str, list[list[int]]] = {}

    @property
    def obstacle(self) -> str:
        """Why the codec can't code chunk by chunk, in a few words; empty if it can."""
        codec = self.codec
        return codec.layout.obstacle(codec.unit_latents) or obstacle(codec.encoder) or obstacle(codec.decoder)

    @property
    def streams(self) -> bool:
        """Whether it codes chunk by chunk as it codes a whole signal: it looks back only, and not without end."""
        return not self.obstacle

    @property
    def chunk_tokens(self) -> int:
        """Tokens that are made at once: of the codebooks of several rates, those of the slowest code; else 1."""
        rates = (getattr(module, "codebook_strides", ()) for module in self.codec.bottleneck.modules())
        return math.lcm(*(stride for strides in rates for stride in strides))

    @property
    def latency(self) -> int:
        """Samples that it waits for before it can give a token; every chunk has a multiple of them."""
        return self.codec.downsample[0] * self.chunk_tokens

    def state_sizes(self, grid: Sequence[int] = ()) -> tuple[int, int]:
        """Count the numbers of a sample's state, of the encoder and of the decoder.

        Args:
            grid: Rows and columns of the latents of frames.

        Raises:
            UserError: It can't code chunk by chunk.
        """
        encoder, decoder = (state_size(self._shapes(side, grid)) for side in ("encoder", "decoder"))
        return encoder, decoder

    def memory_layout(self, side: str) -> list[list[int]]:
        """Describe what the `encoder` or `decoder` remembers between chunks; see `arrange_frames`.

        Raises:
            UserError: It can't code chunk by chunk.
        """
        if self.obstacle:
            raise UserError(f"this codec can't code chunk by chunk: {self.obstacle}")
        if side not in self._layouts:
            network = self.codec.encoder if side == "encoder" else self.codec.decoder
            run = self._encode_zeros if side == "encoder" else self._decode_zeros
            if self.codec.layout.free_sides:
                self._layouts[side] = arrange_frames(network, run)
            else:
                shapes = arrange(network, lambda memory: run(memory, network.rows, network.columns))  # of training
                self._layouts[side] = [[n for count in shape for n in (count, 0, 0)] for shape in shapes]
        return self._layouts[side]

    def _encode_zeros(self, memory: list[Tensor], *sides: int) -> None:
        """Send a step of zeros through the encoder, with frames of `sides` rows and columns of latents."""
        codec = self.codec
        size = [step * count for step, count in zip(codec.downsample, (1, *sides), strict=False)]
        signal = next(codec.parameters()).new_zeros(1, codec.encoder.channels, *size)
        codec.encoder(signal, None, memory)

    def _decode_zeros(self, memory: list[Tensor], *sides: int) -> None:
        """Send the latents of a step through the decoder."""
        codec = self.codec
        grid = (1, *sides)[: len(codec.downsample)]
        count = codec.layout.tokens or math.prod(grid)
        latents = next(codec.parameters()).new_zeros(1, count, codec.decoder.width)
        codec.decoder(latents, None, list(grid), memory)

    def _shapes(self, side: str, sides: Sequence[int]) -> list[list[int]]:
        """Compute the shapes of the memory, with frames of `sides` rows and columns of latents."""
        return at_grid(self.memory_layout(side), [*sides, 1, 1])

    def encode_chunk(self, signal: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Encode the next chunk of signals: all chunks' codes together are those of the whole signals.

        Args:
            signal: `(b, c, t, ...)`, t a multiple of `latency`, in the first chunk less `causal_pad`; of the last chunk
                any, which is filled up as a whole signal is.
            state: What the chunk before gave, float32 `(b, S)`; None at the start. It is not changed.
            last: Whether the signals end here.

        Returns:
            Codes `(b, q, n, ...)` and the state for the next chunk.

        Raises:
            UserError: The codec can't code chunk by chunk (`obstacle`), or a shape is wrong.
        """
        self.memory_layout("encoder")  # first, because it raises the clearest error
        layout = self.codec.layout
        causal_pad = layout.causal_pad if state is None else 0
        _check_chunk(signal.shape[2] + causal_pad, self.latency, last, "samples", causal_pad)
        whole = layout.pad(signal, causal_pad)
        grid = layout.steps(whole)
        shapes = self._shapes("encoder", grid[1:])
        before = self._state(state, len(signal), shapes)
        memory = unpack(before, shapes)
        latents = self.codec.to_bottleneck(self.codec.encoder(whole, None, memory))
        codes = layout.to_grid(self.codec.bottleneck.encode(latents), len(signal), grid)
        return codes, pack(memory, shapes, before)

    def decode_chunk(self, codes: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Decode the next chunk of codes: all chunks' signals together are those of all codes.

        Args:
            codes: `(b, q, n, ...)`, n a multiple of `chunk_tokens`, of the last chunk any; a prefix of the codebooks is
                allowed, and of each block's tokens.
            state: What the chunk before gave, float32 `(b, S)`; None at the start. It is not changed.
            last: Whether the codes end here.

        Returns:
            Signals of whole steps `(b, c, n * downsample, ...)`, the first without the causal pad, and the state for
            the next chunk.

        Raises:
            UserError: The codec can't code chunk by chunk (`obstacle`), or a shape is wrong.
        """
        layout = self.codec.layout
        shapes = self._shapes("decoder", codes.shape[3:])
        _check_chunk(codes.shape[2], self.chunk_tokens, last, "tokens")
        before = self._state(state, len(codes), shapes)
        memory = unpack(before, shapes)
        flat, lengths = layout.prefix(codes, None)
        signal = self.codec.paint(self.codec.bottleneck.decode(flat), lengths, layout.code_grid(codes), memory)
        return layout.cut_lead(signal) if state is None else signal, pack(memory, shapes, before)

    def _state(self, state: Tensor | None, batch: int, shapes: list[list[int]]) -> Tensor:
        """Check a state; None is the initial one."""
        size = state_size(shapes)
        if state is None:
            return torch.zeros(batch, size, device=next(self.codec.parameters()).device)
        if state.shape != (batch, size):
            raise UserError(
                f"state: {tuple(state.shape)}, this codec's is {(batch, size)}; give what the last chunk gave"
            )
        return state


def obstacle(network: nn.Module) -> str:
    """Return why a network can't stream, in a few words; empty if it can.

    Layers have an attribute `obstacle`; without one they are assumed to process each step independently.
    """
    return next((found for module in network.modules() if (found := getattr(module, "obstacle", ""))), "")


def arrange(network: nn.Module, run: Callable[[list[Tensor]], object]) -> list[list[int]]:
    """Assign each streaming layer of a network its slot in the memory, and find the shapes there.

    Args:
        network: Whose modules with a `slot` get one, in the order in which they were registered.
        run: Sends a chunk of a batch of one through the network, with the memory that it is given.

    Returns:
        The shape in each place for a batch of one; empty if nothing is kept.
    """
    slots = 0
    for module in network.modules():
        if hasattr(module, "slot"):
            module.slot = slots  # type: ignore[assignment]
            slots += 1
    memory = [torch.zeros(0) for _ in range(slots)]
    with torch.no_grad():
        run(memory)
    return [list(kept.shape) if kept.numel() else [] for kept in memory]


def arrange_frames(network: nn.Module, run: Callable[[list[Tensor], int, int], object]) -> list[list[int]]:
    """Do the same for a network of frames, whose memory grows with them; `at_grid` makes shapes of what this gives.

    Args:
        network: As in `arrange`.
        run: Sends a chunk of frames through the network, given their rows and columns of latents.

    Returns:
        For each place three numbers for each of its axes: the steps of one latent, and whether (1) or not (0) there
        are as many for each row and for each column of the latents' grid.
    """
    one, taller, wider = (
        arrange(network, lambda memory, size=size: run(memory, *size))  # type: ignore[misc]
        for size in ((1, 1), (2, 1), (1, 2))
    )
    return [
        [n for a, b, c in zip(*axes, strict=True) for n in (a, int(b > a), int(c > a))]
        for axes in zip(one, taller, wider, strict=True)
    ]


def at_grid(layout: list[list[int]], sides: list[int]) -> list[list[int]]:
    """Compute the shapes of a memory of frames, given their rows and columns of latents; scriptable.

    Args:
        layout: See `arrange_frames`.
        sides: The rows and columns; of use only where the layout grows with them.
    """
    shapes: list[list[int]] = []
    for axes in layout:
        shape: list[int] = []
        for axis in range(len(axes) // 3):
            steps = axes[3 * axis]
            if axes[3 * axis + 1] == 1:
                steps = steps * sides[0]
            if axes[3 * axis + 2] == 1:
                steps = steps * sides[1]
            shape.append(steps)
        shapes.append(shape)
    return shapes


def state_size(shapes: list[list[int]]) -> int:
    """Count the numbers of a sample's state, S; scriptable."""
    total = 0
    for shape in shapes:
        if len(shape) > 0:
            total += _product(shape)
    return total


def _product(shape: list[int]) -> int:
    size = 1
    for side in shape:
        size *= side
    return size


def unpack(state: Tensor, shapes: list[list[int]]) -> list[Tensor]:
    """Turn a state `(b, S)` into a memory whose places have these shapes (see `arrange`); scriptable."""
    memory: list[Tensor] = []
    begin = 0
    for shape in shapes:
        if len(shape) == 0:
            memory.append(torch.zeros(0))
        else:
            size = _product(shape)
            memory.append(state[:, begin : begin + size].reshape([-1] + shape[1:]))  # noqa: RUF005 (TorchScript)
            begin += size
    return memory


def pack(memory: list[Tensor], shapes: list[list[int]], state: Tensor) -> Tensor:
    """Turn a memory into the state that comes after `state`; scriptable."""
    kept: list[Tensor] = []
    for index, shape in enumerate(shapes):
        if len(shape) > 0:
            kept.append(memory[index].to(state.dtype).reshape(state.shape[0], -1))
    return torch.cat(kept, dim=1) if len(kept) > 0 else state


def _check_chunk(steps: int, whole: int, last: bool, what: str, causal_pad: int = 0) -> None:
    """Check a chunk's length: not empty without its causal pad, and a multiple of `whole` unless it is the last."""
    if steps == causal_pad or (steps % whole and not last):
        less = f", less {causal_pad} in the first" if causal_pad else ""
        raise UserError(
            f"a chunk of {steps - causal_pad} {what}: it should have a multiple of {whole}{less}, if it isn't the last"
        )
