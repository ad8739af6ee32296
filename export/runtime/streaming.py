"""Encode and decode streams with a bundle's streaming graphs, with NumPy and ONNX Runtime.

A graph maps whole steps and a state to its output and the next state. Chunks may have any number of samples, frames or
tokens: an incomplete step is buffered until the next chunk.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from varitok import UserError

__all__ = ["DecodingStream", "EncodingStream", "StreamForm", "run_stream", "stream_form"]

Array = npt.NDArray[Any]


class StreamForm(NamedTuple):
    """Chunk and state sizes of a streaming encoder or decoder.

    Attributes:
        whole: The graph's input length is a multiple of this: samples, frames or code steps.
        state: Four coefficients; for r x c latents per frame the state has size s0 + s1 r + s2 c + s3 r c.
        downsample: Downsampling factors of height and width; empty for audio.
        causal_pad: Copies of the first frame that the encoder prepends and the decoder's output begins with.
        tokens: Tokens of each block of frames; 0 for tokens on a grid.
        frame: Height and width of frames, if the codec has one size.
    """

    whole: int
    state: Sequence[int]
    downsample: tuple[int, ...] = ()
    causal_pad: int = 0
    tokens: int = 0
    frame: tuple[int, ...] = ()

    def state_size(self, grid: Sequence[int]) -> int:
        """Return the state size of a sample, given its latents' height and width."""
        rows, columns = (*grid, 1, 1)[:2]
        return self.state[0] + self.state[1] * rows + self.state[2] * columns + self.state[3] * rows * columns


def stream_form(config: Mapping[str, Any], side: str) -> StreamForm:
    """Build the form of a bundle's streaming `encoder` or `decoder` from its config.json."""
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
    """Run a streaming graph on a chunk and a state; return its output and the next state."""
    first, second = (port.name for port in graph.get_inputs())
    made, after = graph.run(None, {first: chunk, second: state})
    return made, after


class _Stream:
    """Base class of both directions: buffers incomplete steps, and carries the graph's state."""

    def __init__(self, graph: Any, check: Callable[[Any], Array], form: StreamForm, batch: int) -> None:
        if batch < 1:
            raise UserError(f"batch={batch}: must be at least 1")
        self._graph = graph
        self._check = check
        self._form = form
        self._batch = batch
        self._seen: tuple[int, ...] = tuple(0 for _ in form.downsample)  # height and width of the latents
        self._reset()

    def _reset(self) -> None:
        self._waiting: Array | None = None
        self._state: npt.NDArray[np.float32] | None = None

    def _grid(self, values: Array) -> tuple[int, ...]:
        """Return the height and width of the input's latents; empty for audio."""
        return values.shape[3:]

    def _pad_start(self, values: Array) -> Array:
        """Prepend the causal padding to the first values, if any."""
        return values

    def _next(self, given: Any, what: str) -> Array | None:
        """Append an input to the buffer; return the output of all complete steps, None if there are none."""
        values = self._check(given)
        if values.shape[0] != self._batch:
            raise UserError(f"{what}: this stream's batch size is {self._batch}, got {values.shape[0]}")
        self._seen = self._grid(values)
        if self._waiting is not None:
            if values.shape[1] != self._waiting.shape[1]:
                raise UserError(f"{what}: {self._waiting.shape[1]} codebooks before, {values.shape[1]} now")
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
        """Return the output of the last, incomplete step, None if there is none; reset the stream."""
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
    """Streaming encoder, as `AudioBundle.encoding` and `VideoBundle.encoding` return it.

    Args:
        graph: The streaming encoder, an ONNX Runtime session.
        check: Converts a chunk to float32 `(b, c, t, ...)`.
        form: Chunk and state sizes.
        batch: Number of signals encoded in parallel.
        num_codebooks: Number of codebooks to keep.
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
        """Encode the next chunk, of any size; return the codes `(b, codebooks, n, ...)` that it completes, n >= 0.

        Raises:
            UserError: The chunk's shape, type or a value is not supported; earlier input is kept.

        Example:
            >>> encode = varitok.load("audio_tokenizer").encoding(8000)  # 40 samples per token
            >>> encode(np.zeros(60)).shape, encode(np.zeros(60)).shape
            ((1, 2, 1), (1, 2, 2))
        """
        return self._keep(self._next(signal, "frames" if self._form.downsample else "wave"))

    def flush(self) -> Array:
        """Pad and encode the buffered rest, return its codes, and reset the stream for a new signal.

        Example:
            >>> encode = varitok.load("audio_tokenizer").encoding(8000)
            >>> encode(np.zeros(60)).shape, encode.flush().shape
            ((1, 2, 1), (1, 2, 1))
        """
        return self._keep(self._rest())

    def _keep(self, codes: Array | None) -> Array:
        """Return the first codebooks; None becomes codes of zero steps."""
        return (
            np.zeros((self._batch, self._codebooks, 0, *self._seen), self._kind)
            if codes is None
            else codes[:, : self._codebooks]
        )


class DecodingStream(_Stream):
    """Streaming decoder, as `AudioBundle.decoding` and `VideoBundle.decoding` return it.

    Args:
        graph: The streaming decoder, an ONNX Runtime session.
        check: Checks codes and casts them to the graph's dtype.
        form: Chunk and state sizes.
        batch: Number of signals decoded in parallel.
        channels: Number of each signal's channels.
    """

    def __init__(self, graph: Any, check: Callable[[Any], Array], form: StreamForm, batch: int, channels: int) -> None:
        super().__init__(graph, check, form, batch)
        self._channels = channels

    def __call__(self, codes: Any) -> npt.NDArray[np.float32]:
        """Decode the next codes `(b, codebooks, n, ...)`; return the signal `(b, c, t, ...)` they complete, t >= 0.

        The number of codebooks must be the same in all calls.

        Raises:
            UserError: The shape, type or a code is not the codec's; earlier input is kept.

        Example:
            >>> decode = varitok.load("audio_tokenizer").decoding(batch=2)
            >>> decode(np.zeros((2, 1, 3), np.int64)).shape  # one of two codebooks
            (2, 1, 120)
        """
        return self._finish(self._next(codes, "codes"))

    def flush(self) -> npt.NDArray[np.float32]:
        """Decode the buffered rest, return its signal, and reset the stream for new codes."""
        return self._finish(self._rest())

    def _finish(self, signal: npt.NDArray[np.float32] | None) -> npt.NDArray[np.float32]:
        """Return the signal; None becomes a signal of length 0."""
        sides = self._form.frame or (
            count * step for count, step in zip(self._seen, self._form.downsample, strict=True)
        )
        return np.zeros((self._batch, self._channels, 0, *sides), np.float32) if signal is None else signal

    def _run(self, chunk: Array) -> Array:
        causal_pad = self._form.causal_pad if self._state is None else 0
        return super()._run(chunk)[:, :, causal_pad:]
