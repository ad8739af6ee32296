"""What a probe reads: the latents that the codes of a bundle stand for, at each length."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from varitok import UserError, progress
from varitok.codecs.lengths.distributions import ladder

from ..adapters.corpus import encode_files
from ..exporters.rebuild import rebuild
from ..runtime.bundle import Bundle
from .labels import Kind, Labeled
from .probes import NOTHING

__all__ = ["Coded", "Target", "encode", "latents_of", "mutual_information", "rungs", "targets_of"]


class Coded(NamedTuple):
    """The files that could be encoded, with their codes.

    Attributes:
        files: The files.
        codes: For each file int64 `(codebooks, *grid)`.
        bad: "path: reason" of each file that couldn't be read.
    """

    files: list[Labeled]
    codes: list[Tensor]
    bad: list[str]


class Target(NamedTuple):
    """What probes learn: see `Sequences`. `names` are the classes or characters."""

    names: list[str]
    values: list[Tensor]


def encode(bundle: Bundle, files: Sequence[Labeled], workers: int) -> Coded:
    """Encode labeled files as `varitok tokenize` does."""
    batches = [[index] for index in range(len(files))]
    found = encode_files(bundle, [one.file for one in files], batches, workers=workers)
    coded = Coded([], [], [])
    for one, file in zip(files, progress(found, len(files), "files"), strict=True):
        if file.codes is None:
            coded.bad.append(file.bad)
            continue
        coded.files.append(one)
        coded.codes.append(torch.from_numpy(file.codes))
    return coded


def rungs(bundle: Bundle) -> list[int]:
    """Return the lengths that are probed, of the evaluation's ladder: numbers of tokens or of codebooks."""
    if bundle.tokens:
        return ladder(bundle.tokens)
    return ladder(len(bundle.codebook_sizes), bundle.codebook_layers)


def latents_of(bundle: Bundle, codes: Sequence[Tensor], pools: bool) -> Callable[[int], Iterator[Tensor]]:
    """Return a function from a length to each file's latents `(n, d)`, those that the decoder would be given.

    Args:
        bundle: The bundle; its weights are read from model.safetensors.
        codes: Codes of files, `(codebooks, *grid)`.
        pools: Return `(1, d)`: the values of all ordered tokens side by side, averaged over blocks; or means and
            standard deviations over a grid.
    """
    frozen = rebuild(bundle.folder)
    ordered = bundle.tokens > 0

    def cut(keep: int) -> Iterator[Tensor]:
        for one in codes:
            kept = one[None, ..., :keep] if ordered else one[None, :keep]
            with torch.no_grad():
                vectors: Tensor = frozen.bottleneck.decode(frozen.layout.flatten(kept))  # type: ignore[operator]
            if not pools:
                yield vectors.flatten(0, 1)
            elif ordered:
                yield vectors.flatten(1).mean(0, keepdim=True)
            else:
                yield torch.cat([vectors.mean(1), vectors.std(1, correction=0)], 1)

    return cut


def targets_of(kind: Kind, bundle: Bundle, coded: Coded) -> Target:
    """Return what a probe learns of each file.

    A token's class is that of the span around its middle. Tokens outside of all spans have none.

    Raises:
        UserError: Spans or transcripts of anything but sounds with tokens in time; spans that end before the first
            token's middle.
    """
    if kind == "class":
        names = sorted({one.label for one in coded.files})
        return Target(names, [torch.tensor([names.index(one.label)]) for one in coded.files])
    rate = bundle.sample_rate
    if rate is None or bundle.tokens:
        raise UserError(f"--labels: spans and transcripts are of sounds; {bundle.folder} has tokens without a time")
    if kind == "text":
        names = sorted({letter for one in coded.files for letter in one.text})
        return Target(names, [torch.tensor([1 + names.index(letter) for letter in one.text]) for one in coded.files])
    names = sorted({span.label for one in coded.files for span in one.spans if span.label})
    values = []
    for one, codes in zip(coded.files, coded.codes, strict=True):
        middles = (torch.arange(codes.shape[-1]) + 0.5) * bundle.hops[0] / rate
        target = torch.full((codes.shape[-1],), NOTHING)
        for span in one.spans:
            if span.label:
                target[(middles >= span.start) & (middles < span.end)] = names.index(span.label)
        values.append(target)
    if not any((target != NOTHING).any() for target in values):
        raise UserError("--labels: no token's middle is within a span; are start and end in seconds?")
    return Target(names, values)


def mutual_information(codes: Sequence[Tensor], targets: Sequence[Tensor], codebook: int) -> float:
    """Return the share of the classes' entropy that the codes of one codebook remove: `I(class; code) / H(class)`.

    It is the "phone-normalized mutual information" of HuBERT (arXiv 2106.07447, section IV-D) if classes are phones.
    With few tokens for a large codebook it is biased upwards.
    """
    known = torch.cat(list(targets)) != NOTHING
    labels = torch.cat(list(targets))[known]
    found = torch.cat([one[codebook].flatten() for one in codes])[known]
    pairs = torch.stack([labels, found])
    joint, single, own = (
        _entropy(torch.unique(part, dim=-1, return_counts=True)[1]) for part in (pairs, found, labels)
    )
    return (own + single - joint) / own if own > 0 else math.nan


def _entropy(counts: Tensor) -> float:
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log()).sum())
