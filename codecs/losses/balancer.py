"""Loss balancer: weights terms by the norm of their gradient at the reconstruction."""

from collections.abc import Iterable, Mapping
from typing import Annotated

import torch
from torch import Tensor, nn

from ..distributed import mean_over_ranks

__all__ = ["Balancer"]


class Balancer(nn.Module):
    """EnCodec's balancer (arXiv 2210.13438, section 3.4): a term's weight is its share of the gradient.

        g = sum_i total * w_i / sum_j w_j * g_i / EMA(|g_i|),   g_i = d loss_i / d reconstruction

    So a term's scale has no effect, and no term dominates. It costs one backward pass per term, from the loss to the
    reconstruction, instead of one for the sum. Penalties of the bottleneck are not balanced.

    |g_i| is the norm of a single sample's gradient, averaged over the batch and all processes. Two processes thus
    compute the same as one with the same global batch. (The published code uses the gradient of the batch mean, so
    its `total_norm` is `total` divided by the batch size of a process.)

    Args:
        total: Norm of a sample's balanced gradient if the gradients of all terms are parallel.
        decay: Decay of the EMA of the norms; checkpoints include it.
    """

    def __init__(self, total: Annotated[float, "(0, inf)"] = 1.0, decay: Annotated[float, "[0, 1)"] = 0.999) -> None:
        super().__init__()
        self.total = total
        self.decay = decay

    def track(self, names: Iterable[str]) -> None:
        """Create the EMA buffers of the named terms; a term's EMA starts at its first norm."""
        for name in names:
            self.register_buffer(f"norm_{name}", torch.zeros(()))
            self.register_buffer(f"share_{name}", torch.zeros(()))

    def forward(self, values: Mapping[str, Tensor], weights: Mapping[str, float], signal: Tensor) -> Tensor:
        """Balance the losses `values`, scalars computed from the reconstruction `signal` `(b, ...)`.

        Returns:
            A scalar with the value of the weighted sum and the balanced gradient at the signal. Without gradient, as
            in evaluation, the weighted sum; the EMA isn't updated.
        """
        weighted = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        if not weighted.requires_grad:
            return weighted
        # The graph is retained, as terms may share a forward pass of the discriminator.
        gradients = [torch.autograd.grad(value, signal, retain_graph=True)[0] for value in values.values()]
        norms = self._follow(list(values), gradients)
        whole = sum(weights[name] for name in values)
        balanced = torch.zeros_like(signal)
        for name, gradient, norm in zip(values, gradients, norms, strict=True):
            balanced = balanced + (weights[name] / whole * self.total / norm.clamp(min=1e-12)) * gradient
        # Its gradient at the signal is `balanced`, which has the factor 1 / b of each term's mean over the batch.
        work = (signal * balanced.to(signal.dtype)).sum()
        return weighted.detach() + work - work.detach()

    def _follow(self, names: list[str], gradients: list[Tensor]) -> list[Tensor]:
        """Update the EMA with this batch's norms and return it, corrected for its start at 0."""
        own = [gradient.float().flatten(1).norm(dim=1).mean() * len(gradient) for gradient in gradients]
        averages = []
        for name, norm in zip(names, mean_over_ranks(torch.stack(own).detach()), strict=True):
            average, share = self.get_buffer(f"norm_{name}"), self.get_buffer(f"share_{name}")
            weight = torch.where(norm.isfinite(), 1 - self.decay, 0.0)  # skips NaN and infinity
            average.lerp_(norm.nan_to_num(), weight)
            share.lerp_(torch.ones_like(share), weight)
            averages.append(average / share)
        return averages
