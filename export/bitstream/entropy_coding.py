"""Entropy coding of codes: packed (fixed width), or range coded under one of three models; see CONTAINER.md.

Models return integer frequencies, so that encoder and decoder agree exactly. They come from the previous codes of the
chunk (`adaptive`), from counts of the training data (`static`), or from the bundle's prior (`learned`).
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
from .range_coder import Cut, Damage, RangeDecoder, RangeEncoder
from .symbols import ORDERS, Numbers, Structure, Symbols

__all__ = [
    "CODINGS", "CONFIG", "COUNTED", "FREQUENCIES", "GRAPH", "LIMIT", "PRIOR", "TOGETHER", "WITH_PRIOR", "Adaptive",
    "Coding", "Learned", "Packed", "Static", "codebooks_of", "coding_of", "fits", "frequencies", "open_graph",
    "ordered_axis", "prior_identity",
]  # fmt: skip

PRIOR = "prior"  # subfolder of the bundle
CONFIG, GRAPH, FREQUENCIES = f"{PRIOR}/config.json", f"{PRIOR}/prior_model.onnx", f"{PRIOR}/frequencies.npy"
LIMIT = 512  # maximum size of an alphabet of the prior
COUNTED = 1 << 16  # maximum size of an alphabet for `adaptive` and `static`
TOTAL = 1 << 20  # sum of frequencies of `static` and `learned`
INCREMENT, MOST_SEEN = 32, 1 << 22  # of `adaptive`: increment per symbol; sum above which all are halved
BLOCK = 256  # symbols per call of the prior when encoding
TOGETHER, MOST_STATE = 32, 1 << 22  # most payloads per call of the prior when decoding, and numbers of their caches
LEAST_SHARE = 32  # codes per byte, at most: bounds the work that a small file can request


def _weights() -> Numbers:
    """Return 2 ** 32 e ** (-i / 64) for i = 0, 1, ... down to 0, in integer arithmetic."""
    found = [1 << 32]
    while found[-1]:
        found.append(found[-1] * 16517109 >> 24)
    return np.array(found)


WEIGHTS = _weights()


def frequencies(weights: Numbers) -> Numbers:
    """Scale weights `(..., n)` to integer frequencies >= 1 of sum `TOTAL`; each remainder goes to the first largest."""
    count = weights.shape[-1]
    found = 1 + weights * (TOTAL - count) // weights.sum(axis=-1, keepdims=True)
    largest = weights.argmax(axis=-1)[..., None]
    rest = TOTAL - found.sum(axis=-1, keepdims=True)
    np.put_along_axis(found, largest, np.take_along_axis(found, largest, axis=-1) + rest, axis=-1)
    return np.asarray(found)


class Coding(ABC):
    """Entropy coding of the codes of a chunk.

    Args:
        codebooks: The codebooks of the codes.

    Attributes:
        name: Name of the coding.
        prior: 8 bytes that identify the prior; empty if the coding needs none.
    """

    name: ClassVar[str]
    prior: bytes = b""

    def __init__(self, codebooks: Sequence[Codebook]) -> None:
        self.codebooks = tuple(codebooks)

    @abstractmethod
    def encode(self, codes: Codes) -> bytes:
        """Encode codes `(codebooks, steps, *inner)`."""

    @abstractmethod
    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Decode codes `(codebooks, steps, *inner)`; if not `whole`, the steps that `data` determines, perhaps none.

        Raises:
            Damage: The data is no output of `encode`.
        """

    def decode_together(
        self, payloads: Sequence[bytes], steps: int, inner: Sequence[int], whole: bool
    ) -> list[Codes | Damage]:
        """Decode several payloads of codes of one shape; the result of a damaged one is its `Damage`."""
        found: list[Codes | Damage] = []
        for data in payloads:
            try:
                found.append(self.decode(data, steps, inner, whole))
            except Damage as error:
                found.append(error)
        return found


