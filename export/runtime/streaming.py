"""Signals that go through a bundle's streaming graphs as they come in; numpy and ONNX Runtime alone.

A graph takes whole steps and a state. What comes in between, any number of samples, frames or tokens, waits here until
a step is full.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

__all__ = ["DecodingStream", "EncodingStream", "StreamForm", "run_stream", "stream_form"]

Array = npt.NDArray[Any]


class StreamForm(NamedTuple):
    """What a stream must know of its codec.

    Attributes:
        whole: Steps of the first axis that a graph takes at once: samples or frames, or those of codes.
        state: Four numbers; of frames of r x c latents a state has state[0] + state[1] r + state[2] c + state[3] r c.
        downsample: Pixels of each other axis per latent; none for audio.
        causal_pad: Copies of the first frame that go before it, and come back before it.
        tokens: Tokens of each block of frames; 0 for tokens on a grid.
        frame: Height and width of frames, if they have one size.
    """

    whole: int
    state: Sequence[int]
    downsample: tuple[int, ...] = ()
    causal_pad: int = 0
    tokens: int = 0
    frame: tuple[int, ...] = ()

    def state_size(self, grid: Sequence[int]) -> int:
        """Count the numbers of a sample's state, given the rows and columns of its latents."""
        rows, columns = (*grid, 1, 1)[:2]
        return self.state[0] + self.state[1] * rows + self.state[2] * columns + self.state[3] * rows * columns


def stream_form(config: Mapping[str, Any], side: str) -> StreamForm:
    """Read from a bundle's config.json what a stream of its `encoder` or `decoder` must know."""
    about = config["streaming"]
    size = about[f"{side}_state_size"]
    return StreamForm(
        int(about["chunk_samples" if side == "encoder" else "chunk_tokens"]),
        (size, 0, 0, 0) if isinstance(size, int) else tuple(size),
        tuple(config.get("hop", ())[1:]),
        int(config.get("lead", 0)),
        int(config["tokens"]),
        tuple(config.get("frame_size", ())),
    )


def run_stream(graph: Any, chunk: Array, state: npt.NDArray[np.float32]) -> tuple[Array, npt.NDArray[np.float32]]:
    """Send a chunk and a state through a streaming graph; give what it makes and the next state."""
    first, second = (port.name for port in graph.get_inputs())
    made, after = graph.run(None, {first: chunk, second: state})
    return made, after


class _Stream:
    """What both directions share: what waits, and the state."""

    def __init__(self, graph: Any, check: Callable[[Any], Array], form: StreamForm, batch: int) -> None:
        if batch < 1:
            raise UserError(f"batch={batch}: it should be at least 1")
        self._graph = graph
        self._check = check
        self._form = form
        self._batch = batch
        self._seen: tuple[int, ...] = tuple(0 for _ in form.downsample)  # rows and columns of latents
        self._reset()

    def _reset(self) -> None:
        self._waiting: Array | None = None
        self._state: npt.NDArray[np.float32] | None = None

    def _grid(self, values: Array) -> tuple[int, ...]:
        """Return the rows and columns of the input's latents."""
        return values.shape[3:]

    def _pad_start(self, values: Array) -> Array:
        """Put before the first values what goes before them."""
        return values

    def _next(self, given: Any, what: str) -> Array | None:
        """Add an input; return the output of its complete steps, None if there are none."""
        values = self._check(given)
        if values.shape[0] != self._batch:
            raise UserError(f"{what}: this stream is of {self._batch} side by side, got {values.shape[0]}")
        self._seen = self._grid(values)
        if self._waiting is not None:
            if values.shape[1] != self._waiting.shape[1]:
                raise UserError(f"{what}: {self._waiting.shape[1]} rows before, {values.shape[1]} now")
            if self._waiting.shape[2]:
                if values.shape[3:] != self._waiting.shape[3:]:
                    raise UserError(f"{what}: frames of {self._waiting.shape[3:]} before, {values.shape[3:]} now")
                values = np.concatenate([self._waiting, values], axis=2)
        elif values.shape[2]:
            values = self._pad_start(values)
        ready = values.shape[2] // self._form.whole * self._form.whole
        if self._waiting is not None or values.shape[2]:
            self._waiting = values[:, :, ready:]
        return self._run(values[:, :, :ready]) if ready else None

    def _rest(self) -> Array | None:
        """Return the output of the last, incomplete step, and reset."""
        waiting = self._waiting
        made = self._run(waiting) if waiting is not None and waiting.shape[2] else None
        self._reset()
        return made

    def _run(self, chunk: Array) -> Array:
        state = self._state
        if state is None:
            state = np.zeros((self._batch, self._form.state_size(self._grid(chunk))), np.float32)
        made, self._state = run_stream(self._graph, np.ascontiguousarray(chunk), state)
        return made


