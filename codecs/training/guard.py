"""Refusal of updates whose loss, latents or gradient are not finite, or whose gradient norm spikes."""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ..distributed import mean_over_ranks
from .readout import Readout

__all__ = ["Guard", "undone_unless"]

WINDOW = 100  # gradient norms in the running median
LEAST = 20  # gradient norms needed before a spike can be detected


class Guard:
    """The decision whether an update is applied, the same on all processes.

    A refused update leaves parameters, EMA, codebooks and optimizer states unchanged. It still counts: data and
    schedules continue. An update is refused if latents, loss or gradient are not finite on any process. One Adam step
    along a NaN gradient, or one NaN latent in an EMA codebook, could not be undone. With `spike` it is also refused if

        ||gradient|| > spike median(||gradient|| of the last 100 accepted updates)

    `judge` decides on the device. `read` waits for the verdict, at once or an update later; `spike` needs it at once.

    Args:
        patience: Refused updates in a row after which the run rolls back or ends.
        spike: Largest gradient norm, as a multiple of the median; null: refuse non-finite updates only.
        roll_back: Restore the last checkpoint's weights after `patience` refusals, and continue with new data. The run
            ends if that recurs within `patience` accepted updates.

    Attributes:
        refused: Number of refused updates in the whole run.
        why: Reason why the last update that was read was refused; empty if it was accepted.
        mine: Whether this process's own latents and loss were finite in that update.
    """

    def __init__(
        self,
        patience: int = 10,
        spike: Annotated[float | None, "(1, inf)", "null refuses none"] = None,
        roll_back: bool = False,
    ) -> None:
        self.patience = patience
        self.spike = spike
        self.roll_back = roll_back
        self.refused = 0
        self.why = ""
        self.mine = True
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._in_a_row = 0
        self._taken = patience  # accepted updates since the last rollback
        self._sound: Tensor | None = None
        self._verdict: Readout | None = None

    def check(self, values: Tensor) -> None:
        """Check whether latents or losses of this update are finite."""
        finite = values.detach().isfinite().all()
        self._sound = finite if self._sound is None else self._sound & finite

    def clean(self, bottleneck: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Check a bottleneck's input in training (a forward pre-hook), and replace non-finite latents by 0."""
        latents, *rest = given
        if not (bottleneck.training and torch.is_grad_enabled()):
            return given
        self.check(latents)
        return torch.where(latents.isfinite(), latents, 0), *rest

    @property
    def undecided(self) -> bool:
        """Whether the last update was judged but not read."""
        return self._verdict is not None

    def judge(self, norm: Tensor) -> Tensor:
        """Return whether to apply the update, as far as it is known on the device: bool `()`.

        Every process must call it. The norm is that of the averaged gradient; finiteness of latents and losses is this
        process's own.
        """
        seen = torch.ones_like(norm) if self._sound is None else self._sound.to(norm)
        self._sound = None
        everywhere = mean_over_ranks(seen)
        self._verdict = Readout(torch.stack([seen, everywhere, norm.detach()]))
        return (everywhere == 1) & norm.detach().isfinite()

    def accepts(self, norm: Tensor) -> bool:
        """Judge the update and return whether to apply it, which waits for the device."""
        self.judge(norm)
        return self.read()

    def read(self) -> bool:
        """Return whether the update that was judged last is accepted, and count it."""
        assert self._verdict is not None
        mine, everywhere, length = self._verdict.read()
        self._verdict = None
        self.mine = mine == 1
        self.why = self._find_fault(everywhere == 1, length)
        if self.why:
            self.refused += 1
            self._in_a_row += 1
            return False
        self._norms.append(length)
        self._in_a_row = 0
        self._taken += 1
        return True

    def _find_fault(self, sound: bool, length: float) -> str:
        if not sound:
            return "latents or loss are not finite"
        if not math.isfinite(length):
            return "the gradient is not finite"
        if self.spike is not None and len(self._norms) >= LEAST:
            usual = median(self._norms)
            if length > self.spike * usual:
                return f"the gradient's norm of {length:.3g} is {length / usual:.0f} times the usual"
        return ""

    @property
    def exhausted(self) -> bool:
        """Whether `patience` updates in a row were refused."""
        return self._in_a_row >= self.patience

    def goes_back(self) -> bool:
        """Return whether the run may roll back to its last checkpoint; if so, reset the count."""
        if not self.roll_back or self._taken < self.patience:
            return False
        self._in_a_row = self._taken = 0
        return True

    def state(self) -> dict[str, Any]:
        """Return the counters and gradient norms, the same on all processes."""
        return {"refused": self.refused, "norms": list(self._norms), "counts": [self._in_a_row, self._taken]}

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Restore a `state`."""
        self.refused = state["refused"]
        self._norms.extend(state["norms"])
        self._in_a_row, self._taken = state["counts"]


@contextmanager
def undone_unless(taken: Tensor, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Restore tensors that the context changes in place, unless `taken`, bool `()` on their device.

    The host doesn't read `taken`. Tensors of a type are copied as one: a codec may have hundreds of small ones.
    """
    groups: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.dtype, []).append(tensor)
    before = {dtype: torch.cat([one.flatten() for one in group]) for dtype, group in groups.items()}
    yield
    for dtype, group in groups.items():
        kept = torch.where(taken, torch.cat([one.flatten() for one in group]), before[dtype])
        parts = torch.split(kept, [one.numel() for one in group])
        torch._foreach_copy_(group, [part.view_as(one) for part, one in zip(parts, group, strict=True)])
