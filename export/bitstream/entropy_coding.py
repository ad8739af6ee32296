"""Codes as bytes, four ways: packed, or each symbol in as many bits as its chance takes; see CONTAINER.md.

Chances are whole numbers, so that whoever decodes has those that the encoder had. They come from the codes before
(`adaptive`), from how often each entry was seen in training (`static`), or from the bundle's prior (`learned`).
"""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from varitok import UserError

from ..runtime.bundle import REEXPORT_HINT, Bundle, onnx_runtime, read_json
from .packing import Codebook, Codes, Packing
from .range_coder import Cut, RangeDecoder, RangeEncoder
from .symbols import Numbers, Structure, Symbols

__all__ = [
    "CODINGS", "CONFIG", "COUNTED", "FREQUENCIES", "GRAPH", "LIMIT", "PRIOR", "WITH_PRIOR", "Adaptive",
    "Coding", "Learned", "Packed", "Static", "codebooks_of", "coding_of", "fits", "frequencies", "open_graph",
    "ordered_axis", "prior_identity",
]  # fmt: skip

PRIOR = "prior"  # in the bundle's folder
CONFIG, GRAPH, FREQUENCIES = f"{PRIOR}/config.json", f"{PRIOR}/prior_model.onnx", f"{PRIOR}/frequencies.npy"
LIMIT = 512  # symbols of an alphabet of the prior's
COUNTED = 1 << 16  # of an alphabet whose entries are counted
TOTAL = 1 << 20  # of all chances, of `static` and `learned`
INCREMENT, MOST_SEEN = 32, 1 << 22  # of `adaptive`: what a symbol adds, and the sum at which all are halved
BLOCK = 256  # places of a row that go through the prior at once
LEAST_SHARE = 32  # codes for which there is a byte at least, so that a small file can't ask for long work


def _weights() -> Numbers:
    """Return 2 ** 32 e ** (-i / 64) for i = 0, 1, ... until it vanishes, in integers."""
    found = [1 << 32]
    while found[-1]:
        found.append(found[-1] * 16517109 >> 24)
    return np.array(found)


WEIGHTS = _weights()


def frequencies(weights: Numbers) -> Numbers:
    """Distribute `TOTAL` by weights, at least 1 to each; the remainder goes to the first of the largest."""
    found = 1 + weights * (TOTAL - len(weights)) // int(weights.sum())
    found[weights.argmax()] += TOTAL - int(found.sum())
    return np.asarray(found)


class Coding(ABC):
    """A way to write the codes of a chunk as bytes.

    Args:
        codebooks: Those of the codes that are written.

    Attributes:
        name: Its name.
        prior: 8 bytes that identify the prior; empty if it needs none.
    """

    name: ClassVar[str]
    prior: bytes = b""

    def __init__(self, codebooks: Sequence[Codebook]) -> None:
        self.codebooks = tuple(codebooks)

    @abstractmethod
    def encode(self, codes: Codes) -> bytes:
        """Write codes `(codebooks, steps, *inner)`."""

    @abstractmethod
    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Read codes; of an incomplete file, the steps that it holds, perhaps none.

        Raises:
            Damage: Nothing has written this.
        """


class Packed(Coding):
    """Each code in as few whole bits as its codebook needs."""

    name = "packed"

    def encode(self, codes: Codes) -> bytes:
        """Write codes `(codebooks, steps, *inner)`."""
        return Packing(self.codebooks, codes.shape[2:]).pack(codes)

    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Read codes."""
        packing = Packing(self.codebooks, inner)
        return packing.unpack(data, steps if whole else packing.steps(len(data), steps))


