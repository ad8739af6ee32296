"""Terms weighed by what they do to the reconstruction, not by their size."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ..distributed import mean_over_ranks

__all__ = ["Balancer"]


class Balancer(nn.Module):
    """EnCodec's balancer (arXiv 2210.13438, section 3.4): a term's weight is its share of the gradient.

    Each term's gradient at the reconstruction is divided by a moving average of its norm and multiplied by the term's
    share of all weights; the sum goes back through the codec. A term's scale then doesn't matter, and none drowns the
    others. It costs a backward pass through each term instead of one through their sum. Penalties of the bottleneck
    are not balanced.

    The norm is one sample's own, before the mean over the batch, and averaged over batch and processes: so two
    processes do what one does at the same global batch. (In the published code it is that of the batch's mean, whose
    `total_norm` is ours over the batch of one process.)

    Args:
        total: Norm that a sample's summed gradient would have if its terms agreed.
        decay: Decay of the norms' moving averages, which are buffers and survive a resume.
    """

    def __init__(self, total: float = 1.0, decay: float = 0.999) -> None:
        super().__init__()
        self.total = total
        self.decay = decay

    def follow(self, names: Iterable[str]) -> None:
        """Create the buffers of the named terms; a term's average begins with its first value."""
        for name in names:
            self.register_buffer(f"norm_{name}", torch.zeros(()))
            self.register_buffer(f"share_{name}", torch.zeros(()))

    def forward(self, values: Mapping[str, Tensor], weights: Mapping[str, float], signal: Tensor) -> Tensor:
        """Balance the terms `values`, scalars made from the reconstruction `signal` `(b, ...)`.

        Returns:
            A scalar with the value of the weighted sum, whose gradient at the signal is the balanced one. Without
            gradient, as in evaluation, just that sum, and the averages stay.
        """
        weighted = torch.stack([weights[name] * value for name, value in values.items()]).sum()
        if not weighted.requires_grad:
            return weighted
        # Terms may share a forward pass, the discriminator's.
        gradients = [torch.autograd.grad(value, signal, retain_graph=True)[0] for value in values.values()]
        norms = self._follow(list(values), gradients)
        whole = sum(weights[name] for name in values)
        balanced = torch.zeros_like(signal)
        for name, gradient, norm in zip(values, gradients, norms, strict=True):
            balanced = balanced + (weights[name] / whole * self.total / norm.clamp(min=1e-12)) * gradient
        # A mean over the batch, as every term is.
        work = (signal * balanced.to(signal.dtype)).sum()
        return weighted.detach() + work - work.detach()

    def _follow(self, names: list[str], gradients: list[Tensor]) -> list[Tensor]:
        """Add this batch's norms to the averages and give these, free of what they began with."""
        own = [gradient.float().flatten(1).norm(dim=1).mean() * len(gradient) for gradient in gradients]
        averages = []
        for name, norm in zip(names, mean_over_ranks(torch.stack(own).detach()), strict=True):
            average, share = self.get_buffer(f"norm_{name}"), self.get_buffer(f"share_{name}")
            weight = torch.where(norm.isfinite(), 1 - self.decay, 0.0)  # of a norm that isn't nothing is left
            average.lerp_(norm.nan_to_num(), weight)
            share.lerp_(torch.ones_like(share), weight)
            averages.append(average / share)
        return averages
