"""The export form of a codec: evaluation mode, float32, without the parts that only training needs."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varitok.codecs.codec import Codec
from varitok.codecs.networks.contract import GenerativeDecoder
from varitok.codecs.networks.layers.run_length import RunLength
from varitok.codecs.streaming import ChunkedCodec, at_grid, pack, state_size, unpack

__all__ = ["FrozenCodec", "FrozenGenerator", "FrozenStream", "fold", "freeze"]


def freeze(codec: Codec, streaming: bool = True) -> "FrozenCodec":
    """Return the export form of a codec: a `FrozenGenerator` if its decoder samples, a `FrozenStream` if it streams.

    Args:
        codec: Codec to copy; it isn't changed.
        streaming: Whether it should stream if it can.
    """
    if isinstance(codec.decoder, GenerativeDecoder):
        return FrozenGenerator(codec)
    return FrozenStream(codec) if streaming and ChunkedCodec(codec).streams else FrozenCodec(codec)


class FrozenCodec(nn.Module):
    """A codec's `encode` and `decode` without branches on data, so that they can be scripted, traced and exported.

    With ordered tokens, signals have the training size (clips any number of frames), and any number of tokens is kept.
    With placed tokens, signals have any size. The batch size and the number of codebooks are free.

    Args:
        codec: Codec to copy; it isn't changed.
    """

    mask_token: Tensor
    positions: Tensor

    def __init__(self, codec: Codec) -> None:
        super().__init__()
        codec = copy.deepcopy(codec).eval().float().cpu().requires_grad_(False)
        self._arrange(codec)
        for module in codec.modules():
            fold(module)
            if isinstance(module, RunLength):
                module.packs = False
        self.bounded = codec.bounded
        self.layout = codec.layout
        self.tokens = codec.layout.tokens
        self.unit_latents = codec.unit_latents
        self.partial = codec.encoder.partial
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
        """Set the attributes that only a subclass needs, from the copied codec."""

    @torch.jit.export
    def encode(self, signal: Tensor) -> Tensor:
        """Encode signals `(b, c, *grid)` in [-1, 1] to codes, int64; latents, float32, if the codec is continuous.

        Their shape is `(b, codebooks, n)`; for clips `(b, codebooks, *grid)`, or `(b, codebooks, blocks, N)`.
        """
        if not self.partial:
            signal = self.layout.pad(signal, self.layout.causal_pad)
        return self._coded(self.encoder(signal), signal)

    def _coded(self, features: Tensor, signal: Tensor) -> Tensor:
        """Compute codes from the encoder's features of a signal that is padded to whole steps."""
        grid = self.layout.steps(signal)
        latents = self.project_in(features, None, grid)
        if self.unit_latents:
            latents = self.layout.normalize(latents)
        codes: Tensor = self.bottleneck.encode(latents)  # type: ignore[operator]
        return self.layout.to_grid(codes, signal.shape[0], grid)

    @torch.jit.export
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes to signals, clamped to [-1, 1] if the codec is bounded.

        Ordered codes `(b, codebooks, k)` or `(b, codebooks, blocks, k)`, k from 1 to N, give signals of training size.
        Placed codes `(b, codebooks, n)` or `(b, codebooks, *grid)` give whole steps, without the causal pad.
        """
        grid = self.layout.code_grid(codes)
        signal = self.decoder(self._shown(codes, grid), None, grid)
        return self._limited(self.layout.cut_lead(signal))

    def _shown(self, codes: Tensor, grid: list[int]) -> Tensor:
        """Return the latents `(b * blocks, n, width)` that the decoder sees of codes."""
        codes = self.layout.flatten(codes)
        if self.masks:
            # Look up all N positions and replace the tail: a pad of N - k can't be exported.
            k = codes.shape[2]
            latents = self._filled(self._repeated(codes), k)
        else:
            latents = self.project_out(self.bottleneck.decode(codes), None, grid)  # type: ignore[operator]
        return latents

    def _repeated(self, codes: Tensor) -> Tensor:
        """Look up N positions, repeating the last code: `(b, codebooks, k)` -> latents `(b, N, width)`."""
        repeated = codes[:, :, self.positions.clamp(max=codes.shape[2] - 1)]
        nowhere: list[int] = []  # ordered tokens have no grid
        latents: Tensor = self.project_out(self.bottleneck.decode(repeated), None, nowhere)  # type: ignore[operator]
        return latents

    def _filled(self, latents: Tensor, k: int) -> Tensor:
        """Replace the latents `(b, N, width)` from position k on by the mask token."""
        return torch.where((self.positions < k).unsqueeze(-1), latents, self.mask_token)

    def _limited(self, signal: Tensor) -> Tensor:
        """Clamp a signal to [-1, 1] if the codec is bounded."""
        return signal.clamp(-1.0, 1.0) if self.bounded else signal

    def forward(self, signal: Tensor) -> Tensor:
        """Encode and decode."""
        return self.decode(self.encode(signal))


class FrozenGenerator(FrozenCodec):
    """A frozen codec whose decoder samples: `sample` takes the noise that `decode` computes from the decoder's seed.

    Args:
        codec: Codec to copy; it isn't changed.

    Attributes:
        noise: Noise of the seed for a signal of training, `(1, c, *size)`.
        steps: Steps of the sampler.
    """

    noise: Tensor

    @torch.jit.unused
    def _arrange(self, codec: Codec) -> None:
        assert isinstance(codec.decoder, GenerativeDecoder)
        self.steps = codec.decoder.steps
        self.register_buffer("noise", codec.decoder.draw([], torch.zeros(0)), persistent=False)

    @torch.jit.export
    def decode(self, codes: Tensor) -> Tensor:
        """Decode codes as `FrozenCodec.decode` does, from the seed's noise."""
        return self.sample(codes, self.noise)

    @torch.jit.export
    def sample(self, codes: Tensor, noise: Tensor) -> Tensor:
        """Decode codes from standard normal noise `(1 or b, c, *size)`."""
        grid = self.layout.code_grid(codes)
        signal = self.decoder(self._shown(codes, grid), None, grid, None, noise)
        return self._limited(self.layout.cut_lead(signal))

    def step(self, codes: Tensor, sample: Tensor, state: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
        """Do one step of `sample`, which ONNX files repeat; the last one returns the signal.

        Args:
            codes: See `sample`.
            sample: See `GenerativeDecoder.step`.
            state: See `GenerativeDecoder.step`.
            number: See `GenerativeDecoder.step`.
        """
        latents = self._shown(codes, self.layout.code_grid(codes))
        sample, state = self.decoder.step(latents, None, sample, state, number)  # type: ignore[operator]
        return torch.where(number == self.steps - 1, self._limited(sample), sample), state


class FrozenStream(FrozenCodec):
    """A frozen codec that also runs chunk by chunk, with one state for each direction; initial states are zeros.

    Each chunk but the last has a multiple of the codec's `latency` samples, or of its `chunk_tokens` tokens. The caller
    handles the causal pad: it prepends copies of the first frame to the first chunk, and drops their reconstructions.

    Args:
        codec: Codec to copy; it isn't changed.

    Raises:
        UserError: The codec can't stream.
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
        """Return S, the size of a sample's state, for the encoder and for the decoder.

        Args:
            rows: Rows of a frame's latents; 1 for audio.
            columns: Columns of a frame's latents; 1 for audio.
        """
        return (
            state_size(at_grid(self.encoder_layout, [rows, columns])),
            state_size(at_grid(self.decoder_layout, [rows, columns])),
        )

    @torch.jit.export
    def encode_chunk(self, signal: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Encode a chunk of signals `(b, c, t, ...)`, given a state `(b, S)`; return codes and next state."""
        if not self.partial:
            signal = self.layout.pad(signal, 0)
        shapes = at_grid(self.encoder_layout, self.layout.steps(signal)[1:])
        memory = unpack(state, shapes)
        codes = self._coded(self.encoder(signal, None, memory), signal)
        return codes, pack(memory, shapes, state)

    @torch.jit.export
    def decode_chunk(self, codes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Decode a chunk of codes `(b, codebooks, n, ...)`, given a state `(b, S)`; return signals and next state."""
        grid = self.layout.code_grid(codes)
        shapes = at_grid(self.decoder_layout, grid[1:])
        memory = unpack(state, shapes)
        codes = self.layout.flatten(codes)
        mask: Tensor | None = None
        if self.layout.tokens > 0:
            # The state has all N positions: mask those that aren't kept, or replace them by the mask token.
            k = codes.shape[2]
            latents = self._repeated(codes)
            if self.masks:
                latents = self._filled(latents, k)
            else:
                mask = (self.positions < k).expand(latents.shape[0], -1)
        else:
            latents = self.project_out(self.bottleneck.decode(codes), None, grid)  # type: ignore[operator]
        signal = self.decoder(latents, mask, grid, memory)
        return self._limited(signal), pack(memory, shapes, state)


def fold(module: nn.Module) -> None:
    """Replace parametrized weights (weight norm) by plain parameters; scripted, they would fail at the first call."""
    if not parametrize.is_parametrized(module):
        return
    # A deep copy shares its parametrized class with the original. It gets its own, which folding may change.
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    assert isinstance(module.parametrizations, nn.ModuleDict)
    for name in list(module.parametrizations):
        parametrize.remove_parametrizations(module, name, leave_parametrized=True)
