"""Sounds that go through a bundle's streaming graphs as they come in; numpy and ONNX Runtime alone, as `runtime.py`.

A graph takes whole steps and a state. What comes in between, any number of samples or tokens, waits here until a step
is full.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from varitok import UserError

__all__ = ["DecodingStream", "EncodingStream", "run_stream"]

Array = npt.NDArray[Any]


def run_stream(graph: Any, chunk: Array, state: npt.NDArray[np.float32]) -> tuple[Array, npt.NDArray[np.float32]]:
    """Send a chunk and a state through a streaming graph; give what it makes and the next state."""
    first, second = (port.name for port in graph.get_inputs())
    made, after = graph.run(None, {first: chunk, second: state})
    return made, after


class _Stream:
    """What both directions share: what waits, and the state."""

    def __init__(self, graph: Any, check: Callable[[Any], Array], whole: int, batch: int) -> None:
        if batch < 1:
            raise UserError(f"batch={batch}: it should be at least 1")
        self._graph = graph
        self._check = check
        self._whole = whole
        self._batch = batch
        self._size = int(graph.get_inputs()[1].shape[1])
        self._reset()

    def _reset(self) -> None:
        self._waiting: Array | None = None
        self._state = np.zeros((self._batch, self._size), np.float32)

    def _next(self, given: Any, what: str) -> Array | None:
        """Take what came in; give the whole steps that are there, None where there are none."""
        values = self._check(given)
        if values.shape[0] != self._batch:
            raise UserError(f"{what}: this stream is of {self._batch} side by side, got {values.shape[0]}")
        if self._waiting is not None:
            if values.shape[1] != self._waiting.shape[1]:
                raise UserError(f"{what}: {self._waiting.shape[1]} rows before, {values.shape[1]} now")
            values = np.concatenate([self._waiting, values], axis=2)
        ready = values.shape[2] // self._whole * self._whole
        self._waiting = values[:, :, ready:]
        return self._run(values[:, :, :ready]) if ready else None

    def _rest(self) -> Array | None:
        """Give what the last, unfilled step makes, and start again."""
        waiting = self._waiting
        made = self._run(waiting) if waiting is not None and waiting.shape[2] else None
        self._reset()
        return made

    def _run(self, chunk: Array) -> Array:
        made, self._state = run_stream(self._graph, np.ascontiguousarray(chunk), self._state)
        return made


class EncodingStream(_Stream):
    """Sound into codes; `SoundBundle.encoding` makes one.

    Args:
        graph: The streaming encoder, an ONNX Runtime session.
        check: Brings a chunk to float32 `(b, c, t)`.
        whole: Samples that it takes at once.
        batch: Sounds side by side.
        books: How many are kept.
    """

    def __init__(self, graph: Any, check: Callable[[Any], Array], whole: int, batch: int, books: int) -> None:
        super().__init__(graph, check, whole, batch)
        self._books = books
        kind = np.int64 if "int" in graph.get_outputs()[0].type else np.float32
        self._none = np.zeros((batch, books, 0), kind)

    def __call__(self, wave: Any) -> Array:
        """Take the next chunk, of any number of samples; give the codes `(b, books, n)` that it completes.

        n may be 0.

        Raises:
            UserError: A shape, type or value that the codec doesn't take; what was there before is kept.
        """
        codes = self._next(wave, "wave")
        return self._none if codes is None else codes[:, : self._books]

    def flush(self) -> Array:
        """End the sound: give the codes of what is left, filled up with zeros. A new sound may begin then."""
        codes = self._rest()
        return self._none if codes is None else codes[:, : self._books]


class DecodingStream(_Stream):
    """Codes into sound; `SoundBundle.decoding` makes one.

    Args:
        graph: The streaming decoder, an ONNX Runtime session.
        check: Checks codes, and brings them to the graph's type.
        whole: Tokens that it takes at once.
        batch: Sounds side by side.
        channels: Of each.
    """

    def __init__(self, graph: Any, check: Callable[[Any], Array], whole: int, batch: int, channels: int) -> None:
        super().__init__(graph, check, whole, batch)
        self._none = np.zeros((batch, channels, 0), np.float32)

    def __call__(self, codes: Any) -> npt.NDArray[np.float32]:
        """Take the next codes, `(b, books, n)` of any n; give the sound `(b, c, t)` that they complete.

        All of a stream's codes have as many books. t may be 0.

        Raises:
            UserError: A shape, type or code that the codec doesn't have; what was there before is kept.
        """
        sound = self._next(codes, "codes")
        return self._none if sound is None else sound

    def flush(self) -> npt.NDArray[np.float32]:
        """End the codes: give the sound of what is left. A new sound may begin then."""
        sound = self._rest()
        return self._none if sound is None else sound
