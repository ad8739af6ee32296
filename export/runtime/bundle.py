"""Base classes of exported bundles of any modality; this folder needs only NumPy and ONNX Runtime."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, wraps
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

from varitok import UserError
from varitok.data.noise import gaussian
from varitok.data.storage.members import File

from .files import SignalFile
from .streaming import DecodingStream, EncodingStream, stream_form

__all__ = [
    "DECODER",
    "DECODER_INT8",
    "ENCODER",
    "FORMAT_VERSION",
    "REEXPORT_HINT",
    "STREAMING",
    "Array",
    "Bundle",
    "Opened",
    "onnx_runtime",
    "product_of",
    "read_config",
    "read_json",
    "sha256",
    "tensors",
    "to_pixels",
    "verify_files",
]

FORMAT_VERSION = 2
READ_VERSIONS = (1, 2)
_KEYS_OF_1 = {"book_sizes": "codebook_sizes", "book_strides": "codebook_strides"}
ENCODER, DECODER = "onnx/encoder_model.onnx", "onnx/decoder_model.onnx"
DECODER_INT8 = "onnx/decoder_model_int8.onnx"
STREAMING = "onnx/encoder_model_streaming.onnx", "onnx/decoder_model_streaming.onnx"
REEXPORT_HINT = "export it again with varitok export"

Array = npt.NDArray[Any]
Method = TypeVar("Method", bound=Callable[..., Any])


def product_of(sizes: Sequence[int]) -> str:
    """Return codebooks' sizes in a few words, `8 x 4 x 4`; more than eight equal ones as `4096^680`."""
    runs = [(size, len(list(run))) for size, run in groupby(sizes)]
    return " x ".join(f"{size}^{count}" if count > 8 else " x ".join([str(size)] * count) for size, count in runs)


def tensors(method: Method) -> Method:
    """Let a bundle's method accept a torch tensor as its first argument, and then return one on the same device.

    The graphs run on the bundle's execution providers. torch is imported only if a tensor is passed.
    """

    @wraps(method)
    def call(self: Any, signal: Any, *args: Any, **options: Any) -> Any:
        if not hasattr(signal, "detach"):
            return method(self, signal, *args, **options)
        import torch  # noqa: PLC0415 (only for tensors)

        values = signal.detach().cpu()
        found = method(self, (values.float() if values.is_floating_point() else values).numpy(), *args, **options)
        return torch.from_numpy(found).to(signal.device)

    return cast("Method", call)


class Opened:
    """An opened bundle, as `load` returns it; each graph is loaded on first use.

    Args:
        folder: Path of the bundle.
        config: Parsed config.json.
        providers: ONNX Runtime's execution providers.
        int8: Decode with the decoder graph of 8-bit weights.

    Attributes:
        modality: Name of the modality in config.json and in containers.
        graphs: Required graph files.
        suffixes: Suffixes of the files that a folder is searched for.
        written: Suffixes of the files that `write_file` writes, without the dot; the first is the default.
        config: Parsed config.json.
        threads: Threads of each graph that is loaded from now on; 0 for one a core.
    """

    modality: ClassVar[str]
    graphs: ClassVar[tuple[str, ...]] = (ENCODER, DECODER)
    suffixes: ClassVar[tuple[str, ...]] = ()
    written: ClassVar[tuple[str, ...]] = ()
    threads = 0

    def __init__(self, folder: Path, config: dict[str, Any], providers: list[str], int8: bool = False) -> None:
        self.folder = folder
        self.config = config
        self.providers = providers
        self.int8 = int8
        try:
            self._read()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'}: {error} is missing or wrong; {REEXPORT_HINT}") from error

    def __getstate__(self) -> dict[str, Any]:
        """Return the state to pickle, without graphs: they can't be pickled, and a copy loads them on first use."""
        graphs = [name for name in vars(self) if isinstance(getattr(type(self), name, None), cached_property)]
        return {name: value for name, value in vars(self).items() if name not in graphs}

    def _read(self) -> None:
        """Set the attributes that the config defines."""

    def describe(self, files: Mapping[str, int]) -> dict[str, Any]:
        """Return a summary as JSON-serializable values; `files` maps the bundle's files to their sizes in bytes."""
        return {}

    @cached_property
    def _encoder(self) -> Any:
        return self._session(ENCODER)

    @cached_property
    def _decoder(self) -> Any:
        return self._session(DECODER_INT8 if self.int8 else DECODER)

    def _session(self, name: str) -> Any:
        runtime = onnx_runtime()
        options = runtime.SessionOptions()
        # Memory planned for the last call's sizes would be held beside that of other sizes: twice the peak.
        options.enable_mem_pattern = False
        options.intra_op_num_threads = self.threads
        try:
            return runtime.InferenceSession(str(self.folder / name), options, providers=self.providers)
        except Exception as error:  # ONNX Runtime's exception classes, defined in C++
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.folder / name}: ONNX Runtime can't read it ({first}); {REEXPORT_HINT}") from error


