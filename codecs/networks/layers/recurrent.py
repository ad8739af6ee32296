"""LSTMs over sequences `(b, n, d)`: the `inner` of convolutional codecs (EnCodec)."""

from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from .convolution import recall

__all__ = ["Recurrent"]


class _LSTM(nn.Module):
    """Single LSTM layer, for TorchScript and streaming.

    ONNX export emits the LSTM operator, since torch.export would fix the sequence length.

    Args:
        inputs: Input size.
        outputs: Hidden size.

    Attributes:
        slot: Index in the memory, which holds the hidden and the cell state.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.slot = 0
        self.lstm = nn.LSTM(inputs, outputs, batch_first=True)

    def forward(self, x: Tensor, memory: list[Tensor] | None = None) -> Tensor:
        """Transform `(b, n, inputs)` to `(b, n, outputs)`."""
        start = x.new_zeros([x.shape[0], 2, self.lstm.hidden_size])
        if memory is not None:
            start = recall(memory, self.slot, x, list(start.shape))
        hidden, cell = start[:, 0].unsqueeze(0), start[:, 1].unsqueeze(0)
        if torch.jit.is_scripting():  # type: ignore[attr-defined]
            y, (hidden, cell) = self.lstm(x, (hidden.contiguous(), cell.contiguous()))
        else:
            y, hidden, cell = self._eager(x, hidden, cell)
        if memory is not None:
            memory[self.slot] = torch.stack([hidden[0], cell[0]], dim=1)
        return y  # type: ignore[no-any-return]

    @torch.jit.unused
    def _eager(self, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lstm = self.lstm
        if not torch.onnx.is_in_onnx_export():
            y, (hidden, cell) = lstm(x, (hidden.contiguous(), cell.contiguous()))
            return y, hidden, cell

        def gates(name: str) -> Tensor:
            """Reorder torch's gates (input, forget, cell, output) to ONNX's (input, output, forget, cell)."""
            i, f, c, o = lstm.get_parameter(name).chunk(4)
            return torch.cat([i, o, f, c])

        weights = [gates("weight_ih_l0")[None], gates("weight_hh_l0")[None]]
        bias = torch.cat([gates("bias_ih_l0"), gates("bias_hh_l0")])[None]
        last = [1, x.shape[0], lstm.hidden_size]
        y, hidden, cell = torch.onnx.ops.symbolic_multi_out(
            "LSTM",
            [x.transpose(0, 1), *weights, bias, None, hidden, cell],
            {"hidden_size": lstm.hidden_size},
            dtypes=[x.dtype] * 3,
            shapes=[[x.shape[1], 1, x.shape[0], lstm.hidden_size], last, last],
            version=14,
        )
        return y.squeeze(1).transpose(0, 1), hidden, cell  # y: (n, 1, b, outputs) -> (b, n, outputs)


class Recurrent(nn.Module):
    """LSTM with a residual connection around all layers (EnCodec, arXiv 2210.13438, section 3.1: two layers).

    Args:
        width: Width of the tokens.
        depth: Number of layers.
        bidirectional: Use bidirectional layers of half the width per direction (SpeechTokenizer's encoder has the full
            width); each sample's backward direction starts at its last valid step.
    """

    def __init__(self, width: int, depth: Annotated[int, "[0, 1000]"] = 2, bidirectional: bool = False) -> None:
        super().__init__()
        if bidirectional and width % 2:
            raise UserError(f"recurrent: width={width} should be even if bidirectional")
        self.bidirectional = bidirectional
        self.obstacle = "a recurrent layer is bidirectional" if bidirectional else ""
        ways = 2 if bidirectional else 1
        self.onward = nn.ModuleList(_LSTM(width, width // ways) for _ in range(depth))
        self.returning = nn.ModuleList(_LSTM(width, width // ways) for _ in range(depth if bidirectional else 0))

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: list[Tensor] | None = None) -> Tensor:
        """Transform tokens `(b, n, width)`; `mask` is bool `(b, n)`, True up to each sample's length."""
        y = x
        if not self.bidirectional:
            for layer in self.onward:
                y = layer(y, memory)
            return x + y
        # Reverse each sample's valid steps, so that the backward direction starts at its own end.
        positions = torch.arange(x.shape[1], device=x.device)[None].expand(x.shape[0], -1)
        lengths = positions[:, :1] + x.shape[1] if mask is None else mask.sum(1, keepdim=True)
        turned = torch.where(positions < lengths, lengths - 1 - positions, positions).unsqueeze(2)
        for layer, back in zip(self.onward, self.returning):  # noqa: B905 (TorchScript knows no strict)
            reverse = back(y.gather(1, turned.expand(-1, -1, y.shape[2])))
            y = torch.cat([layer(y), reverse.gather(1, turned.expand(-1, -1, reverse.shape[2]))], dim=2)
        return x + y
