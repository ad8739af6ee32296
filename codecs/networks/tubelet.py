"""Transformers over tubelets of clips, with block-causal (BSQ-ViT) or factorized space-time attention (OmniTokenizer).

A tubelet is a box of frames, rows and columns. A linear layer embeds it as a token, another maps tokens back to pixels.
"""

import math
from functools import partial
from typing import Annotated, Literal

from torch import Tensor, nn

from varitok import UserError

from .contract import Decoder, Encoder
from .layers.convolution import along_first, at_rate, zero_invalid
from .layers.run_length import RunLength, changed_tokens
from .layers.sequence import SequenceTransformer

__all__ = ["TubeletDecoder", "TubeletEncoder", "from_tubelets", "to_tubelets"]

Attention = Literal["block", "axial"]


def to_tubelets(signal: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """Split clips `(b, c, t, h, w)` into tubelets `(b, n, c * prod(patch))` by step, row and column; scriptable."""
    b, c = signal.shape[0], signal.shape[1]
    first, second, third = patch
    rows, columns = signal.shape[3] // second, signal.shape[4] // third
    # (b, c, t, first, rows, second, columns, third) -> (b, t, rows, columns, c, first, second, third)
    x = signal.reshape(b, c, -1, first, rows, second, columns, third).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, -1, c * first * second * third)


def from_tubelets(x: Tensor, patch: tuple[int, int, int], channels: int, rows: int, columns: int) -> Tensor:
    """Invert `to_tubelets`: `(b, n, c * prod(patch))` with rows x columns per step to `(b, c, t, h, w)`; scriptable."""
    b = x.shape[0]
    first, second, third = patch
    # (b, t, rows, columns, c, first, second, third) -> (b, c, t, first, rows, second, columns, third)
    x = x.reshape(b, -1, rows, columns, channels, first, second, third).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return x.reshape(b, channels, -1, rows * second, columns * third)


class _Trunk(nn.Module):
    """Transformer of encoder and decoder.

    With "block", tokens attend to all tokens of their own and of earlier frames (BSQ-ViT, arXiv 2406.07548, section
    3.2). With "axial", `depth` blocks attend within frames and `depth` blocks along time (OmniTokenizer, arXiv
    2406.09399).
    """

    def __init__(
        self,
        base: int,
        depth: int,
        heads: int,
        hidden: int | None,
        attention: str,
        window: int | None,
        causal: bool,
    ) -> None:
        super().__init__()
        if attention not in ("block", "axial"):
            raise UserError(f"codec: attention={attention!r} should be block or axial")
        network = partial(SequenceTransformer, base, depth, heads, hidden, layer_scale=1.0, qk_norm=True)
        self.blocks: SequenceTransformer | None = None
        self.within: SequenceTransformer | None = None
        self.along: SequenceTransformer | None = None
        if attention == "block":
            self.blocks = network(causal=causal, window=window, axes=3)
        else:
            self.within = network(axes=3)
            self.within.obstacle = ""  # each frame is complete, so this attention can stream
            self.along = network(causal=causal, window=window)
        self.norm = nn.LayerNorm(base)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None,
        rows: int,
        columns: int,
        memory: list[Tensor] | None,
        onward: bool,
        some: Tensor | None = None,
    ) -> Tensor:
        """Transform tokens `(b, n, d)`.

        With "axial", attention is within frames first if `onward` (encoder), else along time first. With "block",
        `some` `(b, n)` are the indices of these tokens in the full grid, if some are dropped.
        """
        if self.blocks is not None:
            x = self.blocks(x, mask, memory, rows, columns, 0, some)
        elif onward:
            x = self._along(self._within(x, rows, columns), mask, rows * columns, memory)
        else:
            x = self._within(self._along(x, mask, rows * columns, memory), rows, columns)
        y: Tensor = self.norm(x)
        return y

    def _within(self, x: Tensor, rows: int, columns: int) -> Tensor:
        b, n, d = x.shape
        assert self.within is not None
        # (b, n, d) -> (b * t, rows * columns, d)
        frames: Tensor = self.within(x.reshape(-1, rows * columns, d), None, None, rows, columns)
        return frames.reshape(b, n, d)

    def _along(self, x: Tensor, mask: Tensor | None, frame: int, memory: list[Tensor] | None) -> Tensor:
        b, n, d = x.shape
        assert self.along is not None
        steps: Tensor | None = None
        if mask is not None:
            steps = mask.reshape(b, -1, frame).transpose(1, 2).reshape(b * frame, -1)  # (b, n) -> (b * frame, t)
        tubes = x.reshape(b, -1, frame, d).transpose(1, 2).reshape(b * frame, -1, d)  # (b, n, d) -> (b * frame, t, d)
        moved: Tensor = self.along(tubes, steps, memory)
        return moved.reshape(b, frame, -1, d).transpose(1, 2).reshape(b, n, d)  # (b * frame, t, d) -> (b, n, d)