class _Modelled(Coding):
    """By chances of symbols, with a range coder.

    Args:
        codebooks: The codebooks that are written.
        symbols: The symbols of all codebooks of the codec.
    """

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols) -> None:
        super().__init__(codebooks)
        self.symbols = symbols

    @abstractmethod
    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies of each symbol of a row; the caller sends the symbol back."""

    def known_frequencies(self, structure: Structure, row: Numbers) -> Iterator[Numbers]:
        """Return the frequencies of each symbol of a known row."""
        course = self.follow(structure)
        for symbol in (None, *(row - self.symbols.offsets[structure.kinds])[:-1].tolist()):
            yield course.send(symbol)

    def encode(self, codes: Codes) -> bytes:
        """Write codes `(codebooks, steps, *inner)`."""
        num_codebooks, steps, *inner = codes.shape
        structure, row = self.symbols.structure(num_codebooks, steps, inner), self.symbols.row(codes)
        encoder = RangeEncoder()
        symbols = (row - self.symbols.offsets[structure.kinds]).tolist()
        for chances, symbol in zip(self.known_frequencies(structure, row), symbols, strict=True):
            encoder.encode(int(chances[:symbol].sum()), int(chances[symbol]), int(chances.sum()))
        return encoder.finish().ljust(_least(num_codebooks, steps, inner), b"\0")

    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Read codes."""
        structure = self.symbols.structure(len(self.codebooks), steps, inner)
        decoder, course, found = RangeDecoder(data, whole), self.follow(structure), list[int]()
        symbol: int | None = None
        try:
            for _ in structure.kinds:
                chances = course.send(symbol)
                symbol = decoder.decode(int(chances.sum()), _finder(chances))
                found.append(symbol)
        except Cut:
            steps = int(structure.steps[len(found)])  # those before it are whole
        count = int((structure.steps < steps).sum())
        row = np.array(found[:count], np.int64) + self.symbols.offsets[structure.kinds[:count]]
        return self.symbols.codes(row, len(self.codebooks), steps, inner)


def _finder(chances: Numbers) -> Callable[[int], tuple[int, int, int]]:
    ends = chances.cumsum()

    def find(slot: int) -> tuple[int, int, int]:
        symbol = int(ends.searchsorted(slot, side="right"))
        return symbol, int(ends[symbol] - chances[symbol]), int(chances[symbol])

    return find


class Adaptive(_Modelled):
    """By how often each entry of a codebook was there before in the chunk: order 0."""

    name = "adaptive"

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies of each symbol of a row."""
        seen = [np.ones(size, np.int64) for size in self.symbols.sizes]
        for kind in structure.kinds.tolist():
            symbol = yield seen[kind]
            seen[kind][symbol] += INCREMENT
            if seen[kind].sum() > MOST_SEEN:
                seen[kind] -= seen[kind] // 2


class Static(_Modelled):
    """By how often each entry of a codebook was there in training: order 0.

    Args:
        codebooks: The codebooks that are written.
        symbols: The symbols of all codebooks of the codec.
        table: Frequencies `(vocabulary,)`, `TOTAL` in each alphabet.
        prior: Identity of the prior.
    """

    name = "static"

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols, table: Numbers, prior: bytes) -> None:
        super().__init__(codebooks, symbols)
        self.tables = np.split(table, symbols.offsets[1:])
        self.prior = prior

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies of each symbol of a row."""
        for kind in structure.kinds.tolist():
            yield self.tables[kind]


class Learned(_Modelled):
    """By the prior beside the bundle.

    Args:
        codebooks: The codebooks that are written.
        symbols: The symbols of all codebooks of the codec.
        graph: ONNX Runtime's session.
        prior: Identity of the prior.
    """

    name = "learned"

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols, graph: Any, prior: bytes) -> None:
        super().__init__(codebooks, symbols)
        self.graph = graph
        self.prior = prior

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies of each symbol of a row, given those before it."""
        known = np.zeros(len(structure.kinds) + 1, np.int64)  # at -1 there is none
        state = self._start()
        for at, kind in enumerate(structure.kinds.tolist()):
            context = np.concatenate([[kind, structure.tokens[at]], known[structure.sources[at]]])
            logits, state = self.graph.run(None, {"contexts": context[None, None], "state": state})
            symbol = yield self._frequencies(logits[0, 0], kind)
            known[at] = 1 + self.symbols.offsets[kind] + symbol

    def known_frequencies(self, structure: Structure, row: Numbers) -> Iterator[Numbers]:
        """Return the frequencies of each symbol of a known row: the same, many at once."""
        contexts, state = self.symbols.contexts(structure, row)[None], self._start()
        for begin in range(0, len(row), BLOCK):
            logits, state = self.graph.run(None, {"contexts": contexts[:, begin : begin + BLOCK], "state": state})
            for kind, each in zip(structure.kinds[begin : begin + BLOCK].tolist(), logits[0], strict=True):
                yield self._frequencies(each, kind)

    def _start(self) -> npt.NDArray[np.float64]:
        return np.zeros((1, *self.graph.get_inputs()[1].shape[1:]))

    def _frequencies(self, logits: npt.NDArray[np.float64], kind: int) -> Numbers:
        begin = self.symbols.offsets[kind]
        own = logits[begin : begin + self.symbols.sizes[kind]]
        below = (own.max() - own).astype(np.int64)
        return frequencies(WEIGHTS[np.minimum(below, len(WEIGHTS) - 1)])


CODINGS = ("packed", "adaptive", "static", "learned")
WITH_PRIOR = ("static", "learned")


def fits(name: str, codebooks: Sequence[Codebook], size: int, steps: int, inner: Sequence[int]) -> bool:
    """Return whether codes of `steps` steps can take `size` bytes in a coding."""
    if name == "packed":
        return size == Packing(codebooks, inner).size(steps)
    return size >= _least(len(codebooks), steps, inner)


def _least(num_codebooks: int, steps: int, inner: Sequence[int]) -> int:
    return num_codebooks * steps * math.prod(inner) // LEAST_SHARE


def codebooks_of(bundle: Bundle) -> list[Codebook]:
    """List a bundle's codebooks."""
    return [Codebook(*pair) for pair in zip(bundle.codebook_sizes, bundle.codebook_strides, strict=True)]


