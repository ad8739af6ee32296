"""A codec as it is exported: evaluation mode, float32, nothing left of training."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.streaming import pack, state_size, unpack

__all__ = ["FrozenCodec", "FrozenStream", "freeze"]


def freeze(codec: Codec) -> "FrozenCodec":
    """Give the export form of a codec: a `FrozenStream` where it can code chunk by chunk.

    Raises:
        UserError: Tokens lie on a grid of more than one axis.
    """
    return FrozenStream(codec) if codec.streams else FrozenCodec(codec)


class FrozenCodec(nn.Module):
    """The two directions of a codec, with no branch on data, so that they script, trace and export.

    With ordered tokens it takes signals of the size of training, and any number of kept tokens; with tokens placed
    along one axis, signals of any length. The batch and the number of books are free.

    Args:
        codec: What is copied; it stays as it is.

    Raises:
        UserError: Tokens lie on a grid of more than one axis.
    """

    mask_token: Tensor
    places: Tensor

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        codec = copy.deepcopy(codec).eval().float().cpu().requires_grad_(False)
        self._arrange(codec)
        for module in codec.modules():
            _fold(module)
        if not codec.ordered and len(codec.hop) > 1:
            raise UserError("export: tokens on a grid of several axes can't be exported yet, only along one")
        self.ordered = codec.ordered
        self.tokens = codec.tokens if codec.ordered else 0
        self.hop = codec.hop[0]
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
        """Turn signals `(b, c, *grid)` in [-1, 1] into int64 codes `(b, books, n)`."""
        if not self.ordered:
            signal = functional.pad(signal, [0, -signal.shape[2] % self.hop])
        latents = self.project_in(self.encoder(signal))
        if self.unit_latents:
            latents = latents * (latents.square().mean([1, 2], keepdim=True) + 1e-6).rsqrt()
        codes: Tensor = self.bottleneck.encode(latents)  # type: ignore[operator]
        return codes

    @torch.jit.export
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into signals clamped to [-1, 1].

        Ordered ones `(b, books, k)`, k from 1 to N, into signals of the size of training; placed ones `(b, books, n)`
        into n whole steps.
        """
        if self.masks:
            # All N places are looked up and the tail replaced: a pad of N - k can't be exported.
            k = codes.shape[2]
            filled = codes[:, :, self.places.clamp(max=k - 1)]
            latents = self.project_out(self.bottleneck.decode(filled))  # type: ignore[operator]
            latents = torch.where((self.places < k).unsqueeze(-1), latents, self.mask_token)
        else:
            latents = self.project_out(self.bottleneck.decode(codes))  # type: ignore[operator]
        signal: Tensor = self.decoder(latents).clamp(-1.0, 1.0)
        return signal

    def forward(self, signal: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(signal))


class FrozenStream(FrozenCodec):
    """A codec that also goes chunk by chunk, with a state of its own for each direction; zeros are the start.

    All chunks have a multiple of the codec's `latency` of samples, or of its `chunk_tokens`, but for the last.

    Args:
        codec: What is copied; it stays as it is.

    Attributes:
        encoder_state_size: Numbers of a sample's state, S, in the encoder.
        decoder_state_size: Likewise in the decoder.

    Raises:
        UserError: It can't code chunk by chunk.
    """

    encoder_shapes: list[list[int]]
    decoder_shapes: list[list[int]]

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        self.encoder_shapes = codec.memory_shapes("encoder")
        self.decoder_shapes = codec.memory_shapes("decoder")
        self.encoder_state_size = state_size(self.encoder_shapes)
        self.decoder_state_size = state_size(self.decoder_shapes)

    @torch.jit.export
    def encode_chunk(self, signal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of signals `(b, c, t)` and a state `(b, S)` into codes and the next chunk's state."""
        memory = unpack(state, self.encoder_shapes)
        signal = functional.pad(signal, [0, -signal.shape[2] % self.hop])
        latents = self.project_in(self.encoder(signal, memory=memory))
        codes: Tensor = self.bottleneck.encode(latents)  # type: ignore[operator]
        return codes, pack(memory, self.encoder_shapes, state)

    @torch.jit.export
    def decode_chunk(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of codes `(b, books, n)` and a state `(b, S)` into signals, clamped, and the next state."""
        memory = unpack(state, self.decoder_shapes)
        latents = self.project_out(self.bottleneck.decode(codes))  # type: ignore[operator]
        signal: Tensor = self.decoder(latents, memory=memory).clamp(-1.0, 1.0)
        return signal, pack(memory, self.decoder_shapes, state)


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
