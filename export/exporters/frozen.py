"""A codec as it is exported: evaluation mode, float32, nothing left of training."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varitok.codecs.codec import Codec
from varitok.codecs.networks.run_length import RunLength
from varitok.codecs.streaming import ChunkedCodec, at_grid, pack, state_size, unpack

__all__ = ["FrozenCodec", "FrozenStream", "freeze"]


def freeze(codec: Codec, streaming: bool = True) -> "FrozenCodec":
    """Return the export form of a codec: a `FrozenStream` if it can stream, and should."""
    return FrozenStream(codec) if streaming and ChunkedCodec(codec).streams else FrozenCodec(codec)


class FrozenCodec(nn.Module):
    """The two directions of a codec, with no branch on data, so that they script, trace and export.

    With ordered tokens it takes signals of the size of training, clips of any number of frames, and any number of kept
    tokens; with placed tokens, signals of any size. The batch and the number of codebooks are free.

    Args:
        codec: What is copied; it stays as it is.
    """

    mask_token: Tensor
    positions: Tensor

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        codec = copy.deepcopy(codec).eval().float().cpu().requires_grad_(False)
        self._arrange(codec)
        for module in codec.modules():
            _fold(module)
            if isinstance(module, RunLength):
                module.packs = False
        self.bounded = codec.bounded
        self.layout = codec.layout
        self.tokens = codec.layout.tokens
        self.unit_latents = codec.unit_latents
        self.encoder = codec.encoder
        self.project_in = codec.project_in
        self.bottleneck = codec.bottleneck.frozen()
        self.project_out = codec.project_out
        self.decoder = codec.decoder
        fill = codec.length.mechanism.fill()
        self.masks = fill is not None
        self.register_buffer("mask_token", torch.zeros(0) if fill is None else fill.detach().clone())
        self.register_buffer("positions", torch.arange(self.tokens), persistent=False)
        self.eval()

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        """Take from the copied codec what only a kind of frozen codec needs."""

    @torch.jit.export
    def encode(self, signal: Tensor) -> Tensor:
        """Turn signals `(b, c, *grid)` in [-1, 1] into int64 codes.

        They are `(b, codebooks, n)`, of clips `(b, codebooks, *grid)`, or `(b, codebooks, blocks, N)`.
        """
        signal = self.layout.pad(signal, self.layout.causal_pad)
        return self._coded(self.encoder(signal), signal)

    def _coded(self, features: Tensor, signal: Tensor) -> Tensor:
        """Turn what the encoder made of a signal of whole steps into codes."""
        latents = self.project_in(features)
        if self.unit_latents:
            latents = self.layout.normalize(latents)
        codes: Tensor = self.bottleneck.encode(latents)  # type: ignore[operator]
        return self.layout.to_grid(codes, signal.shape[0], self.layout.steps(signal))

    @torch.jit.export
    def decode(self, codes: Tensor) -> Tensor:
        """Turn codes into signals, clamped to [-1, 1] where the codec's are bounded.

        Ordered ones `(b, codebooks, k)` or `(b, codebooks, blocks, k)`, k from 1 to N, into signals of the size of
        training; placed ones `(b, codebooks, n)` or `(b, codebooks, *grid)` into whole steps, without the causal pad.
        """
        grid, codes = self.layout.code_grid(codes), self.layout.flatten(codes)
        if self.masks:
            # All N positions are looked up and the tail replaced: a pad of N - k can't be exported.
            k = codes.shape[2]
            latents = self._filled(self._repeated(codes), k)
        else:
            latents = self.project_out(self.bottleneck.decode(codes))  # type: ignore[operator]
        signal = self.decoder(latents, None, grid)
        return self._limited(self.layout.cut_lead(signal))

    def _repeated(self, codes: Tensor) -> Tensor:
        """Look all N positions up, the last of k codes standing for those that aren't kept."""
        repeated = codes[:, :, self.positions.clamp(max=codes.shape[2] - 1)]
        latents: Tensor = self.project_out(self.bottleneck.decode(repeated))  # type: ignore[operator]
        return latents

    def _filled(self, latents: Tensor, k: int) -> Tensor:
        """Put the mask token in all positions from the k-th on."""
        return torch.where((self.positions < k).unsqueeze(-1), latents, self.mask_token)

    def _limited(self, signal: Tensor) -> Tensor:
        """Clamp what has bounds."""
        return signal.clamp(-1.0, 1.0) if self.bounded else signal

    def forward(self, signal: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(signal))


class FrozenStream(FrozenCodec):
    """A codec that also goes chunk by chunk, with a state of its own for each direction; zeros are the start.

    All chunks have a multiple of the codec's `latency` of samples, or of its `chunk_tokens`, but for the last. The
    causal pad is the caller's: copies of the first frame go into the first chunk, and come back before the first frame.

    Args:
        codec: What is copied; it stays as it is.

    Raises:
        UserError: It can't code chunk by chunk.
    """

    encoder_layout: list[list[int]]
    decoder_layout: list[list[int]]

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        chunked = ChunkedCodec(codec)
        self.encoder_layout = chunked.memory_layout("encoder")
        self.decoder_layout = chunked.memory_layout("decoder")

    @torch.jit.export
    def state_sizes(self, rows: int = 1, columns: int = 1) -> tuple[int, int]:
        """Count the numbers of a sample's state, S, in the encoder and in the decoder.

        Args:
            rows: Rows of the latents of frames; 1 for audio.
            columns: Columns of the latents of frames; 1 for audio.
        """
        return (
            state_size(at_grid(self.encoder_layout, [rows, columns])),
            state_size(at_grid(self.decoder_layout, [rows, columns])),
        )

    @torch.jit.export
    def encode_chunk(self, signal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of signals `(b, c, t, ...)` and a state `(b, S)` into codes and the next chunk's state."""
        signal = self.layout.pad(signal, 0)
        shapes = at_grid(self.encoder_layout, self.layout.steps(signal)[1:])
        memory = unpack(state, shapes)
        codes = self._coded(self.encoder(signal, None, memory), signal)
        return codes, pack(memory, shapes, state)

    @torch.jit.export
    def decode_chunk(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Turn a chunk of codes `(b, codebooks, n, ...)` and a state `(b, S)` into signals and the next state."""
        grid = self.layout.code_grid(codes)
        shapes = at_grid(self.decoder_layout, grid[1:])
        memory = unpack(state, shapes)
        codes = self.layout.flatten(codes)
        mask: Tensor | None = None
        if self.layout.tokens > 0:
            # What is remembered has all N positions: those that aren't kept are hidden, or replaced.
            k = codes.shape[2]
            latents = self._repeated(codes)
            if self.masks:
                latents = self._filled(latents, k)
            else:
                mask = (self.positions < k).expand(latents.shape[0], -1)
        else:
            latents = self.project_out(self.bottleneck.decode(codes))  # type: ignore[operator]
        signal = self.decoder(latents, mask, grid, memory)
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
