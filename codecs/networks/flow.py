"""Rectified flow: a decoder that integrates a learned velocity from noise to signals (arXiv 2209.03003, section 2).

    training    x_t = (1 - t) noise + t signal,   loss = mean (v(x_t, t, latents) - (signal - noise))^2
    decoding    x_0 = noise,   x_(t + d) = x_t + d v(x_t, t, latents)   for t = 0, d, 2 d, ..., 1 - d

The velocity v is a network's, its `Denoiser`; signals are pixels, or whatever that takes.
"""

from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..padding import pad_to_grid
from .contract import Denoiser, GenerativeDecoder

__all__ = ["FlowDecoder", "Guidance"]


class Guidance(nn.Module):
    """Adaptive projected guidance (APG, arXiv 2410.02416, section 4), and its special case without a projection.

    With velocities p with and q without latents, and m of the last call:

        m <- p - q + momentum m,   u = m min(1, threshold / |m|),   v = p + (scale - 1) (u_across + parallel u_along)

    u_along is the part of u along p, u_across the rest. Classifier-free guidance (arXiv 2207.12598) has `momentum=0`,
    `parallel=1` and `threshold=null`; at large scales it oversaturates.

    Args:
        scale: Factor of the difference; 1: p alone.
        momentum: Share of the last call's m; negative values steer away from it.
        parallel: Share of u_along.
        threshold: Largest norm of a signal's u; None: any.
    """

    def __init__(
        self,
        scale: Annotated[float, "[1, inf)", "1 doesn't guide"] = 7.5,
        momentum: Annotated[float, "(-1, 1)", "0 for none"] = -0.5,
        parallel: float = 0.0,
        threshold: Annotated[float, "(0, inf)"] | None = 2.5,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.momentum = momentum
        self.parallel = parallel
        self.threshold = float("inf") if threshold is None else threshold

    def forward(self, given: Tensor, free: Tensor, momentum: Tensor) -> tuple[Tensor, Tensor]:
        """Return the guided velocity and the next m; all are `(b, c, *grid)`.

        Args:
            given: Velocity p, with latents.
            free: Velocity q, without.
            momentum: m of the last call; zeros at first.
        """
        momentum = given - free + self.momentum * momentum
        axes = list(range(1, given.ndim))
        norm = momentum.square().sum(axes, keepdim=True).sqrt()
        push = momentum * (self.threshold / norm.clamp(min=1e-12)).clamp(max=1.0)
        share = (push * given).sum(axes, keepdim=True) / given.square().sum(axes, keepdim=True).clamp(min=1e-12)
        return given + (self.scale - 1) * (push - (1 - self.parallel) * share * given), momentum


class FlowDecoder(GenerativeDecoder):
    """A rectified flow around any denoiser: of pixels, and of whatever has its contract.

    Times of training are logit-normal: sigmoid(time_mean + time_deviation * normal) (arXiv 2403.03206, section 3.1).
    For guidance, the latents of some training samples are replaced by a learned vector.

    Args:
        network: Predicts the velocity, or the signal.
        predicts: What the network predicts. From a signal x the velocity is (x - x_t) / (1 - t): a narrow network
            needn't carry the noise through (arXiv 2511.13720).
        steps: Steps of the sampler.
        solver: "euler"; or "heun", which evaluates the network twice a step, and ends with one of Euler's.
        guidance: Guidance of the sampler; None: none, half of the computation.
        null_share: Share of training samples whose latents are replaced.
        time_mean: Larger: more training samples with little noise.
        time_deviation: Spread of the times.
        seed: See `GenerativeDecoder`.
    """

    def __init__(
        self,
        network: Denoiser,
        predicts: Literal["velocity", "signal"] = "velocity",
        steps: int = 25,
        solver: Literal["euler", "heun"] = "euler",
        guidance: Guidance | None = None,
        null_share: Annotated[float, "[0, 1]"] = 0.1,
        time_mean: Annotated[float, "(-inf, inf)"] = 0.0,
        time_deviation: Annotated[float, "(0, inf)"] = 1.0,
        seed: Annotated[int, "[0, 4294967295]"] = 0,
    ) -> None:
        super().__init__(
            width=network.width,
            downsample=network.downsample,
            channels=network.channels,
            causal=network.causal,
            causal_pad=network.causal_pad,
            tokens=network.tokens,
            later_tokens=network.later_tokens,
            sides=(network.rows, network.columns),
            steps=steps,
            seed=seed,
        )
        self.network = network
        self.predicts = predicts
        self.solver = solver
        self.guidance = guidance
        self.null_share = null_share
        self.time_mean = time_mean
        self.time_deviation = time_deviation
        self.null = nn.Parameter(torch.randn(network.width) * 0.02)

    def describe(self) -> dict[str, Any]:
        """Return steps, seed, solver and the scale of the guidance."""
        return super().describe() | {"solver": self.solver, "guidance": self.guidance and self.guidance.scale}

    def loss(self, latents: Tensor, mask: Tensor | None, signal: Tensor) -> tuple[Tensor, Tensor]:
        """Return the estimate `x_t + (1 - t) v` and the velocity's squared error; see `GenerativeDecoder.loss`."""
        signal = pad_to_grid(signal, list(self.downsample), self.causal_pad)
        b = len(signal)
        null = torch.rand(b, device=signal.device) < self.null_share
        latents = torch.where(null[:, None, None], self.null.to(latents.dtype), latents)
        time = torch.sigmoid(self.time_mean + self.time_deviation * torch.randn(b, device=signal.device))
        noise, shown = torch.randn_like(signal), _per_signal(time, signal)
        noised = torch.lerp(noise, signal, shown)
        velocity = self.velocity(noised, time, latents, mask).float()
        return noised + (1 - shown) * velocity, (velocity - (signal - noise)).square().mean()

    def velocity(self, noised: Tensor, time: Tensor, latents: Tensor, mask: Tensor | None) -> Tensor:
        """Return the velocity `(b, c, *grid)`; arguments as `Denoiser.forward`."""
        found: Tensor = self.network(noised, time, latents, mask)
        if self.predicts == "velocity":
            return found
        return (found - noised) / (1 - _per_signal(time, noised)).clamp(min=0.05)  # as in arXiv 2511.13720

    def guided(
        self, noised: Tensor, time: Tensor, latents: Tensor, mask: Tensor | None, momentum: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the guided velocity at one time `(1,)`, and the guidance's next m."""
        if self.guidance is None:
            return self.velocity(noised, time.expand(noised.shape[0]), latents, mask), momentum
        both = torch.cat([latents, self.null.to(latents.dtype).expand_as(latents)])
        masks: Tensor | None = None
        if mask is not None:
            masks = torch.cat([mask, mask])
        b = noised.shape[0]
        velocities = self.velocity(torch.cat([noised, noised]), time.expand(2 * b), both, masks)
        found: tuple[Tensor, Tensor] = self.guidance(velocities[:b], velocities[b:], momentum)
        return found

    def step(
        self, latents: Tensor, mask: Tensor | None, sample: Tensor, state: Tensor, number: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Do one step of the solver; the state is the guidance's m. See `GenerativeDecoder.step`."""
        time, length = number.reshape(1).to(sample.dtype) / self.steps, 1 / self.steps
        velocity, state = self.guided(sample, time, latents, mask, state)
        ahead = sample + length * velocity
        if self.solver == "euler":
            return ahead, state
        end, state = self.guided(ahead, time + length, latents, mask, state)
        mean = sample + length * (velocity + end) / 2
        return torch.where(number == self.steps - 1, ahead, mean), state

    def forward(
        self,
        latents: Tensor,
        mask: Tensor | None,
        grid: list[int],
        memory: list[Tensor] | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Sample signals in `steps` steps; see `GenerativeDecoder.forward`."""
        if noise is None:
            noise = self.draw(grid, latents)
        size = [latents.shape[0]] + list(noise.shape[1:])  # noqa: RUF005 (TorchScript)
        sample = noise.to(latents.dtype).expand(size)
        state = torch.zeros_like(sample)
        for number in torch.arange(self.steps, device=latents.device):
            sample, state = self.step(latents, mask, sample, state, number)
        return sample


def _per_signal(time: Tensor, signal: Tensor) -> Tensor:
    """Return times `(b,)` with as many axes as signals `(b, c, *grid)`."""
    return time.reshape([-1] + [1] * (signal.ndim - 1))