def ordered_axis(config: Mapping[str, Any]) -> int | None:
    """Return the axis of a bundle's codes, after that of codebooks, that numbers its tokens; None for placed tokens."""
    return {"b q k": 0, "b q t k": 1}.get(config["token_layout"])


def prior_identity(folder: Path) -> bytes:
    """Return 8 bytes that identify a bundle's prior; empty if it has none."""
    files = read_json(folder / "export.json").get("files") or {}
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files) if name.startswith(f"{PRIOR}/"))
    return hashlib.sha256(lines.encode()).digest()[:8] if lines else b""


def coding_of(name: str, codebooks: Sequence[Codebook], bundle: Bundle | None = None) -> Coding:
    """Return a coding by its name.

    Args:
        name: One of `CODINGS`.
        codebooks: Those of the codes that are written.
        bundle: Whose codes they are; only packed and adaptive codes can do without.

    Raises:
        UserError: It needs a prior, and there is none.
    """
    if name == "packed":
        return Packed(codebooks)
    if name == "adaptive":
        return Adaptive(codebooks, Symbols(codebooks, None, COUNTED))
    if bundle is None:
        raise UserError(f"{name} codes can't be read without their bundle's prior")
    identity = prior_identity(bundle.folder)
    if not identity:
        raise UserError(
            f"{bundle.folder}: has no prior, which {name} codes need; train one with experiment=prior/transformer"
            f" tokenizer={bundle.folder}, and use the bundle that the run makes"
        )
    ordered = ordered_axis(bundle.config)
    if name == "static":
        return Static(codebooks, Symbols(codebooks_of(bundle), ordered, COUNTED), _table(bundle), identity)
    symbols = Symbols(codebooks_of(bundle), ordered, LIMIT)
    return Learned(codebooks, symbols, _graph(bundle), identity)


@lru_cache(maxsize=4)
def _table(bundle: Bundle) -> Numbers:
    path, symbols = bundle.folder / FREQUENCIES, Symbols(codebooks_of(bundle), None, COUNTED)
    try:
        table = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: can't be read ({error}); {REEXPORT_HINT}") from error
    fits = table.shape == (symbols.vocabulary,) and table.dtype.kind in "iu"
    if not fits or any(part.min() < 1 or part.sum() != TOTAL for part in np.split(table, symbols.offsets[1:])):
        raise UserError(f"{path}: not the frequencies of this bundle's codebooks; {REEXPORT_HINT}")
    return np.asarray(table.astype(np.int64))


def open_graph(path: Path, threads: int = 1) -> Any:
    """Open a prior's graph, on the processor, whose float64 is exact; its steps are too small for several threads.

    Raises:
        UserError: ONNX Runtime can't.
    """
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC  # nothing that changes a number
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own classes, made in C++
        raise UserError(f"{path}: ONNX Runtime can't read it ({(str(error).splitlines() or [''])[0]})") from error


@lru_cache(maxsize=4)
def _graph(bundle: Bundle) -> Any:
    """Open a bundle's prior."""
    path, vocabulary = bundle.folder / GRAPH, Symbols(codebooks_of(bundle), None, LIMIT).vocabulary
    graph = open_graph(path)
    ports = {port.name: port.shape for port in (*graph.get_inputs(), *graph.get_outputs())}
    state = ports.get("state", [])[1:]
    sound = all(isinstance(side, int) and 0 <= side <= 1 << 16 for side in state) and math.prod(state) <= 1 << 24
    if not sound or ports.get("logits", [None])[-1] != vocabulary:
        raise UserError(f"{path}: not a prior of this bundle's codebooks; {REEXPORT_HINT}")
    return graph