class Bundle(Opened):
    """An exported codec; the subclass of each modality defines its input types and files.

    Attributes:
        counted: Unit of a signal's length in containers, such as "samples".
        sample_rate: Sample rate in Hz; None except for audio.
        frame_rate: Frames per second; None if unknown.
        hops: Downsampling factor of each axis of the signal.
        causal_pad: Copies of the first frame that the codec puts before a signal.
        tokens: Maximum number of ordered tokens of a signal or block, N; 0 if it follows from the signal's length.
        channels: Number of the signal's channels.
        codebook_sizes: Entries of each codebook; empty if codes are continuous.
        codebook_strides: Tokens that share one code of each codebook; the code is repeated for them.
        multiple: Number that the code steps of a signal are a multiple of; signals are padded.
        codebook_layers: Numbers of consecutive codebooks that share entries; 1 each, except in a hierarchy.
        rows: Size of the codes' axis 1: number of codebooks, or of channels of continuous codes.
        axes: Number of axes of the code grid: 1 for a sequence of tokens, 2 for blocks of tokens or the grid of an
            image, 3 for that of a clip.
        latency_ms: Signal, in ms, that a stream buffers before its first code; None if the codec can't stream or no
            rate is known.
        seed: Seed of the noise from which a decoder samples, the same for all signals; None if it doesn't sample.
            Another one gives other signals that fit the codes.
    """

    counted: ClassVar[str]
    axes = 1
    sample_rate: int | None = None
    frame_rate: float | None = None
    hops: tuple[int, ...]
    causal_pad = 0

    def _read(self) -> None:
        config = self.config
        self.tokens = int(config["tokens"])
        self.channels = int(config["channels"])
        self.codebook_sizes = tuple(int(size) for size in config["codebook_sizes"])
        self.codebook_strides = tuple(
            int(step) for step in config.get("codebook_strides", [1] * len(self.codebook_sizes))
        )
        self.multiple = int(config.get("multiple", 1))
        self.codebook_layers = tuple(
            int(count) for count in config.get("codebook_layers", [1] * len(self.codebook_sizes))
        )
        self.rows = int(config.get("code_rows", len(self.codebook_sizes)))
        self.latency_ms: float | None = (config.get("streaming") or {}).get("latency_ms")
        self.seed: int | None = (config.get("sampler") or {}).get("seed")

    def values(self, signal: Any) -> npt.NDArray[np.float32]:
        """Convert any accepted input to the input of the graphs, float32 `(b, c, *grid)`.

        Raises:
            UserError: The shape, type or a value is not supported.
        """
        raise NotImplementedError

    def encode_values(
        self, values: npt.NDArray[np.float32], *, tokens: int | None = None, num_codebooks: int | None = None
    ) -> Array:
        """Encode the output of `values`; return all tokens and codebooks, or the first of them.

        Raises:
            UserError: A number is out of range, or `tokens` is given for a codec without ordered tokens.
        """
        self.check_kept(tokens, num_codebooks)
        codes = self.run_encoder(values)[:, : self.count_kept(num_codebooks)]
        return codes if tokens is None else codes[..., :tokens]

    def steps_of(self, lengths: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """Return each signal's number of code steps, of `steps` in the batch.

        It is ceil((length + causal_pad) / hop), and the next multiple of `multiple`.
        """
        return -(-(lengths + self.causal_pad) // (self.hops[0] * self.multiple)) * self.multiple

    def units_of(self, steps: int, length: int) -> npt.NDArray[np.int64]:
        """Return where each code step ends in a signal of this length: int64 `(steps,)`, in samples or frames."""
        return np.minimum((np.arange(steps) + 1) * self.hops[0] - self.causal_pad, length)

    @property
    def group(self) -> int:
        """Steps that share a code, or are coded together: a window begins and ends at a multiple of it."""
        return math.lcm(self.multiple, *self.codebook_strides)

    @cached_property
    def memory(self) -> Mapping[str, Sequence[float]]:
        """Memory of `encoder` and `decoder` (`exporters/memory.py`); empty for older exports."""
        found: Mapping[str, Sequence[float]] = read_json(self.folder / "export.json").get("memory") or {}
        return found

    @property
    def splits(self) -> bool:
        """Whether parts of a signal can be coded one by one: unless its tokens are about the whole, as an image's."""
        return not self.tokens or self.axes > 1

    def facts(self, size: tuple[int, ...], rate: float | None) -> tuple[int, ...]:
        """Return the facts about a signal of a size `(*grid)` that the container's header records for decoding."""
        return ()

    def signal_size(self, codes: Array, units: int | None, facts: tuple[int, ...]) -> tuple[int, ...]:
        """Return the size `(*grid)` of a container's signal.

        Args:
            codes: Its codes, `(1, codebooks, steps, *inner)`.
            units: Its length in samples or frames; None if the file is truncated.
            facts: Facts about it from the container's header, as `facts` returns them.

        Raises:
            UserError: The codes don't have this size.
        """
        return (codes.shape[2] * self.hops[0] - self.causal_pad if units is None else units,)

    def open_file(self, path: File) -> AbstractContextManager[SignalFile]:
        """Open a media file or a member of a shard, prepared as in training and evaluation; `STREAM` is standard input.

        Raises:
            UserError: The file can't be read, or the codec doesn't support its content.
        """
        raise NotImplementedError

    def write_file(
        self, chunks: Iterable[npt.NDArray[np.float32]], facts: tuple[int, ...], to: str, file: BinaryIO
    ) -> dict[str, Any]:
        """Write a decoded signal.

        Args:
            chunks: Consecutive chunks of the signal, `(1, c, n, ...)`.
            facts: Facts about it, as `facts` returns them.
            to: Format, one of `written`.
            file: The file, opened for writing; formats may seek in it.

        Returns:
            A summary of the file's content.

        Raises:
            UserError: The chunks don't fit in one file.
        """
        raise NotImplementedError

    def encoding_stream(self, num_codebooks: int | None = None, batch: int = 1) -> EncodingStream:
        """Return a streaming encoder of `batch` signals that keeps `num_codebooks` codebooks, all if None.

        Raises:
            UserError: The codec can't stream, or has fewer codebooks.
        """
        graph, kept = self.streaming_graphs[0], self.count_kept(num_codebooks)
        return EncodingStream(graph, self.values, stream_form(self.config, "encoder"), batch, kept)

    def decoding_stream(self, batch: int = 1) -> DecodingStream:
        """Return a streaming decoder of `batch` signals.

        Raises:
            UserError: The codec can't stream.
        """
        graph = self.streaming_graphs[1]
        return DecodingStream(graph, self._codes, stream_form(self.config, "decoder"), batch, self.channels)

    def describe(self, files: Mapping[str, int]) -> dict[str, Any]:
        """Return a summary as JSON-serializable values."""
        about = {
            "signals": self.describe_signals(),
            "bottleneck": self.config["quantizer"],
            "codebook_sizes": list(self.codebook_sizes) or f"none: {self.rows} floats a token",
            "bits_of_a_token": round(self.bits(1), 4),
            **self.describe_rates(),
            "streams": "onnx" if self.config.get("streaming") else "no",
        }
        if self.seed is not None:
            about["samples"] = f"in {self.config['sampler']['steps']} steps, seed {self.seed}"
        return about | ({} if self.latency_ms is None else {"latency_ms": self.latency_ms})

    def describe_signals(self) -> str:
        """Return one line about the signals that the codec accepts."""
        raise NotImplementedError

    def describe_rates(self) -> dict[str, Any]:
        """Return the number of `tokens`, and the `rates` of the codes that can be kept."""
        raise NotImplementedError

    def _describe_lengths(self, noun: str) -> dict[str, Any]:
        """Return the payload in bytes of 1, 2, 4, ... and all N ordered tokens."""
        kept = [1 << power for power in range(self.tokens.bit_length()) if 1 << power < self.tokens]
        return {"rates": {f"{k} tokens": f"{self.bits(k) / 8:g} bytes for {noun}" for k in [*kept, self.tokens]}}

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Return the exact payload in bits of `tokens` tokens in the first `num_codebooks` codebooks, all if None.

        bits = sum_q ceil(tokens / stride_q) log2(size_q); continuous codes take 32 bits per channel.
        """
        if not self.codebook_sizes:
            return tokens * 32.0 * self.rows
        each = list(zip(self.codebook_sizes, self.codebook_strides, strict=True))[:num_codebooks]
        return sum(-(-tokens // stride) * math.log2(size) for size, stride in each)

    @tensors
    def decode(self, codes: Any) -> npt.NDArray[np.float32]:
        """Decode codes `(b, q, k)` into signals, float32 `(b, c, ...)` in [-1, 1].

        q may be less than the number of codebooks: the first q. k is at most N; any k if the codec has no ordered
        tokens. Codes have any integer type; continuous codes are floats and need all channels.

        Raises:
            UserError: The shape, type or a code is not the codec's.
        """
        codes = self._codes(codes)
        self._check_tokens(codes.shape[2])
        return self.run_decoder(codes)

    def run_decoder(self, codes: Array) -> npt.NDArray[np.float32]:
        """Decode codes of the graph's dtype into signals, without checks."""
        given = [codes] if self.seed is None else [codes, self._noise(self.seed, len(codes))]
        return self._run(DECODER, self._decoder, *given)

    def _noise(self, seed: int, batch: int) -> npt.NDArray[np.float32]:
        """Return the noise `(batch, c, *grid)` from which the decoder samples."""
        shape = self._decoder.get_inputs()[1].shape[1:]
        return np.repeat(gaussian(shape, seed)[None], batch, axis=0)

    def run_encoder(self, signal: npt.NDArray[np.float32]) -> Array:
        """Encode signals, float32 `(b, c, *grid)` in [-1, 1], without checks."""
        return self._run(ENCODER, self._encoder, signal)

    def _run(self, name: str, graph: Any, *given: Array) -> Array:
        """Run a graph that has one output, with its inputs in order."""
        try:
            names = (port.name for port in graph.get_inputs())
            found: Array = graph.run(None, dict(zip(names, given, strict=True)))[0]
        except Exception as error:  # ONNX Runtime's exception classes, defined in C++
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.folder / name}: ONNX Runtime can't run it ({first}); {REEXPORT_HINT}") from error
        return found

    def _codes(self, codes: Any) -> Array:
        """Check codes, perhaps of zero steps, and cast them to the graph's dtype."""
        codes = np.asarray(codes)
        kind, least, what = ("iu", 1, "whole numbers") if self.codebook_sizes else ("f", self.rows, "floats")
        if codes.dtype.kind not in kind:
            raise UserError(f"codes: {what} are expected, got {codes.dtype}")
        if codes.ndim != 2 + self.axes or not least <= codes.shape[1] <= self.rows or not codes.shape[0]:
            rows = f"{least} to {self.rows}" if least < self.rows else self.rows
            most = ["tokens", "rows, columns", "frames, rows, columns"][self.axes - 1]
            if self.tokens:
                most = f"blocks, 1 to {self.tokens}" if self.axes > 1 else f"1 to {self.tokens}"
            raise UserError(f"codes: shape (batch, {rows}, {most}) is expected, got {codes.shape}")
        # ONNX Runtime would read -1 as the last entry.
        for codebook, size in zip(range(codes.shape[1]), self.codebook_sizes, strict=False):
            low, high = codes[:, codebook].min(initial=0), codes[:, codebook].max(initial=0)
            if low < 0 or high >= size:
                raise UserError(f"codes: codebook {codebook} has codes 0 to {size - 1}, got {low if low < 0 else high}")
        checked: Array = codes.astype(np.int64 if self.codebook_sizes else np.float32)
        return checked

    @cached_property
    def streaming_graphs(self) -> tuple[Any, Any]:
        """The streaming graphs of encoder and decoder, as ONNX Runtime sessions.

        Raises:
            UserError: The codec can't stream.
        """
        if not self.config.get("streaming"):
            reason = "it looks ahead, or was exported without streaming; encode and decode whole signals"
            raise UserError(f"{self.folder}: this codec can't stream: {reason}")
        return self._session(STREAMING[0]), self._session(STREAMING[1])

    def count_kept(self, num_codebooks: int | None) -> int:
        """Check the requested number of codebooks and return it; all if None.

        Raises:
            UserError: The codec has fewer codebooks, or continuous codes, which need all channels.
        """
        kept = self.rows if num_codebooks is None else num_codebooks
        if not 1 <= kept <= self.rows or (not self.codebook_sizes and kept != self.rows):
            raise UserError(
                f"{kept} codebooks: this codec has {self.rows}"
                + (", or fewer" if self.codebook_sizes else ", all needed")
            )
        return kept

    def check_kept(self, tokens: int | None, num_codebooks: int | None) -> None:
        """Check how many tokens and codebooks of a signal to keep; None for all.

        Raises:
            UserError: A number is out of range, or `tokens` is given for a codec without ordered tokens.
        """
        self.count_kept(num_codebooks)
        if tokens is None:
            return
        if not self.tokens:
            raise UserError(
                f"--tokens {tokens}: the number of tokens follows from the signal's size; keep fewer codebooks instead"
            )
        self._check_tokens(tokens)

    def _check_tokens(self, tokens: int) -> None:
        if tokens < 1 or (self.tokens and tokens > self.tokens):
            raise UserError(f"{tokens} tokens: this codec takes from 1 {f'to {self.tokens}' if self.tokens else 'on'}")


def to_pixels(signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Convert signals `(b, c, ...)` in [-1, 1] to uint8 `(b, ..., c)`: round(127.5 (x + 1)).

    Example:
        >>> to_pixels(np.zeros((1, 3, 16, 16))).shape
        (1, 16, 16, 3)
    """
    values = (np.asarray(signal, dtype=np.float32) + 1) * np.float32(127.5)
    return np.moveaxis(np.clip(np.round(values), 0, 255), 1, -1).astype(np.uint8)  # (b, c, ...) -> (b, ..., c)


def onnx_runtime() -> Any:
    """Return the module `onnxruntime`.

    Raises:
        UserError: It isn't installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415 (inspecting a bundle's folder should not need it)
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed; pip install onnxruntime") from error
    return onnxruntime


def read_config(folder: Path) -> dict[str, Any]:
    """Load a bundle's config.json, and rename the keys of older formats.

    Raises:
        UserError: The file can't be read, or this version of varitok doesn't know its format.
    """
    path = folder / "config.json"
    config = read_json(path)
    version = config.get("format_version")
    if version not in READ_VERSIONS:
        known = f"this varitok reads formats {READ_VERSIONS[0]} to {FORMAT_VERSION}"
        raise UserError(f"{path}: format_version {version!r}, {known}; update varitok or {REEXPORT_HINT}")
    return {_KEYS_OF_1.get(key, key): value for key, value in config.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Load a JSON object from a bundle.

    Raises:
        UserError: The file is missing or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); is {path.parent} a bundle of varitok?") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged; {REEXPORT_HINT}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a JSON object; {REEXPORT_HINT}")
    return found


def sha256(path: Path) -> str:
    """Return a file's SHA-256 digest in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: Path, graphs: Sequence[str]) -> None:
    """Compare the files that the runtime reads, `graphs` included, with their checksums in export.json."""
    files = read_json(folder / "export.json").get("files")
    if not isinstance(files, dict) or not {"config.json", *graphs} <= files.keys():
        raise UserError(f"{folder / 'export.json'}: lacks the checksums of the graphs; {REEXPORT_HINT}")
    for name, known in files.items():
        if name != "config.json" and not name.startswith(("onnx/", "prior/")):
            continue
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: missing; {REEXPORT_HINT}")
        if not isinstance(known, dict) or sha256(path) != known.get("sha256"):
            raise UserError(f"{path}: altered since it was exported; copy the bundle anew or {REEXPORT_HINT}")