class Packed(Coding):
    """Fixed-width coding: ceil(log2(entries)) bits per code."""

    name = "packed"

    def encode(self, codes: Codes) -> bytes:
        """Encode codes `(codebooks, steps, *inner)`."""
        return Packing(self.codebooks, codes.shape[2:]).pack(codes)

    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Decode codes `(codebooks, steps, *inner)`."""
        packing = Packing(self.codebooks, inner)
        return packing.unpack(data, steps if whole else packing.steps(len(data), steps))


class _Modelled(Coding):
    """Range coding under a model of the symbols' frequencies.

    Args:
        codebooks: The codebooks of the codes.
        symbols: The symbols of all codebooks of the codec.
    """

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols) -> None:
        super().__init__(codebooks)
        self.symbols = symbols

    @abstractmethod
    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies for each symbol of a sequence; the caller sends the decoded symbol back."""

    def known_frequencies(self, structure: Structure, row: Numbers) -> Iterator[Numbers]:
        """Yield the frequencies for each symbol of a known sequence."""
        course = self.follow(structure)
        for symbol in (None, *(row - self.symbols.offsets[structure.kinds])[:-1].tolist()):
            yield course.send(symbol)

    def encode(self, codes: Codes) -> bytes:
        """Encode codes `(codebooks, steps, *inner)`."""
        num_codebooks, steps, *inner = codes.shape
        structure, row = self.symbols.structure(num_codebooks, steps, inner), self.symbols.row(codes)
        encoder = RangeEncoder()
        symbols = (row - self.symbols.offsets[structure.kinds]).tolist()
        for chances, symbol in zip(self.known_frequencies(structure, row), symbols, strict=True):
            encoder.encode(int(chances[:symbol].sum()), int(chances[symbol]), int(chances.sum()))
        return encoder.finish().ljust(_least(num_codebooks, steps, inner), b"\0")

    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Decode codes `(codebooks, steps, *inner)`."""
        structure = self.symbols.structure(len(self.codebooks), steps, inner)
        decoder, course, found = RangeDecoder(data, whole), self.follow(structure), list[int]()
        symbol: int | None = None
        try:
            for _ in structure.kinds:
                chances = course.send(symbol)
                symbol = decoder.decode(int(chances.sum()), _finder(chances))
                found.append(symbol)
        except Cut:
            pass
        return self._codes(found, structure, steps, inner)

    def draw(self, steps: int, inner: Sequence[int], chance: np.random.Generator) -> Codes:
        """Draw codes `(codebooks, steps, *inner)` from the model, symbol by symbol."""
        structure = self.symbols.structure(len(self.codebooks), steps, inner)
        course, found, symbol = self.follow(structure), list[int](), None
        for _ in structure.kinds:
            ends = course.send(symbol).cumsum()
            symbol = int(ends.searchsorted(chance.integers(ends[-1]), side="right"))
            found.append(symbol)
        # Digits may be drawn that no entry has.
        last = np.array([codebook.size - 1 for codebook in self.codebooks]).reshape(-1, *(1 for _ in (0, *inner)))
        codes: Codes = np.minimum(self._codes(found, structure, steps, inner), last)
        return codes

    def _codes(self, found: Sequence[int], structure: Structure, steps: int, inner: Sequence[int]) -> Codes:
        """Return the codes of the steps whose symbols are all found."""
        if len(found) < len(structure.kinds):
            steps = int(structure.steps[len(found) :].min())
        inside = structure.steps[: len(found)] < steps
        row = np.array(found, np.int64) + self.symbols.offsets[structure.kinds[: len(found)]]
        return self.symbols.codes(row[inside], len(self.codebooks), steps, inner)


def _finder(chances: Numbers) -> Callable[[int], tuple[int, int, int]]:
    return _find_in(chances.cumsum(), chances)


def _find_in(ends: Numbers, chances: Numbers) -> Callable[[int], tuple[int, int, int]]:
    """Return the function from a slot to its symbol, start and frequency; `ends` are the frequencies' sums."""

    def find(slot: int) -> tuple[int, int, int]:
        symbol = int(ends.searchsorted(slot, side="right"))
        return symbol, int(ends[symbol] - chances[symbol]), int(chances[symbol])

    return find