class TubeletEncoder(Encoder):
    """Encoder of clips into one latent per tubelet.

    Args:
        width: Width of the latents.
        patch: Frames, rows and columns of a tubelet.
        base: Width of the transformer.
        depth: Blocks of the transformer; with "axial", of each kind.
        heads: Attention heads per block.
        hidden: Hidden width of the perceptrons; four times the base if None.
        attention: "block" or "axial".
        window: Attention window in latent frames, including the token's own; None for all, which can't stream.
        causal: Whether tokens attend to no later frame.
        channels: Channels of the clip.
        run_length: With "block", threshold below which unchanged tubelets are dropped, see
            `run_length.changed_tokens`; None to keep all.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        *,
        width: int,
        patch: tuple[int, int, int],
        base: int = 768,
        depth: Annotated[int, "[0, 1000]"] = 12,
        heads: int = 12,
        hidden: int | None = None,
        attention: Attention = "block",
        window: int | None = None,
        causal: bool = True,
        channels: int = 3,
        run_length: Annotated[float | None, "(0, inf)", "null drops none"] = None,
    ) -> None:
        if run_length is not None and attention != "block":
            raise UserError("codec.encoder.run_length: only attention=block can drop tokens")
        hop = (patch[0], patch[1], patch[2])
        super().__init__(
            width=width, downsample=hop, channels=channels, causal=causal, causal_pad=hop[0] - 1 if causal else 0
        )
        self.patch = hop
        self.run_length = None if run_length is None else RunLength(base, run_length)
        self.embed = nn.Linear(channels * math.prod(self.patch), base)
        nn.init.zeros_(self.embed.bias)
        self.trunk = _Trunk(base, depth, heads, hidden, attention, window, causal)
        self.out = nn.Linear(base, width)
        nn.init.kaiming_normal_(self.out.weight, nonlinearity="linear")  # latents of unit variance

    @property
    def repeats(self) -> bool:
        """Whether unchanged tubelets are dropped."""
        return self.run_length is not None

    def forward(self, signal: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Return the latents `(b, n, width)` of clips `(b, c, t, h, w)`."""
        rows, columns = signal.shape[3] // self.patch[1], signal.shape[4] // self.patch[2]
        x = self.embed(to_tubelets(signal, self.patch))
        if self.run_length is not None:
            change = changed_tokens(signal, self.patch, self.run_length.threshold)
            some, order, there, standing = self.run_length(x, change, mask, rows * columns)
            latents: Tensor = self.out(self.trunk(some, there, rows, columns, None, True, order))
            return latents.gather(1, standing.unsqueeze(2).expand(-1, -1, latents.shape[2]))
        latents = self.out(self.trunk(x, mask, rows, columns, memory, True))
        return latents


class TubeletDecoder(Decoder):
    """Decoder of latents into clips, the mirror of `TubeletEncoder`, with the same arguments but `run_length`.

    Raises:
        UserError: Inconsistent sizes.
    """

    def __init__(
        self,
        *,
        width: int,
        patch: tuple[int, int, int],
        base: int = 768,
        depth: Annotated[int, "[0, 1000]"] = 12,
        heads: int = 12,
        hidden: int | None = None,
        attention: Attention = "block",
        window: int | None = None,
        causal: bool = True,
        channels: int = 3,
    ) -> None:
        hop = (patch[0], patch[1], patch[2])
        super().__init__(
            width=width, downsample=hop, channels=channels, causal=causal, causal_pad=hop[0] - 1 if causal else 0
        )
        self.patch = hop
        self.embed = nn.Linear(width, base)
        self.trunk = _Trunk(base, depth, heads, hidden, attention, window, causal)
        self.out = nn.Linear(base, channels * math.prod(self.patch))

    def forward(
        self, latents: Tensor, mask: Tensor | None, grid: list[int], memory: list[Tensor] | None = None
    ) -> Tensor:
        """Decode latents `(b, n, width)` into clips `(b, c, t, h, w)`."""
        steps, rows, columns = grid
        x = self.out(self.trunk(self.embed(latents), mask, rows, columns, memory, False))
        x = from_tubelets(x, self.patch, self.channels, rows, columns)
        return zero_invalid(x, at_rate(along_first(mask, steps, 3), self.patch[0], 3))
