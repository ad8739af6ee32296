"""Probes: small classifiers of a frozen codec's latents, judged by cross-validation."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import edit_distance

from varitok import UserError

__all__ = ["NOTHING", "PROBES", "Fit", "Score", "Sequences", "cross_validate", "ctc", "interval"]

NOTHING = -1  # target of a token that isn't labeled
BLANK = 0  # of CTC
WIDTH, KERNEL, EPOCHS, BATCH, RATE = 128, 5, 40, 8, 1e-3  # of the convolutional probe
RESAMPLES = 1000  # of the interval
FEWEST = 2  # least number of classes


class Sequences(NamedTuple):
    """The latents of all files and their targets.

    Attributes:
        latents: For each file float32 `(n, d)`; of a file's class `(1, d)` or `(n, d)`, whichever the probe reads.
        targets: For each file int64 `(n,)`, a class or `NOTHING` for each token; `(1,)`, the file's class; or
            characters from 1, for `ctc`.
        groups: Files of a group are tested together.
        classes: Number of classes or of characters, without the blank.
    """

    latents: Sequence[Tensor]
    targets: Sequence[Tensor]
    groups: Sequence[str]
    classes: int


class Score(NamedTuple):
    """How often a probe was right about a file: `right` of `counted`; errors, for `ctc`."""

    right: int
    counted: int


Answer: TypeAlias = Callable[[Tensor], Tensor]
"""A trained probe: returns the class of each row of latents `(n, d)`, or of the file, or characters."""

Fit: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor], int], Answer]
"""Trains a probe: latents and targets of files, and the number of classes, as in `Sequences`."""


def linear(latents: Sequence[Tensor], targets: Sequence[Tensor], classes: int) -> Answer:
    """Train a logistic regression of standardized latents, each row by itself."""
    rows, labels = torch.cat(list(latents)), torch.cat(list(targets))
    known = labels != NOTHING
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(rows[known].numpy(), labels[known].numpy())
    return lambda latents: torch.from_numpy(model.predict(latents.numpy()))


class _Convolutions(nn.Module):
    """Two convolutions along the tokens, and a linear layer; `pools` averages over the tokens before it."""

    def __init__(self, width: int, classes: int, pools: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv1d(before, WIDTH, KERNEL, padding=KERNEL // 2) for before in (width, WIDTH))
        self.out = nn.Linear(WIDTH, classes)
        self.pools = pools

    def forward(self, latents: Tensor, lengths: Tensor) -> Tensor:
        """Return logits `(b, n, classes)`, or `(b, 1, classes)`, of latents `(b, n, d)` padded with zeros."""
        there = (torch.arange(latents.shape[1]) < lengths[:, None]).unsqueeze(1)
        x = latents.transpose(1, 2)
        for layer in self.layers:
            x = functional.gelu(layer(x)) * there  # as if each sequence ended in zeros
        x = x.transpose(1, 2)
        if self.pools:
            x = (x.sum(1) / lengths[:, None]).unsqueeze(1)
        logits: Tensor = self.out(x)
        return logits


def _train(
    latents: Sequence[Tensor],
    targets: Sequence[Tensor],
    classes: int,
    pools: bool,
    loss: Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor],
) -> Callable[[Tensor], Tensor]:
    """Train convolutions with a fixed seed; return a function from latents `(n, d)` to logits."""
    rows = torch.cat(list(latents))
    mean, deviation = rows.mean(0), rows.std(0, correction=0).clamp(min=1e-6)
    random = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = _Convolutions(rows.shape[1], classes, pools)
        optimizer = torch.optim.AdamW(network.parameters(), RATE)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(latents), generator=random).split(BATCH):  # type: ignore[no-untyped-call]
                own = [(latents[index] - mean) / deviation for index in batch]
                lengths = torch.tensor([len(one) for one in own])
                logits = network(nn.utils.rnn.pad_sequence(own, batch_first=True), lengths)
                optimizer.zero_grad()
                loss(logits, lengths, [targets[index] for index in batch]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    network.eval().requires_grad_(False)

    def logits_of(one: Tensor) -> Tensor:
        logits: Tensor = network(((one - mean) / deviation)[None], torch.tensor([len(one)]))
        return logits[0]

    return logits_of


def convolutional(latents: Sequence[Tensor], targets: Sequence[Tensor], classes: int) -> Answer:
    """Train two convolutions along the tokens, then a linear layer, by cross-entropy."""

    def loss(logits: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
        padded = nn.utils.rnn.pad_sequence(list(targets), batch_first=True, padding_value=NOTHING)
        return functional.cross_entropy(logits.flatten(0, 1), padded.flatten(), ignore_index=NOTHING)

    pools = any(len(target) != len(one) for one, target in zip(latents, targets, strict=True))
    logits = _train(latents, targets, classes, pools, loss)
    return lambda one: logits(one).argmax(-1)


def ctc(latents: Sequence[Tensor], targets: Sequence[Tensor], classes: int) -> Answer:
    """Train two convolutions by connectionist temporal classification, read by the best path (Graves et al., 2006)."""

    def loss(logits: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
        counts = torch.tensor([len(target) for target in targets])
        scores = logits.log_softmax(-1).transpose(0, 1)
        return functional.ctc_loss(scores, torch.cat(list(targets)), lengths, counts, BLANK, zero_infinity=True)

    logits = _train(latents, targets, classes + 1, False, loss)

    def read(one: Tensor) -> Tensor:
        best = torch.unique_consecutive(logits(one).argmax(-1))
        written: Tensor = best[best != BLANK]
        return written

    return read


PROBES: dict[str, Fit] = {
    "linear": linear,
    "conv": convolutional,
}


def cross_validate(data: Sequences, fit: Fit, folds: int) -> list[Score]:
    """Train a probe without each fold in turn, and score it on that fold's files.

    Args:
        data: Latents and targets.
        fit: A value of `PROBES`, or `ctc`, whose scores count errors: insertions, deletions and substitutions.
        folds: Number of folds; files of a group are in one. Where files have classes, folds have equal shares of them.

    Returns:
        A score for each file.

    Raises:
        UserError: There are fewer groups than folds, or a fold's training files have one class alone.
    """
    groups = len(set(data.groups))
    if groups < folds:
        raise UserError(f"--folds {folds}: the labeled files are {groups} groups; give at most {groups}")
    scores: list[Score] = [Score(0, 0)] * len(data.latents)
    for trained, tested in _folds(data, folds):
        latents, targets = [data.latents[i] for i in trained], [data.targets[i] for i in trained]
        if fit is not ctc and len(set(torch.cat(targets).tolist()) - {NOTHING}) < FEWEST:
            raise UserError(f"--folds {folds}: a fold leaves only one class to learn from; give more files or folds")
        probe = fit(latents, targets, data.classes)
        for index in tested:
            target, answer = data.targets[index], probe(data.latents[index])
            if fit is ctc:
                scores[index] = Score(edit_distance(answer.tolist(), target.tolist()), len(target))
            else:
                known = target != NOTHING
                scores[index] = Score(int((answer == target)[known].sum()), int(known.sum()))
    return scores


def _folds(data: Sequences, folds: int) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Yield the indices of each fold's training and test files; always the same."""
    nothing = np.zeros(len(data.latents))
    if any(len(target) != 1 for target in data.targets):
        yield from GroupKFold(folds).split(nothing, nothing, data.groups)
        return
    classes = torch.cat(list(data.targets)).numpy()
    most = int(np.bincount(classes).max())
    if most < folds:
        raise UserError(f"--folds {folds}: no class has more than {most} files; give at most {most}")
    yield from StratifiedGroupKFold(folds, shuffle=True, random_state=0).split(nothing, classes, data.groups)


def interval(scores: Sequence[Score], groups: Sequence[str]) -> tuple[float, float, float]:
    """Return the share of right answers, and the bounds of its 95 % interval: a bootstrap over groups of files.

    Tokens of one file, and files of one speaker, aren't independent, so that groups are drawn.
    """
    _, of = np.unique(np.array(groups), return_inverse=True)
    right = np.bincount(of, [score.right for score in scores])
    counted = np.bincount(of, [score.counted for score in scores])
    drawn = np.random.default_rng(0).integers(0, len(right), (RESAMPLES, len(right)))
    shares = right[drawn].sum(1) / counted[drawn].sum(1).clip(1)
    low, high = np.quantile(shares, (0.025, 0.975))
    return float(right.sum() / max(1, counted.sum())), float(low), float(high)
