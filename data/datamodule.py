"""From datasets to batches."""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from statistics import median
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from varitok import UserError, require_min

from .batch import BadSample, Batch, Key, Sample, SignalDataset, Splits, collate
from .datasets.cached_features import FeatureShards, open_features
from .sampler import BucketSampler, LengthSampler, UpdateBatchSampler
from .storage.captions import caption_of, require_captions
from .workers import WorkerLoader, WorkerProgress, ignore_signals, name_of

__all__ = ["BadSampleCount", "DataModule", "loader"]

_log = logging.getLogger(__name__)

Policy: TypeAlias = Literal["substitute", "skip", "fail"]

WINDOW = 1000  # samples over which the share of bad ones is taken


@dataclass(eq=False, repr=False)
class _Readable(Dataset[Sample]):
    """A dataset that survives unreadable files.

    Args:
        dataset: Indexed by `Key`; raises `BadSample`.
        policy: Replacement of a sample that can't be read.
        least: Smallest number of samples in a batch, whatever the policy; missing ones are replaced.
        kinds: Kind of each sample; a replacement has the same kind.
        features: Precomputed features of the samples, by teacher.
        captions: Whether captions are read too.
    """

    dataset: SignalDataset
    policy: Policy
    least: int = 0
    kinds: Sequence[int] | None = None
    features: Mapping[str, FeatureShards] = field(default_factory=dict)
    captions: bool = False
    workplaces: WorkerProgress = field(default_factory=WorkerProgress)

    TRIES = 16

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Read a batch."""
        samples = [self._read(key, self.policy == "substitute") for key in keys]
        for index, key in enumerate(keys):
            if sum(sample.signal is not None for sample in samples) >= self.least:
                break
            if samples[index].signal is None:
                samples[index] = self._read(key, True)
        return samples

    def _read(self, key: Key, substitute: bool) -> Sample:
        """Read a sample, or the next one that can be read.

        Raises:
            UserError: It can't be read, and the policy is to fail.
        """
        epoch, index = key
        bad: list[str] = []
        others = ((index + step) % len(self) for step in range(len(self)))
        alike = (at for at in others if self.kinds is None or self.kinds[at] == self.kinds[index])
        for at in islice(alike, self.TRIES if substitute else 1):
            self.workplaces.read(at)
            try:
                signal = self.dataset[epoch, at]
                features = {name: seen[epoch, at] for name, seen in self.features.items()}
                caption = caption_of(self.dataset.files[at]) if self.captions else None
                return Sample(signal, tuple(bad), at, features, caption)
            except BadSample as error:
                if self.policy == "fail":
                    raise UserError(f"{error} (loader.bad=substitute passes over such files)") from None
                bad.append(str(error))
        return Sample(None, tuple(bad))


class BadSampleCount:
    """Counts samples that can't be read, names each file once in the log, and ends the run if they are too many.

    A sample counts once, however many files were tried in its place.

    Args:
        max_share: Largest share of bad ones among the last 1000 samples.

    Attributes:
        seen: Samples that this process has asked for.
        total: Those of them whose own files it could not read.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.names: set[str] = set()
        self.seen = 0
        self.total = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def see(self, batch: Batch) -> None:
        """Count a batch.

        Raises:
            UserError: Too large a share of the files can't be read.
        """
        for name in batch.bad:
            if name not in self.names:
                self.names.add(name)
                _log.warning("skipped %s", name)
        self.seen += len(batch.missed)
        self.total += sum(batch.missed)
        self._recent.extend(batch.missed)
        bad = sum(self._recent)
        share = bad / max(1, len(self._recent))
        if not len(batch.signal) and share == 1:
            raise UserError(f"none of the {self.seen} files tried could be read; the first: {batch.bad[0]}")
        if bad > self.max_share * WINDOW:  # of a window that isn't full yet too: one among the first few is no reason
            raise UserError(
                f"{share:.1%} of the last {len(self._recent)} files could not be read, more than"
                f" loader.max_bad_share={self.max_share:g}; the last: {batch.bad[-1] if batch.bad else 'see the log'}"
            )

    def summary(self) -> str:
        """Report how many files were skipped."""
        times = f", {self.total} times" if self.total > len(self.names) else ""
        return f"{len(self.names)} unreadable files were skipped{times}"

    def state(self) -> dict[str, Any]:
        """Return the counts of all processes; every process must call it."""
        mine = {"names": sorted(self.names), "seen": self.seen, "total": self.total, "recent": list(self._recent)}
        states = [mine]
        if dist.is_available() and dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, mine)
        return {"processes": states}

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Restore a `state`: each process its own part."""
        for mine in state["processes"][process : process + 1]:
            self.names, self.seen, self.total = set(mine["names"]), mine["seen"], mine["total"]
            self._recent.extend(mine["recent"])


class DataModule(pl.LightningDataModule):
    """Batches for a run of a fixed number of updates, all in one of Lightning's epochs.

    Args:
        splits: Datasets to train and to evaluate on.
        batch_size: Samples of each process's batch.
        workers: Processes that read and decode; 0 reads in the main one.
        updates: Updates of the whole run.
        accumulate: Batches to an update.
        seed: Seed of the order.
        bad: What comes in the place of a file that can't be read: "substitute" the next that can, "skip" it, so that
            batches become smaller, or "fail".
        max_bad_share: Share of unreadable files that ends a run.
        overfit: Repeat the first batch.
        bucket: Relative noise of the lengths that batches are sorted by, which saves padding; 0 doesn't sort.
        budget: Size of a process's batch, padding included, so that short samples make large batches. With `bucket` it
            counts audio samples or frames, and no batch has more than `batch_size` signals; with `data.buckets` it
            counts pixels. None: all batches have `batch_size`.
        features: Shards of precomputed features of the training data (`varitok features`), by teacher.
        captions: Read the texts beside the training data's files (`captions`).

    Raises:
        UserError: A number is out of range, features are not these data's, or the data have no lengths to sort by, no
            shapes, or no captions.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        batch_size: int,
        workers: int = 2,
        updates: int,
        accumulate: int = 1,
        seed: int = 0,
        bad: Policy = "substitute",
        max_bad_share: float = 0.01,
        overfit: bool = False,
        bucket: float = 0,
        budget: int | None = None,
        features: Mapping[str, str] = MappingProxyType({}),
        captions: bool = False,
    ) -> None:
        super().__init__()
        require_min({"loader.batch_size": (batch_size, 1), "updates": (updates, 1)})
        require_min({"training.accumulate": (accumulate, 1)})
        if bad not in get_args(Policy):
            raise UserError(f"loader.bad={bad}: must be {', '.join(get_args(Policy))}")
        self.splits = splits
        self.features = {name: open_features(folder, splits.train) for name, folder in features.items()}
        self.captions = captions
        if captions:
            require_captions(splits.train.files)
        self.policy: Policy = bad
        self.batch_size = batch_size
        self.workers = workers
        self.batches = updates * accumulate
        self.accumulate = accumulate
        self.seed = seed
        self.overfit = overfit
        self.bucket = bucket
        if not 0 <= bucket < 1:
            raise UserError(f"loader.bucket={bucket}: give a share of the lengths, such as 0.05, or 0 for none")
        self.sizes = _fill_unknown(splits.train.sizes()) if bucket else []
        if bucket and not self.sizes:
            raise UserError("loader.bucket: this dataset doesn't know its lengths; give loader.bucket=0")
        self.budget = budget
        self.shapes = splits.train.shapes
        if budget is not None and not self.shapes and not bucket:
            raise UserError("loader.budget: give loader.bucket=0.05, or data.buckets (video), or loader.budget=null")
        if self.shapes and bucket:
            raise UserError("loader.bucket: data.buckets sort already; give loader.bucket=0")
        self.bad = BadSampleCount(max_bad_share)

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return the batches that the run still needs."""
        data = self.splits.train
        kinds = data.kinds() if self.shapes else [_kind(size, self.bucket) for size in self.sizes] or None
        readable = _Readable(data, self.policy, 1, kinds, self.features, self.captions)
        if self.overfit:
            first = [(0, index) for index in range(min(self.batch_size, len(readable)))]
            return loader(readable, [first] * self.batches, self.workers)
        rank, world = self._rank()
        module: Any = self.trainer.lightning_module if self.trainer else None
        done = int(module.updates) if module else 0
        form = {"batches": self.batches, "seed": self.seed, "rank": rank, "world": world}
        form["start"] = done * self.accumulate
        sampler: Sampler[list[Key]]
        if self.sizes:
            sampler = LengthSampler(self.sizes, self.batch_size, self.bucket, self.budget, **form)
        elif kinds is not None:
            volumes = [math.prod(shape) for shape in self.shapes]
            counts = [max(1, self.budget // volume) if self.budget else self.batch_size for volume in volumes]
            sampler = BucketSampler(kinds, counts, **form)
        else:
            sampler = UpdateBatchSampler(len(readable), self.batch_size, **form)
        return loader(readable, sampler, self.workers)

    def val_dataloader(self) -> DataLoader[Sample]:
        """Return this process's share of the validation set, in order; unreadable files are left out."""
        rank, world = self._rank()
        return validation_loader(self.splits.val, self.batch_size, self.workers, rank, world)

    def names(self, batch: Batch) -> list[str]:
        """Name a training batch's signals: their files, or their places in data of another kind."""
        indices = [] if batch.sample_indices is None else batch.sample_indices.tolist()
        return [name_of(self.splits.train.files, index) for index in indices]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the bad samples of a training batch."""
        self.bad.see(batch)
        return batch

    def teardown(self, stage: str) -> None:
        """Report at the end how many files were skipped."""
        if self.bad.names:
            _log.warning(self.bad.summary())


def _fill_unknown(sizes: Sequence[int]) -> list[int]:
    """Replace unknown sizes by the usual one: a replacement has about that size."""
    usual = max(1, int(median([size for size in sizes if size] or [1])))
    return [size or usual for size in sizes]


def _kind(size: int, share: float) -> int:
    """Number sizes so that those of a number differ by a share at most: one may come in the place of another."""
    return int(math.log(size) / math.log1p(share))


def loader(dataset: _Readable, batches: Any, workers: int) -> WorkerLoader:
    """Make a loader of given batches of keys; it draws nothing from the global generator."""
    dataset.workplaces.prepare(workers)
    return WorkerLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=ignore_signals,
        generator=torch.Generator().manual_seed(0),
        persistent_workers=workers > 0,
    )


def validation_loader(
    dataset: SignalDataset, batch_size: int, workers: int = 0, rank: int = 0, world: int = 1
) -> DataLoader[Sample]:
    """Make a loader of a dataset in order, once; a file that can't be read is left out of its batch."""
    keys = [(0, index) for index in range(rank, len(dataset), world)]
    batches = [keys[at : at + batch_size] for at in range(0, len(keys), batch_size)]
    return loader(_Readable(dataset, "skip"), batches, workers)
