"""Values of a device tensor on the host, without waiting for the device."""

import torch
from torch import Tensor

__all__ = ["Readout"]


class Readout:
    """A copy of a tensor to the host that begins at once and is read later.

    `tensor.tolist()` waits until the GPU has done all that was launched, and the GPU then idles until the next launch.
    The copy of a `Readout` takes its turn among the kernels. Reading it an update later waits for older work only.

    Args:
        values: Tensor on any device; a tensor on the CPU isn't copied, and must not change until it is read.
    """

    def __init__(self, values: Tensor) -> None:
        self._host = values.detach().to("cpu", non_blocking=values.is_cuda)  # to pinned memory
        self._copied: torch.cuda.Event | None = None
        if values.is_cuda:
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(torch.cuda.current_stream(values.device))

    def read(self) -> list[float]:
        """Return the values of a vector."""
        if self._copied is not None:
            self._copied.synchronize()
        values: list[float] = self._host.tolist()
        return values
