"""A prior of a bundle's codes: the source of its training data, and its export into the bundle."""

import json
import logging
import math
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor

from varitok import UserError
from varitok.codecs.masking import prefix_mask
from varitok.codecs.networks.code_prior import LOGIT_STEPS, Prior
from varitok.codecs.training.prior import PriorTraining, Rows

from ..bitstream import entropy_coding
from ..bitstream.entropy_coding import COUNTED, LIMIT, PRIOR, codebooks_of
from ..bitstream.packing import Packing
from ..bitstream.symbols import ORDERS, Symbols
from ..runtime.bundle import Bundle
from ..runtime.load import load
from .bundle_folder import add, replace_folder, write_json
from .onnx import export_graph
from .parity import ParityError
from .rebuild import rebuild
from .weights import pack_graphs

__all__ = ["ExportPrior", "SymbolRows", "Tokenizer", "export_prior"]

_log = logging.getLogger(__name__)


class Tokenizer:
    """A bundle's frozen codec, which encodes the training data of a prior (`varitok.codecs.training.prior.Source`).

    Args:
        folder: Folder of the bundle.
        order: Order of the prior's symbols, one of `varitok.export.bitstream.symbols.ORDERS`.

    Raises:
        UserError: The order is unknown, there is no bundle, or its codes are continuous.
    """

    def __init__(self, folder: str, order: str = "serial") -> None:
        if order not in ORDERS:
            raise UserError(f"prior.source.order={order}: must be {' or '.join(ORDERS)}")
        bundle = load(folder)
        if not isinstance(bundle, Bundle) or not bundle.codebook_sizes:
            raise UserError(f"{folder}: its codes are continuous, or those of one clip; a prior needs codebooks")
        self.bundle = bundle
        self.codec = rebuild(folder)
        codebooks, ordered = codebooks_of(bundle), entropy_coding.ordered_axis(bundle.config)
        self.symbols, self.alphabets = Symbols(codebooks, ordered, LIMIT, order), Symbols(codebooks, ordered, COUNTED)
        self.axis = "tokens" if bundle.tokens else "codebooks"
        self.most = bundle.tokens or len(codebooks)
        self.sizes, self.counted = self.symbols.sizes.tolist(), self.alphabets.sizes.tolist()
        self.places = bundle.tokens or 1
        self.sources = 1 + bundle.axes
        self.device = torch.device("cpu")
        self._symbol_rows = lru_cache(64)(SymbolRows)

    def rows(self, signal: Tensor, lengths: Tensor | None, kept: int | None = None) -> Rows:
        """Encode signals `(b, c, *grid)`; return the rows of the first `kept` tokens or codebooks, all if None.

        Without `lengths` nothing is read from the device.
        """
        if signal.device != self.device:
            self.device = signal.device
            self.codec.to(self.device)
        codes: Tensor = self.codec.encode(signal)
        codes = codes[..., :kept] if self.bundle.tokens else codes[:, :kept]
        _, num_codebooks, steps, *inner = codes.shape
        shape = num_codebooks, steps, tuple(inner), codes.device
        symbols, alphabets = (self._symbol_rows(each, *shape) for each in (self.symbols, self.alphabets))
        ends = np.full(len(codes), signal.shape[2]) if lengths is None else lengths.cpu().numpy()
        begun = self.bundle.steps_of(ends, steps).tolist()
        packing = Packing(self.symbols.codebooks[:num_codebooks], inner)
        row, entries, valid = symbols.row(codes), alphabets.row(codes), None
        if lengths is not None:
            begins = prefix_mask(torch.tensor(begun, device=codes.device), steps)
            valid, entries = begins[:, symbols.steps], entries[begins[:, alphabets.steps]]
        return Rows(symbols.contexts(row), row, valid, entries.flatten(), sum(packing.bits(whole) for whole in begun))


class SymbolRows:
    """The symbol sequences of a batch of codes of one shape, as `Symbols` makes them of one code, on a device.

    Args:
        symbols: Digits of the codebooks.
        num_codebooks: Number of codebooks.
        steps: Number of steps.
        inner: Sizes of the other axes.
        device: Device of the codes.
    """

    def __init__(
        self, symbols: Symbols, num_codebooks: int, steps: int, inner: tuple[int, ...], device: torch.device
    ) -> None:
        structure = symbols.structure(num_codebooks, steps, inner)
        digits = [
            (codebook, math.prod(radices[place + 1 :]), radix)
            for codebook, radices in enumerate(symbols.radices[:num_codebooks])
            for place, radix in enumerate(radices)
        ]
        self.codebooks, divisors, radices = torch.tensor(digits, device=device).T
        self.divisors, self.radices = (each.view(-1, 1, *(1 for _ in inner)) for each in (divisors, radices))
        self.offsets = torch.from_numpy(symbols.offsets[: len(digits)]).to(device)
        self.fixed = torch.from_numpy(symbols.fixed(structure)).to(device)
        self.steps, self.sources, self.places = (
            torch.from_numpy(numbers).to(device) for numbers in (structure.steps, structure.sources, structure.places)
        )

    def row(self, codes: Tensor) -> Tensor:
        """Convert codes `(b, codebooks, steps, *inner)` to symbols of the vocabulary, `(b, m)`."""
        digits = codes[:, self.codebooks] // self.divisors % self.radices
        # (b, kinds, steps, *inner) -> (b, steps * inner * kinds)
        symbols: Tensor = (digits.movedim(1, -1) + self.offsets).flatten(1)[:, self.places]
        return symbols

    def contexts(self, row: Tensor) -> Tensor:
        """Return the prior's input for the symbols `(b, m)`, as `Symbols.contexts` does for one sequence."""
        known = torch.cat([row + 1, row.new_zeros(len(row), 1)], dim=1)  # index -1: no source
        return torch.cat([self.fixed.expand(len(row), -1, -1), known[:, self.sources]], dim=2)


