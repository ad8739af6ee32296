"""Streaming: encode or decode a signal chunk by chunk, with the same result as for the whole signal.

Networks pass a memory, a list of tensors, from layer to layer beside the mask. A causal layer has a `slot`, its index
in the memory: it reads the context of previous chunks there, and writes that of the next chunk. Outside the networks,
the memory is one flat float32 tensor `(b, S)`, the state, initially zeros. An exported graph has the state as an input,
and the next state as an output.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from varitok import UserError

from .codec import Codec

__all__ = ["ChunkedCodec", "arrange", "arrange_frames", "at_grid", "obstacle", "pack", "state_size", "unpack"]


class ChunkedCodec:
    """Chunk-by-chunk interface of a codec; all chunks together equal the whole signal.

    Args:
        codec: The codec; slots in the memory are assigned to its networks' streaming layers.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self._layouts: dict[str, list[list[int]]] = {}

    @property
    def obstacle(self) -> str:
        """Return why the codec can't stream, in a few words; empty if it can."""
        codec = self.codec
        return codec.layout.obstacle(codec.unit_latents) or obstacle(codec.encoder) or obstacle(codec.decoder)

    @property
    def streams(self) -> bool:
        """Return whether the codec can stream: it is causal, with a finite receptive field."""
        return not self.obstacle

    @property
    def chunk_tokens(self) -> int:
        """Return the tokens per smallest chunk: with multi-rate codebooks, those of the coarsest code; else 1.

        Networks that reflect the start of a signal need more (`Network.first_steps`).
        """
        rates = (getattr(module, "codebook_strides", ()) for module in self.codec.bottleneck.modules())
        coarsest = math.lcm(self.codec.encoder.multiple, *(stride for strides in rates for stride in strides))
        first = max(self.codec.encoder.first_steps, self.codec.decoder.first_steps)
        return coarsest * math.ceil(first / coarsest)

    @property
    def latency(self) -> int:
        """Return the samples per smallest chunk, the latency; every chunk has a multiple of them."""
        return self.codec.downsample[0] * self.chunk_tokens

    def state_sizes(self, grid: Sequence[int] = ()) -> tuple[int, int]:
        """Return the sizes S of the encoder's and the decoder's state.

        Args:
            grid: Rows and columns of the latents of frames.

        Raises:
            UserError: The codec can't stream.
        """
        encoder, decoder = (state_size(self._shapes(side, grid)) for side in ("encoder", "decoder"))
        return encoder, decoder

    def memory_layout(self, side: str) -> list[list[int]]:
        """Return the memory layout of the `encoder` or `decoder`; see `arrange_frames`.

        Raises:
            UserError: The codec can't stream.
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
        """Encode one step of zeros, with frames of `sides` rows and columns of latents."""
        codec = self.codec
        size = [step * count for step, count in zip(codec.downsample, (1, *sides), strict=False)]
        signal = next(codec.parameters()).new_zeros(1, codec.encoder.channels, *size)
        codec.encoder(signal, None, memory)

    def _decode_zeros(self, memory: list[Tensor], *sides: int) -> None:
        """Decode one step of zero latents, of `sides` rows and columns."""
        codec = self.codec
        grid = (1, *sides)[: len(codec.downsample)]
        count = codec.layout.tokens or math.prod(grid)
        latents = next(codec.parameters()).new_zeros(1, count, codec.decoder.width)
        codec.decoder(latents, None, list(grid), memory)

    def _shapes(self, side: str, sides: Sequence[int]) -> list[list[int]]:
        """Return the shapes of the memory for frames of `sides` rows and columns of latents."""
        return at_grid(self.memory_layout(side), [*sides, 1, 1])

    def encode_chunk(self, signal: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Encode the next chunk of signals; the concatenated codes equal those of the whole signals.

        Args:
            signal: `(b, c, t, ...)`, t a multiple of `latency`, minus `causal_pad` in the first chunk. The last chunk
                may have any length, and is padded like a whole signal.
            state: State returned with the previous chunk, float32 `(b, S)`; None for the first. It is not modified.
            last: Whether this is the last chunk.

        Returns:
            Codes `(b, q, n, ...)` and the state for the next chunk.

        Raises:
            UserError: The codec can't stream (`obstacle`), or a shape is wrong.
        """
        self.memory_layout("encoder")  # first, because its error is the clearest
        layout = self.codec.layout
        causal_pad = layout.causal_pad if state is None else 0
        _check_chunk(signal.shape[2] + causal_pad, self.latency, last, "samples", causal_pad)
        whole = signal if self.codec.encoder.partial else layout.pad(signal, causal_pad)
        grid = layout.steps(whole)
        shapes = self._shapes("encoder", grid[1:])
        before = self._state(state, len(signal), shapes)
        memory = unpack(before, shapes)
        latents = self.codec.to_bottleneck(self.codec.encoder(whole, None, memory), None, grid)
        codes = layout.to_grid(self.codec.bottleneck.encode(latents), len(signal), grid)
        return codes, pack(memory, shapes, before)

    def decode_chunk(self, codes: Tensor, state: Tensor | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Decode the next chunk of codes; the concatenated signals equal those of all codes.

        Args:
            codes: `(b, q, n, ...)`, n a multiple of `chunk_tokens`, except in the last chunk. A prefix of the codebooks
                and of each block's tokens is allowed.
            state: State returned with the previous chunk, float32 `(b, S)`; None for the first. It is not modified.
            last: Whether this is the last chunk.

        Returns:
            Signals of whole steps `(b, c, n * downsample, ...)`, without the causal pad, and the state for the next
            chunk.

        Raises:
            UserError: The codec can't stream (`obstacle`), or a shape is wrong.
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
        """Check the shape of a state; return zeros for None."""
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
    """Assign a slot in the memory to each streaming layer of a network, and find the memory's shapes.

    Args:
        network: Network whose modules with a `slot` get one, in the order of their registration.
        run: Function that runs the network on a chunk of batch size 1 with the given memory.

    Returns:
        The shape in each slot at batch size 1; empty if the layer keeps nothing.
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
    """Assign slots for a network of frames, and find how the memory's shapes grow with the latents' grid.

    Args:
        network: See `arrange`.
        run: Function that runs the network on a chunk of frames, given the memory, rows and columns of latents.

    Returns:
        A layout, from which `at_grid` computes shapes. For each slot it has three numbers per axis: the size for a grid
        of 1 x 1, and whether it (1) or not (0) is multiplied by the rows and by the columns.
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
    """Return the shapes of a memory for a number of rows and columns of latents; scriptable.

    Args:
        layout: See `arrange_frames`.
        sides: Rows and columns; ignored if the layout doesn't grow with them.
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
    """Return the size S of the state of a memory of these shapes; scriptable."""
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
    """Split a state `(b, S)` into a memory of these shapes at batch size 1 (see `arrange`); scriptable."""
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
    """Flatten a memory to the next state `(b, S)`, in the dtype of `state`, the previous one; scriptable."""
    kept: list[Tensor] = []
    for index, shape in enumerate(shapes):
        if len(shape) > 0:
            kept.append(memory[index].to(state.dtype).reshape(state.shape[0], -1))
    return torch.cat(kept, dim=1) if len(kept) > 0 else state


def _check_chunk(steps: int, whole: int, last: bool, what: str, causal_pad: int = 0) -> None:
    """Check that a chunk is not empty without its causal pad, and a multiple of `whole` unless it is the last."""
    if steps == causal_pad or (steps % whole and not last):
        less = f", less {causal_pad} in the first" if causal_pad else ""
        raise UserError(
            f"a chunk of {steps - causal_pad} {what}: it should have a multiple of {whole}{less}, if it isn't the last"
        )
