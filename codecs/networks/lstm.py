"""LSTM layer for TorchScript, for ONNX with a dynamic length, and for streaming."""

import torch
from torch import Tensor, nn

from .convolution import recall

__all__ = ["LSTM"]


class LSTM(nn.Module):
    """Single LSTM layer. ONNX export emits the LSTM operator, since torch.export would fix the sequence length.

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
