"""A bundle's graphs, whatever its signals are; numpy and ONNX Runtime alone, as all of this folder."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, ClassVar, TypeVar, cast

import numpy as np
import numpy.typing as npt

from varitok import UserError

from .files import Part

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


def tensors(method: Method) -> Method:
    """Let a method of a bundle also take a torch tensor as what it codes, and give one on its device then.

    Graphs run where the bundle's providers are; torch itself is not needed, and is not loaded for anything else.
    """

    @wraps(method)
    def call(self: Any, signal: Any, *args: Any, **options: Any) -> Any:
        if not hasattr(signal, "detach"):
            return method(self, signal, *args, **options)
        import torch  # noqa: PLC0415 (there is a tensor)

        values = signal.detach().cpu()
        found = method(self, (values.float() if values.is_floating_point() else values).numpy(), *args, **options)
        return torch.from_numpy(found).to(signal.device)

    return cast("Method", call)


class Opened:
    """A bundle's folder, opened by `load`; each graph is read when it is first used.

    Args:
        folder: Its path.
        config: Its config.json.
        providers: ONNX Runtime's execution providers.
        int8: Decode by the graph of whole numbers.

    Attributes:
        modality: Its name in config.json and in containers.
        graphs: The files that it can't work without.
        suffixes: Suffixes of the files that `read_file` takes.
        written: Suffixes of the files that `write_file` makes, without the dot; the first is the default.
        config: Its config.json.
    """

    modality: ClassVar[str]
    graphs: ClassVar[tuple[str, ...]] = (ENCODER, DECODER)
    suffixes: ClassVar[tuple[str, ...]] = ()
    written: ClassVar[tuple[str, ...]] = ()

    def __init__(self, folder: Path, config: dict[str, Any], providers: list[str], int8: bool = False) -> None:
        self.folder = folder
        self.config = config
        self.providers = providers
        self.int8 = int8
        try:
            self._read()
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'}: {error} is missing or wrong; {REEXPORT_HINT}") from error

    def _read(self) -> None:
        """Read attributes from the config."""

    def describe(self, files: Mapping[str, int]) -> dict[str, Any]:
        """Return what a user should know, as plain values; `files` are the bundle's, with their bytes."""
        return {}

    @cached_property
    def _encoder(self) -> Any:
        return self._session(ENCODER)

    @cached_property
    def _decoder(self) -> Any:
        return self._session(DECODER_INT8 if self.int8 else DECODER)

    def _session(self, name: str) -> Any:
        try:
            return onnx_runtime().InferenceSession(str(self.folder / name), providers=self.providers)
        except Exception as error:  # ONNX Runtime's own classes, made in C++
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.folder / name}: ONNX Runtime can't read it ({first}); {REEXPORT_HINT}") from error