class Adaptive(_Modelled):
    """Adaptive order-0 model: counts of each alphabet's symbols so far in the chunk."""

    name = "adaptive"

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies for each symbol of a sequence."""
        seen = [np.ones(size, np.int64) for size in self.symbols.sizes]
        for kind in structure.kinds.tolist():
            symbol = yield seen[kind]
            seen[kind][symbol] += INCREMENT
            if seen[kind].sum() > MOST_SEEN:
                seen[kind] -= seen[kind] // 2


class Static(_Modelled):
    """Static order-0 model: frequencies of each alphabet's symbols in the training data.

    Args:
        codebooks: The codebooks of the codes.
        symbols: The symbols of all codebooks of the codec.
        table: Frequencies `(vocabulary,)` that sum to `TOTAL` in each alphabet.
        prior: Identity of the prior.
    """

    name = "static"

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols, table: Numbers, prior: bytes) -> None:
        super().__init__(codebooks, symbols)
        self.tables = np.split(table, symbols.offsets[1:])
        self.prior = prior

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies for each symbol of a sequence."""
        for kind in structure.kinds.tolist():
            yield self.tables[kind]


class Learned(_Modelled):
    """Autoregressive model: the bundle's prior predicts each symbol from the previous ones.

    Args:
        codebooks: The codebooks of the codes.
        symbols: The symbols of all codebooks of the codec.
        graph: The prior, an ONNX Runtime session.
        prior: Identity of the prior.
    """

    name = "learned"

    def __init__(self, codebooks: Sequence[Codebook], symbols: Symbols, graph: Any, prior: bytes) -> None:
        super().__init__(codebooks, symbols)
        self.graph = graph
        self.prior = prior

    def follow(self, structure: Structure) -> Generator[Numbers, Any, None]:
        """Yield the frequencies for each symbol, given those of earlier groups."""
        course, group = self._follow_groups(structure, 1), list[int]()
        tables = next(course)
        for part in structure.groups:
            group = []
            for table in tables:
                group.append((yield table[0]))
            if part.stop < len(structure.kinds):
                tables = course.send(np.array([group]))

    def known_frequencies(self, structure: Structure, row: Numbers) -> Iterator[Numbers]:
        """Yield the frequencies for each symbol of a known sequence, computed in blocks; equal to those of `follow`."""
        contexts, state = self.symbols.contexts(structure, row)[None], self._start(1)
        for begin in range(0, len(row), BLOCK):
            part = slice(begin, begin + BLOCK)
            logits, state = self.graph.run(None, {"contexts": contexts[:, part], "state": state})
            for table in self._frequencies(logits, structure.kinds[part]):
                yield table[0]

    def decode_together(
        self, payloads: Sequence[bytes], steps: int, inner: Sequence[int], whole: bool
    ) -> list[Codes | Damage]:
        """Decode several payloads of codes of one shape, one call of the prior for a group of each."""
        each = min(TOGETHER, max(1, MOST_STATE // math.prod(self.graph.get_inputs()[1].shape[1:])))
        return [
            one
            for begin in range(0, len(payloads), each)
            for one in self._decode_batch(payloads[begin : begin + each], steps, inner, whole)
        ]

    def _decode_batch(
        self, payloads: Sequence[bytes], steps: int, inner: Sequence[int], whole: bool
    ) -> list[Codes | Damage]:
        structure = self.symbols.structure(len(self.codebooks), steps, inner)
        decoders = [RangeDecoder(data, whole) for data in payloads]
        found = np.zeros((len(payloads), len(structure.kinds)), np.int64)
        ends: dict[int, Cut | Damage] = {}
        arrived = [len(structure.kinds)] * len(payloads)
        course = self._follow_groups(structure, len(payloads))
        tables = next(course)
        for part in structure.groups:
            for at, table in enumerate(tables, part.start):
                sums = table.cumsum(axis=1)
                for number, decoder in enumerate(decoders):
                    if number not in ends:
                        try:
                            found[number, at] = decoder.decode(TOTAL, _find_in(sums[number], table[number]))
                        except (Cut, Damage) as error:
                            ends[number], arrived[number] = error, at
            if part.stop == len(structure.kinds) or len(ends) == len(payloads):
                break
            tables = course.send(found[:, part])
        results: list[Codes | Damage] = []
        for number, count in enumerate(arrived):
            if isinstance(end := ends.get(number), Damage):
                results.append(end)
            else:
                results.append(self._codes(found[number, :count].tolist(), structure, steps, inner))
        return results

    def decode(self, data: bytes, steps: int, inner: Sequence[int], whole: bool) -> Codes:
        """Decode codes `(codebooks, steps, *inner)`."""
        (found,) = self.decode_together([data], steps, inner, whole)
        if isinstance(found, Damage):
            raise found
        return found

    def _follow_groups(self, structure: Structure, batch: int) -> Generator[list[Numbers], Numbers, None]:
        """Yield each group's frequencies, `(batch, n)` for a symbol; the caller sends its symbols `(batch, group)`."""
        known = np.zeros((batch, len(structure.kinds) + 1), np.int64)  # index -1: no source
        fixed, state = self.symbols.fixed(structure), self._start(batch)
        firsts = 1 + self.symbols.offsets[structure.kinds]
        for part in structure.groups:
            own = np.broadcast_to(fixed[part], (batch, *fixed[part].shape))
            contexts = np.concatenate([own, known[:, structure.sources[part]]], axis=2)
            logits, state = self.graph.run(None, {"contexts": contexts, "state": state})
            known[:, part] = firsts[part] + (yield self._frequencies(logits, structure.kinds[part]))

    def _start(self, batch: int) -> npt.NDArray[np.float64]:
        return np.zeros((batch, *self.graph.get_inputs()[1].shape[1:]))

    def _frequencies(self, logits: npt.NDArray[np.float64], kinds: Numbers) -> list[Numbers]:
        """Return the frequencies `(b, size of the kind)` of each of n symbols, from logits `(b, n, vocabulary)`."""
        own = [self._of_kind(logits[:, at], kind) for at, kind in enumerate(kinds.tolist())]
        if len({each.shape for each in own}) == 1:  # all at once
            return list(self._scale(np.stack(own)))
        return [self._scale(each) for each in own]

    def _of_kind(self, logits: npt.NDArray[np.float64], kind: int) -> npt.NDArray[np.float64]:
        begin = self.symbols.offsets[kind]
        return logits[:, begin : begin + self.symbols.sizes[kind]]

    @staticmethod
    def _scale(logits: npt.NDArray[np.float64]) -> Numbers:
        below = (logits.max(axis=-1, keepdims=True) - logits).astype(np.int64)
        return frequencies(WEIGHTS[np.minimum(below, len(WEIGHTS) - 1)])


CODINGS = ("packed", "adaptive", "static", "learned")
WITH_PRIOR = ("static", "learned")


def fits(name: str, codebooks: Sequence[Codebook], size: int, steps: int, inner: Sequence[int]) -> bool:
    """Return whether a payload of `size` bytes is possible for `steps` steps in this coding."""
    if name == "packed":
        return size == Packing(codebooks, inner).size(steps)
    return size >= _least(len(codebooks), steps, inner)


def _least(num_codebooks: int, steps: int, inner: Sequence[int]) -> int:
    return num_codebooks * steps * math.prod(inner) // LEAST_SHARE


def codebooks_of(bundle: Bundle) -> list[Codebook]:
    """Return a bundle's codebooks."""
    return [Codebook(*pair) for pair in zip(bundle.codebook_sizes, bundle.codebook_strides, strict=True)]


def ordered_axis(config: Mapping[str, Any]) -> int | None:
    """Return the axis of ordered tokens, not counting batch and codebooks; None for placed tokens."""
    return {"b q k": 0, "b q t k": 1}.get(config["token_layout"])


def prior_identity(folder: Path) -> bytes:
    """Return 8 bytes that identify a bundle's prior; empty if the bundle has none."""
    files = read_json(folder / "export.json").get("files") or {}
    lines = "".join(f"{name} {files[name]['sha256']}\n" for name in sorted(files) if name.startswith(f"{PRIOR}/"))
    return hashlib.sha256(lines.encode()).digest()[:8] if lines else b""


def coding_of(name: str, codebooks: Sequence[Codebook], bundle: Bundle | None = None) -> Coding:
    """Build a coding by its name.

    Args:
        name: One of `CODINGS`.
        codebooks: The codebooks of the codes.
        bundle: The bundle of the codes; None is enough for packed and adaptive coding.

    Raises:
        UserError: The coding needs a prior, and there is none.

    Example:
        >>> coding = coding_of("adaptive", [Codebook(1024)])
        >>> data = coding.encode(np.full((1, 100), 7))  # (codebooks, steps)
        >>> len(data), coding.decode(data, steps=100, inner=(), whole=True).shape
        (14, (1, 100))
    """
    if name == "packed":
        return Packed(codebooks)
    if name == "adaptive":
        return Adaptive(codebooks, Symbols(codebooks, None, COUNTED))
    if bundle is None:
        raise UserError(f"{name} coding needs the bundle's prior; pass the bundle")
    identity = prior_identity(bundle.folder)
    if not identity:
        raise UserError(
            f"{bundle.folder}: has no prior, which {name} coding needs; train one with experiment=prior/transformer"
            f" tokenizer={bundle.folder}, and use the bundle that the run exports"
        )
    ordered = ordered_axis(bundle.config)
    if name == "static":
        return Static(codebooks, Symbols(codebooks_of(bundle), ordered, COUNTED), _table(bundle), identity)
    symbols = Symbols(codebooks_of(bundle), ordered, LIMIT, _order(bundle))
    return Learned(codebooks, symbols, _graph(bundle), identity)


@lru_cache(maxsize=4)
def _order(bundle: Bundle) -> str:
    """Return the order of the symbols that a bundle's prior was trained with; those of earlier versions are serial."""
    path = bundle.folder / CONFIG
    order = read_json(path).get("order", "serial")
    if order not in ORDERS:
        raise UserError(f"{path}: order {order} is not known; update varitok")
    return str(order)


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
    """Open a prior's graph on the CPU, whose float64 is IEEE 754's.

    Args:
        path: Path of the graph.
        threads: Number of threads; decoding's single steps are too small for several.

    Raises:
        UserError: ONNX Runtime can't read the graph.
    """
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # No optimization that changes results.
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exception classes, defined in C++
        raise UserError(f"{path}: ONNX Runtime can't read it ({(str(error).splitlines() or [''])[0]})") from error


@lru_cache(maxsize=4)
def _graph(bundle: Bundle) -> Any:
    """Open a bundle's prior, and check the shapes of its state and logits."""
    path, vocabulary = bundle.folder / GRAPH, Symbols(codebooks_of(bundle), None, LIMIT).vocabulary
    graph = open_graph(path)
    ports = {port.name: port.shape for port in (*graph.get_inputs(), *graph.get_outputs())}
    state = ports.get("state", [])[1:]
    sound = all(isinstance(side, int) and 0 <= side <= 1 << 16 for side in state) and math.prod(state) <= 1 << 24
    if not sound or ports.get("logits", [None])[-1] != vocabulary:
        raise UserError(f"{path}: not a prior of this bundle's codebooks; {REEXPORT_HINT}")
    return graph