class EncodingStream(_Stream):
    """A signal into codes; `AudioBundle.encoding` and `VideoBundle.encoding` make one.

    Args:
        graph: The streaming encoder, an ONNX Runtime session.
        check: Brings a chunk to float32 `(b, c, t, ...)`.
        form: What it must know of its codec.
        batch: Signals side by side.
        num_codebooks: How many are kept.
    """

    def __init__(
        self, graph: Any, check: Callable[[Any], Array], form: StreamForm, batch: int, num_codebooks: int
    ) -> None:
        super().__init__(graph, check, form, batch)
        self._codebooks = num_codebooks
        self._kind = np.int64 if "int" in graph.get_outputs()[0].type else np.float32

    def _grid(self, values: Array) -> tuple[int, ...]:
        if self._form.tokens:
            return (self._form.tokens,)
        return tuple(-(-side // step) for side, step in zip(values.shape[3:], self._form.downsample, strict=True))

    def _pad_start(self, values: Array) -> Array:
        return np.concatenate([values[:, :, :1]] * self._form.causal_pad + [values], axis=2)

    def __call__(self, signal: Any) -> Array:
        """Take the next chunk, of any size, and return the codes `(b, codebooks, n, ...)` that it completes.

        n may be 0.

        Raises:
            UserError: A shape, type or value that the codec doesn't take; earlier input is kept.
        """
        return self._keep(self._next(signal, "frames" if self._form.downsample else "wave"))

    def flush(self) -> Array:
        """End the signal: return the codes of the padded rest. A new signal may begin then."""
        return self._keep(self._rest())

    def _keep(self, codes: Array | None) -> Array:
        """Keep the first codebooks; of no codes too."""
        return (
            np.zeros((self._batch, self._codebooks, 0, *self._seen), self._kind)
            if codes is None
            else codes[:, : self._codebooks]
        )


class DecodingStream(_Stream):
    """Codes into a signal; `AudioBundle.decoding` and `VideoBundle.decoding` make one.

    Args:
        graph: The streaming decoder, an ONNX Runtime session.
        check: Checks codes, and brings them to the graph's type.
        form: What it must know of its codec.
        batch: Signals side by side.
        channels: Channels of each signal.
    """

    def __init__(self, graph: Any, check: Callable[[Any], Array], form: StreamForm, batch: int, channels: int) -> None:
        super().__init__(graph, check, form, batch)
        self._channels = channels

    def __call__(self, codes: Any) -> npt.NDArray[np.float32]:
        """Take the next codes, `(b, codebooks, n, ...)` of any n; give the signal `(b, c, t, ...)` that they complete.

        All of a stream's codes have as many codebooks. t may be 0.

        Raises:
            UserError: A shape, type or code that the codec doesn't have; earlier input is kept.
        """
        return self._finish(self._next(codes, "codes"))

    def flush(self) -> npt.NDArray[np.float32]:
        """End the codes: return the signal of the rest. A new one may begin then."""
        return self._finish(self._rest())

    def _finish(self, signal: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        """Return the output; if there is none, a signal of length 0."""
        sides = self._form.frame or (
            count * step for count, step in zip(self._seen, self._form.downsample, strict=True)
        )
        return np.zeros((self._batch, self._channels, 0, *sides), np.float32) if signal is None else signal

    def _run(self, chunk: Array) -> Array:
        causal_pad = self._form.causal_pad if self._state is None else 0
        return super()._run(chunk)[:, :, causal_pad:]
