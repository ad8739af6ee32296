"""A codec as it is exported: evaluation mode, float32, nothing left of training."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varitok.codecs.codec import Codec
from varitok.codecs.networks.run_length import RunLength
from varitok.codecs.padding import filled
from varitok.codecs.streaming import at_grid, pack, state_size, unpack

__all__ = ["FrozenCodec", "FrozenStream", "freeze"]


def freeze(codec: Codec, streaming: bool = True) -> "FrozenCodec":
    """Give the export form of a codec: a `FrozenStream` where it can code chunk by chunk, and should."""
    return FrozenStream(codec) if streaming and codec.streams else FrozenCodec(codec)


class FrozenCodec(nn.Module):
    """The two directions of a codec, with no branch on data, so that they script, trace and export.

    With ordered tokens it takes signals of the size of training, clips of any number of frames, and any number of kept
    tokens; with placed tokens, signals of any size. The batch and the number of books are free.

    Args:
        codec: What is copied; it stays as it is.
    """

    __constants__ = ("blocked", "on_grid")  # so that TorchScript leaves out what isn't for this codec
    mask_token: Tensor
    places: Tensor

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        codec = copy.deepcopy(codec).eval().float().cpu().requires_grad_(False)
        self._arrange(codec)
        for module in codec.modules():
            _fold(module)
            if isinstance(module, RunLength):
                module.packs = False
        self.ordered = codec.ordered
        self.blocked = codec.blocked
        self.bounded = codec.bounded
        self.code_axis = codec.code_axis
        self.tokens = codec.tokens if codec.ordered else 0
        self.later_tokens = codec.later_tokens if codec.ordered else 0
        self.hop = list(codec.hop)
        self.lead = codec.lead
        self.on_grid = codec.on_grid
        self.unit_latents = codec.unit_latents
        self.encoder = codec.encoder
        self.project_in = codec.project_in
        self.bottleneck = codec.bottleneck.frozen()
        self.project_out = codec.project_out
        self.decoder = codec.decoder
        fill = codec.length.mechanism.fill()
        self.masks = fill is not None
        self.register_buffer("mask_token", torch.zeros(0) if fill is None else fill.detach().clone())
        self.register_buffer("places", torch.arange(self.tokens), persistent=False)
        self.eval()

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        """Take from the copied codec what only a kind of frozen codec needs."""

    @torch.jit.export
    def encode(self, signal: Tensor) -> Tensor:
        """Turn signals `(b, c, *grid)` in [-1, 1] into int64 codes.

        They are `(b, books, n)`, of clips `(b, books, *grid)`, or `(b, books, blocks, N)`.
        """
        if self.blocked or not self.ordered:
            signal = filled(signal, self.hop, self.lead)
        return self._coded(self.encoder(signal), signal)

    def _coded(self, features: Tensor, signal: Tensor) -> Tensor:
        """Turn what the encoder made of a signal of whole steps into codes."""
        latents = self.project_in(features)
        if self.unit_latents:
            some = latents[:, : self.later_tokens] if self.later_tokens < self.tokens else latents
            power = some.square().mean(2, keepdim=True)
            power = power if self.on_grid else power.mean(1, keepdim=True)
            latents = latents * (power + 1e-6).rsqrt()
        codes: Tensor = self.bottleneck.encode(latents)  # type: ignore[operator]
        if self.blocked:
            codes = codes.reshape(signal.shape[0], -1, codes.shape[1], codes.shape[2]).transpose(1, 2)
        if self.on_grid:
            shape = [codes.shape[0], codes.shape[1]]
            for axis, step in enumerate(self.hop):
                shape.append(signal.shape[axis + 2] // step)
            codes = codes.reshape(shape)
        return codes

    @torch.jit.export
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into signals, clamped to [-1, 1] where the codec's are bounded.

        Ordered ones `(b, books, k)` or `(b, books, blocks, k)`, k from 1 to N, into signals of the size of training;
        placed ones `(b, books, n)` or `(b, books, *grid)` into whole steps, without the lead.
        """
        blocks = codes.shape[2]
        if self.blocked:
            codes = codes.transpose(1, 2).reshape(-1, codes.shape[1], codes.shape[3])
        if self.masks:
            # All N places are looked up and the tail replaced: a pad of N - k can't be exported.
            k = codes.shape[2]
            repeated = codes[:, :, self.places.clamp(max=k - 1)]
            latents = self.project_out(self.bottleneck.decode(repeated))  # type: ignore[operator]
            latents = torch.where((self.places < k).unsqueeze(-1), latents, self.mask_token)
        else:
            latents = self.project_out(self.bottleneck.decode(codes.flatten(2)))  # type: ignore[operator]
        if self.on_grid:
            signal = self.decoder(latents, None, codes.shape[2], codes.shape[3], codes.shape[-1])
            signal = signal[:, :, self.lead :]
        elif self.blocked:
            signal = self.decoder(latents, None, blocks)
            signal = signal[:, :, self.lead :]
        else:
            signal = self.decoder(latents)
        return self._limited(signal)

    def _limited(self, signal: Tensor) -> Tensor:
        """Clamp what has bounds."""
        return signal.clamp(-1.0, 1.0) if self.bounded else signal

    def forward(self, signal: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(signal))


