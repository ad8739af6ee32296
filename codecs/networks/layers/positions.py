"""Fixed embeddings of positions on a grid."""

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["grid_waves"]


def grid_waves(width: int, rows: int, columns: int, device: torch.device | None = None) -> Tensor:
    """Return sinusoidal 2-D position embeddings, `(1, width, rows, columns)` (arXiv 2205.01580, section 2).

    Half of the channels are sines and cosines of the row, half of the column, with wavelengths up to 100 x 2 pi;
    channels beyond a multiple of 4 are 0.
    """
    quarter = width // 4
    rates = torch.pow(100, torch.arange(quarter, device=device) / quarter)
    down, across = _waves(rows, rates)[:, :, None], _waves(columns, rates)[:, None, :]
    grid = torch.cat([down.expand(-1, -1, columns), across.expand(-1, rows, -1)])
    return functional.pad(grid, [0, 0, 0, 0, 0, width - 4 * quarter])[None]


def _waves(side: int, rates: Tensor) -> Tensor:
    """Return the sines and cosines of positions along an axis, `(2 * rates, side)`."""
    angles = torch.arange(side, device=rates.device)[:, None] / rates
    return torch.cat([angles.sin(), angles.cos()], dim=1).T