class Bundle(Opened):
    """An exported codec; each modality has a class of its own, which says how its signals and files are handled.

    Attributes:
        counted: What a container counts of its signals: "samples", say.
        sample_rate: Hz; None without one.
        frame_rate: Frames a second; None if unknown.
        hops: Samples of each axis per step of the codes' grid.
        causal_pad: Copies of the first frame that go before a signal.
        tokens: The most tokens of a signal, N; 0 if their number follows from its length.
        channels: Channels of a signal.
        codebook_sizes: Entries of each codebook; none if codes are continuous.
        codebook_strides: Tokens per code of each codebook, which is repeated for them.
        rows: Rows of a code: codebooks, or channels of continuous codes.
        axes: Axes of the codes' grid: 1 for tokens in a row, 2 for tokens of blocks.
        latency_ms: Milliseconds of a signal that a stream waits for before it can give a code; None: it can't stream,
            or no rate is known.
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
        self.rows = int(config.get("code_rows", len(self.codebook_sizes)))
        self.latency_ms: float | None = (config.get("streaming") or {}).get("latency_ms")

    def values(self, signal: Any) -> npt.NDArray[np.float32]:
        """Return whatever a signal is given as in the form of the graphs, float32 `(b, c, *grid)`.

        Raises:
            UserError: A shape, type or value that the codec doesn't take.
        """
        raise NotImplementedError

    def encode_values(
        self, values: npt.NDArray[np.float32], *, tokens: int | None = None, num_codebooks: int | None = None
    ) -> Array:
        """Turn signals, as `values` returns them, into codes: all, or the first tokens or codebooks.

        Raises:
            UserError: A number is out of range, or tokens are not ordered.
        """
        codes = self.run_encoder(values)[:, : self.count_kept(num_codebooks)]
        if tokens is None:
            return codes
        if not self.tokens:
            raise UserError(
                f"--tokens {tokens}: this codec's follow from a signal's size; keep fewer codebooks instead"
            )
        self._check_tokens(tokens)
        return codes[..., :tokens]

    def steps_of(self, lengths: npt.NDArray[np.int64], steps: int) -> npt.NDArray[np.int64]:
        """Count the steps of codes that signals of these lengths have, in a batch of codes of `steps` steps."""
        return -(-(lengths + self.causal_pad) // self.hops[0])

    def units_of(self, steps: int, length: int) -> npt.NDArray[np.int64]:
        """Return how far each of the steps reaches into a signal of a length."""
        return np.minimum((np.arange(steps) + 1) * self.hops[0] - self.causal_pad, length)

    def facts(self, values: npt.NDArray[np.float32], rate: float | None) -> tuple[int, ...]:
        """Return what decoding a signal `(1, c, *grid)` of a frame rate takes, for the container's header."""
        return ()

    def read_file(self, path: Path) -> tuple[npt.NDArray[np.float32], float | None]:
        """Return a file's signal, as `values` does, and its frame rate.

        Raises:
            UserError: It can't be read, or isn't the codec's.
        """
        raise NotImplementedError

    def write_file(self, parts: Sequence[Part], to: str, path: Path) -> tuple[bytes, dict[str, Any]]:
        """Decode codes that follow each other, read at `path`, into one file of kind `to`; say how much is in it.

        Raises:
            UserError: These codes can't be in one file.
        """
        raise NotImplementedError

    def describe(self, files: Mapping[str, int]) -> dict[str, Any]:
        """Return what a user should know, as plain values."""
        about = {
            "signals": self.describe_signals(),
            "bottleneck": self.config["quantizer"],
            "codebook_sizes": list(self.codebook_sizes) or f"none: {self.rows} floats a token",
            "bits_of_a_token": round(self.bits(1), 4),
            **self.describe_rates(),
            "streams": "onnx" if self.config.get("streaming") else "no",
        }
        return about | ({} if self.latency_ms is None else {"latency_ms": self.latency_ms})

    def describe_signals(self) -> str:
        """Return what it takes, in a line."""
        raise NotImplementedError

    def describe_rates(self) -> dict[str, Any]:
        """Return the number of `tokens`, and the `rates` of what may be kept of them."""
        raise NotImplementedError

    def _describe_lengths(self, noun: str) -> dict[str, Any]:
        """Return the rates of ordered tokens."""
        kept = [1 << power for power in range(self.tokens.bit_length()) if 1 << power < self.tokens]
        return {"rates": {f"{k} tokens": f"{self.bits(k) / 8:g} bytes for {noun}" for k in [*kept, self.tokens]}}

    def bits(self, tokens: int, num_codebooks: int | None = None) -> float:
        """Count the payload bits of `tokens` tokens, exactly; of the first `num_codebooks`, all if None."""
        if not self.codebook_sizes:
            return tokens * 32.0 * self.rows
        each = list(zip(self.codebook_sizes, self.codebook_strides, strict=True))[:num_codebooks]
        return sum(-(-tokens // stride) * math.log2(size) for size, stride in each)

    @tensors
    def decode(self, codes: Any) -> npt.NDArray[np.float32]:
        """Turn codes `(b, q, k)`, of clips `(b, q, *grid)`, into signals, float32 `(b, c, ...)` in [-1, 1].

        Codes may be of any integer type, and a prefix of the codebooks; continuous ones are floats, all channels. k is
        from 1 to N, or any where the number of tokens follows from the signal's length.

        Raises:
            UserError: A shape, type or code that the codec doesn't have.
        """
        codes = self._codes(codes)
        self._check_tokens(codes.shape[2])
        return self.run_decoder(codes)

    def run_decoder(self, codes: Array) -> npt.NDArray[np.float32]:
        """Turn codes of the graph's own type into signals; nothing is checked."""
        return self._run(DECODER, self._decoder, codes)

    def run_encoder(self, signal: npt.NDArray[np.float32]) -> Array:
        """Turn signals, float32 `(b, c, *grid)` in [-1, 1], into codes; nothing is checked."""
        return self._run(ENCODER, self._encoder, signal)

    def _run(self, name: str, graph: Any, given: Array) -> Array:
        """Run a graph of one input and one output."""
        try:
            found: Array = graph.run(None, {graph.get_inputs()[0].name: given})[0]
        except Exception as error:  # ONNX Runtime's own classes, made in C++
            first = (str(error).splitlines() or [""])[0]
            raise UserError(f"{self.folder / name}: ONNX Runtime can't run it ({first}); {REEXPORT_HINT}") from error
        return found

    def _codes(self, codes: Any) -> Array:
        """Check codes, possibly none yet; return them in the graph's type."""
        codes = np.asarray(codes)
        kind, least, what = ("iu", 1, "whole numbers") if self.codebook_sizes else ("f", self.rows, "floats")
        if codes.dtype.kind not in kind:
            raise UserError(f"codes: {what} are expected, got {codes.dtype}")
        if codes.ndim != 2 + self.axes or not least <= codes.shape[1] <= self.rows or not codes.shape[0]:
            rows = f"{least} to {self.rows}" if least < self.rows else self.rows
            most = ["tokens", f"blocks, 1 to {self.tokens}", "frames, rows, columns"][self.axes - 1]
            most = f"1 to {self.tokens}" if self.tokens and self.axes == 1 else most
            raise UserError(f"codes: shape (batch, {rows}, {most}) is expected, got {codes.shape}")
        # ONNX Runtime would take -1 for the last entry.
        for codebook, size in zip(range(codes.shape[1]), self.codebook_sizes, strict=False):
            low, high = codes[:, codebook].min(initial=0), codes[:, codebook].max(initial=0)
            if low < 0 or high >= size:
                raise UserError(f"codes: codebook {codebook} has codes 0 to {size - 1}, got {low if low < 0 else high}")
        checked: Array = codes.astype(np.int64 if self.codebook_sizes else np.float32)
        return checked

    @cached_property
    def streaming_graphs(self) -> tuple[Any, Any]:
        """The encoder's and the decoder's graphs that go chunk by chunk, as ONNX Runtime's sessions.

        Raises:
            UserError: The codec can't stream.
        """
        if not self.config.get("streaming"):
            reason = "it looks ahead, or was exported without; encode and decode whole signals"
            raise UserError(f"{self.folder}: this codec can't stream: {reason}")
        return self._session(STREAMING[0]), self._session(STREAMING[1])

    def count_kept(self, num_codebooks: int | None) -> int:
        """Check the number of codebooks that is asked for; give it, all if None.

        Raises:
            UserError: The codec has fewer, or continuous codes, which can't be cut.
        """
        kept = self.rows if num_codebooks is None else num_codebooks
        if not 1 <= kept <= self.rows or (not self.codebook_sizes and kept != self.rows):
            raise UserError(
                f"{kept} codebooks: this codec has {self.rows}"
                + (", or fewer" if self.codebook_sizes else ", all needed")
            )
        return kept

    def _check_tokens(self, tokens: int) -> None:
        if tokens < 1 or (self.tokens and tokens > self.tokens):
            raise UserError(f"{tokens} tokens: this codec takes from 1 {f'to {self.tokens}' if self.tokens else 'on'}")


def to_pixels(signal: npt.ArrayLike) -> npt.NDArray[np.uint8]:
    """Turn signals `(b, c, ...)` in [-1, 1] into uint8 `(b, ..., c)`, rounded to the nearest."""
    values = (np.asarray(signal, dtype=np.float32) + 1) * np.float32(127.5)
    return np.moveaxis(np.clip(np.round(values), 0, 255), 1, -1).astype(np.uint8)


def onnx_runtime() -> Any:
    """Return the module `onnxruntime`.

    Raises:
        UserError: It isn't installed.
    """
    try:
        import onnxruntime  # noqa: PLC0415 (looking at a bundle's folder should not need it)
    except ImportError as error:
        raise UserError("ONNX Runtime is not installed; pip install onnxruntime") from error
    return onnxruntime


def read_config(folder: Path) -> dict[str, Any]:
    """Load a bundle's config.json, with the keys of today.

    Raises:
        UserError: It can't be read, or is of a format that this varitok doesn't know.
    """
    path = folder / "config.json"
    config = read_json(path)
    version = config.get("format_version")
    if version not in READ_VERSIONS:
        known = f"this varitok reads formats {READ_VERSIONS[0]} to {FORMAT_VERSION}"
        raise UserError(f"{path}: format_version {version!r}, {known}; update varitok or {REEXPORT_HINT}")
    return {_KEYS_OF_1.get(key, key): value for key, value in config.items()}


def read_json(path: Path) -> dict[str, Any]:
    """Read an object of a bundle.

    Raises:
        UserError: It isn't there, or is damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}); is {path.parent} a bundle of varitok?") from error
    except ValueError as error:
        raise UserError(f"{path}: damaged; {REEXPORT_HINT}") from error
    if not isinstance(found, dict):
        raise UserError(f"{path}: not a bundle's; {REEXPORT_HINT}")
    return found


def sha256(path: Path) -> str:
    """Digest a file."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def verify_files(folder: Path, graphs: Sequence[str]) -> None:
    """Compare the files that the runtime reads, these graphs among them, with export.json."""
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