class FrozenStream(FrozenCodec):
    """A codec that also goes chunk by chunk, with a state of its own for each direction; zeros are the start.

    All chunks have a multiple of the codec's `latency` of samples, or of its `chunk_tokens`, but for the last. A lead
    is the caller's: copies of the first frame go into the first chunk, and come back before the first frame.

    Args:
        codec: What is copied; it stays as it is.

    Raises:
        UserError: It can't code chunk by chunk.
    """

    encoder_layout: list[list[int]]
    decoder_layout: list[list[int]]

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        self.encoder_layout = codec.memory_layout("encoder")
        self.decoder_layout = codec.memory_layout("decoder")

    @torch.jit.export
    def state_sizes(self, rows: int = 1, columns: int = 1) -> tuple[int, int]:
        """Count the numbers of a sample's state, S, in the encoder and in the decoder.

        Args:
            rows: Of the latents of frames; 1 for sounds.
            columns: Likewise.
        """
        return (
            state_size(at_grid(self.encoder_layout, rows, columns)),
            state_size(at_grid(self.decoder_layout, rows, columns)),
        )

    @torch.jit.export
    def encode_chunk(self, signal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of signals `(b, c, t, ...)` and a state `(b, S)` into codes and the next chunk's state."""
        signal = filled(signal, self.hop)
        rows, columns = 1, 1
        if self.on_grid:
            rows, columns = signal.shape[3] // self.hop[1], signal.shape[-1] // self.hop[-1]
        shapes = at_grid(self.encoder_layout, rows, columns)
        memory = unpack(state, shapes)
        codes = self._coded(self.encoder(signal, memory=memory), signal)
        return codes, pack(memory, shapes, state)

    @torch.jit.export
    def decode_chunk(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of codes `(b, books, n, ...)` and a state `(b, S)` into signals and the next state."""
        rows, columns = 1, 1
        if self.on_grid:
            rows, columns = codes.shape[3], codes.shape[-1]
        shapes = at_grid(self.decoder_layout, rows, columns)
        memory = unpack(state, shapes)
        if self.blocked:
            # What is remembered has all N places: those that aren't kept are hidden, or replaced.
            blocks, k = codes.shape[2], codes.shape[-1]
            codes = codes.transpose(1, 2).reshape(-1, codes.shape[1], k)[:, :, self.places.clamp(max=k - 1)]
            latents = self.project_out(self.bottleneck.decode(codes))  # type: ignore[operator]
            mask: Tensor | None = (self.places < k).expand(latents.shape[0], -1)
            if self.masks:
                latents = torch.where((self.places < k).unsqueeze(-1), latents, self.mask_token)
                mask = None
            signal = self.decoder(latents, mask, blocks, 0, 0, memory)
        else:
            latents = self.project_out(self.bottleneck.decode(codes.flatten(2)))  # type: ignore[operator]
            if self.on_grid:
                signal = self.decoder(latents, None, codes.shape[2], codes.shape[3], codes.shape[-1], memory)
            else:
                signal = self.decoder(latents, memory=memory)
        return self._limited(signal), pack(memory, shapes, state)


def _fold(module: nn.Module) -> None:
    """Make plain parameters of parametrized ones (weight norm); scripted as they are, they fail at the first call."""
    if not parametrize.is_parametrized(module):
        return
    # A deep copy shares its parametrized class with the original, which folding would break: it gets its own.
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    assert isinstance(module.parametrizations, nn.ModuleDict)
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