def export_prior(prior: Prior, counts: Tensor, tokenizer: Path, folder: Path) -> None:
    """Copy a bundle and add a prior of its codes, which is reloaded and compared with the original first.

    Args:
        prior: The prior over the bundle's codes.
        counts: Number of occurrences of each entry, codebook after codebook, int64 `(entries,)`.
        tokenizer: Folder of the bundle.
        folder: Folder of the copy; may be the same.

    Raises:
        ParityError: ONNX Runtime's logits differ from the prior's in any bit.
        UserError: The folder can't be written.
    """
    bundle = load(tokenizer)
    assert isinstance(bundle, Bundle)
    exact, counted = prior.exact(), Symbols(codebooks_of(bundle), None, COUNTED)
    with replace_folder(folder) as partial:
        shutil.copytree(tokenizer, partial, dirs_exist_ok=True)
        shutil.rmtree(partial / PRIOR, ignore_errors=True)
        (partial / PRIOR).mkdir()
        tables = [entropy_coding.frequencies(part + 1) for part in np.split(counts.cpu().numpy(), counted.offsets[1:])]
        np.save(partial / entropy_coding.FREQUENCIES, np.concatenate(tables).astype(np.uint32))
        about = {"sizes": prior.sizes, "window": prior.window, "logit_steps": LOGIT_STEPS, "order": prior.order}
        write_json(partial / entropy_coding.CONFIG, about)
        chance = torch.Generator().manual_seed(0)
        contexts, state = _example(exact, 2, 5, chance), torch.zeros(2, *exact.state_shape, dtype=torch.float64)
        sides: list[str | None] = [None] * len(exact.state_shape)
        export_graph(
            exact,
            [contexts, state],
            partial / entropy_coding.GRAPH,
            [("contexts", ["batch", "places", None]), ("state", ["batch", *sides])],
            [("logits", ["batch", "places", None]), ("state_out", ["batch", *sides])],
            {"codec.role": "prior", "codec.prior": json.dumps(about)},
        )
        pack_graphs(partial / PRIOR)
        _check(exact, partial / entropy_coding.GRAPH, chance)
        add(partial, PRIOR)


class ExportPrior(pl.Callback):
    """A callback that exports the prior, averaged if the run averages weights, and its bundle at the end of a run."""

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Export on rank 0."""
        assert isinstance(pl_module, PriorTraining) and isinstance(pl_module.source, Tokenizer)
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / "bundle"
        export_prior(pl_module.evaluated, pl_module.counts, pl_module.source.bundle.folder, folder)
        _log.info("bundle: %s", folder)


def _example(prior: Prior, batch: int, count: int, chance: torch.Generator) -> Tensor:
    """Draw random contexts `(batch, count, 2 + sources)`."""
    tops = [
        len(prior.sizes),
        prior.place.num_embeddings,
        *([4] if prior.delayed else []),
        *(1 + sum(prior.sizes) for _ in prior.sources),
    ]
    return torch.stack([torch.randint(0, top, (batch, count), generator=chance) for top in tops], dim=-1)


def _check(prior: Prior, path: Path, chance: torch.Generator) -> None:
    """Compare the graph's logits with the prior's, one symbol at a time and several, with one thread and with two.

    Raises:
        ParityError: The logits differ in any bit.
    """
    contexts = _example(prior, 1, 2 * prior.window + 3, chance)
    start = torch.zeros(1, *prior.state_shape, dtype=torch.float64)
    with torch.inference_mode():
        expected = prior(contexts, start)[0].numpy()
    for threads, each in ((1, 1), (2, contexts.shape[1]), (2, 7)):
        session, state, found = entropy_coding.open_graph(path, threads), start.numpy(), []
        for part in torch.split(contexts, each, dim=1):
            logits, state = session.run(None, {"contexts": part.numpy(), "state": state})
            found.append(logits)
        if not np.array_equal(np.concatenate(found, axis=1), expected):
            raise ParityError(f"{path.name}: its logits differ from the prior's; every bit must be equal")
