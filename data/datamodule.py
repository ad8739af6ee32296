"""The Lightning data module: loaders, replacement of unreadable files, batch order."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler

from varitok import UserError

from .batch import Batch, Key, Sample, SignalDataset, Splits, collate
from .datasets.cached_features import FeatureShards, open_features
from .decoding.errors import BadSample
from .permutation import Numbers
from .sampler import BucketSampler, LengthSampler, UpdateBatchSampler
from .storage.captions import caption_of, require_captions
from .storage.members import Member, read_ahead
from .workers import WorkerLoader, WorkerProgress, name_of, start_method, start_worker

__all__ = ["BadSampleCount", "DataModule", "loader"]

_log = logging.getLogger(__name__)

Policy: TypeAlias = Literal["substitute", "skip", "fail"]

WINDOW = 1000  # latest samples, over which the share of bad ones is computed


@dataclass(eq=False, repr=False)
class _Readable(Dataset[Sample]):
    """A dataset wrapper that replaces, skips or reports unreadable files.

    Args:
        dataset: Dataset whose items may raise `BadSample`.
        policy: How a sample that can't be read is handled.
        least: Minimum number of samples in a batch, whatever the policy; missing ones are replaced.
        bucket_ids: Bucket of each sample; a replacement is from the same bucket.
        features: Precomputed features of the samples, by teacher.
        captions: Whether captions are read too.
        block: Consecutive samples of a batch that are read at once, if they are members of shards.
    """

    dataset: SignalDataset
    policy: Policy
    least: int = 0
    bucket_ids: Numbers | None = None
    features: Mapping[str, FeatureShards] = field(default_factory=dict)
    captions: bool = False
    block: int = 1
    workplaces: WorkerProgress = field(default_factory=WorkerProgress)

    TRIES = 16

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return the name of a signal."""
        return name_of(self.dataset.files, index)

    def __getitems__(self, keys: Sequence[Key]) -> list[Sample]:
        """Read the samples of a batch."""
        if self.block == 1:
            return self._read_each(keys)
        files = [self.dataset.files[index] for _, index in keys]
        with read_ahead(file for file in files if isinstance(file, Member)):
            return self._read_each(keys)

    def _read_each(self, keys: Sequence[Key]) -> list[Sample]:
        samples = [self._read(key, self.policy == "substitute") for key in keys]
        for index, key in enumerate(keys):
            if sum(sample.signal is not None for sample in samples) >= self.least:
                break
            if samples[index].signal is None:
                samples[index] = self._read(key, True)
        return samples

    def _read(self, key: Key, substitute: bool) -> Sample:
        """Read a sample; if `substitute`, the next readable one of its bucket instead of an unreadable one.

        Raises:
            UserError: The sample can't be read, and the policy is "fail".
        """
        epoch, index = key
        bad: list[str] = []
        others = ((index + step) % len(self) for step in range(len(self)))
        alike = (at for at in others if self.bucket_ids is None or self.bucket_ids[at] == self.bucket_ids[index])
        for at in islice(alike, self.TRIES if substitute else 1):
            self.workplaces.read(at)
            try:
                signal = self.dataset[epoch, at]
                features = {name: seen[epoch, at] for name, seen in self.features.items()}
                caption = caption_of(self.dataset.files[at]) if self.captions else None
                return Sample(signal, tuple(bad), at, features, caption)
            except BadSample as error:
                if self.policy == "fail":
                    raise UserError(f"{error} (loader.bad=substitute replaces such files)") from None
                bad.append(str(error))
        return Sample(None, tuple(bad))


class BadSampleCount:
    """Counter of unreadable samples: logs each file once and ends the run if there are too many.

    A sample counts once, however many replacements were tried.

    Args:
        max_share: Largest share of unreadable samples among the last 1000.

    Attributes:
        seen: Samples that this process has requested.
        total: Requested samples whose own files were unreadable.
    """

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self.names: set[str] = set()
        self.seen = 0
        self.total = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)

    def add(self, batch: Batch) -> None:
        """Update the counts with a batch.

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
        if bad > self.max_share * WINDOW:  # relative to a full window: one bad file among the first few is tolerated
            raise UserError(
                f"{share:.1%} of the last {len(self._recent)} files could not be read, more than"
                f" loader.max_bad_share={self.max_share:g}; the last: {batch.bad[-1] if batch.bad else 'see the log'}"
            )

    def summary(self) -> str:
        """Return a line that says how many files were skipped."""
        times = f", {self.total} times" if self.total > len(self.names) else ""
        return f"{len(self.names)} unreadable files were skipped{times}"

    def state(self) -> dict[str, Any]:
        """Gather the counts of all ranks; a collective, which every rank must call."""
        mine = {"names": sorted(self.names), "seen": self.seen, "total": self.total, "recent": list(self._recent)}
        states = [mine]
        if dist.is_available() and dist.is_initialized():
            states = [{} for _ in range(dist.get_world_size())]
            dist.all_gather_object(states, mine)
        return {"processes": states}

    def restore(self, state: dict[str, Any], process: int, device: torch.device) -> None:
        """Restore the counts of rank `process` from a `state`."""
        for mine in state["processes"][process : process + 1]:
            self.names, self.seen, self.total = set(mine["names"]), mine["seen"], mine["total"]
            self._recent.extend(mine["recent"])


class DataModule(pl.LightningDataModule):
    """A data module for a run of a fixed number of updates, all within one Lightning epoch.

    Args:
        splits: Training and validation datasets.
        batch_size: Samples per batch and process.
        workers: Number of worker processes that read and decode; 0 reads in the main process.
        updates: Number of updates of the whole run.
        accumulate: Batches per update (gradient accumulation).
        seed: Seed of the order.
        bad: Handling of an unreadable file: "substitute" the next readable one, "skip" it, which makes the batch
            smaller, or "fail".
        max_bad_share: Share of unreadable files above which the run ends.
        overfit: Repeat the first batch.
        bucket: Length bucketing, which saves padding: relative noise on the lengths before sorting; 0 doesn't sort.
        budget: Size limit of a process's batch, padding included, so that batches of short samples are larger: in audio
            samples or frames with `bucket` (and at most `batch_size` signals), in pixels of all images or frames with
            `data.buckets`. None: all batches have `batch_size`.
        features: Shards of precomputed features of the training data (`varitok features`), by teacher.
        captions: Read the captions beside the training files (`captions`).
        block: Consecutive samples of shards that are permuted as one, and read at once: a request over a network
            brings as many. It divides `batch_size`; 1 shuffles each by itself.

    Raises:
        UserError: Features belong to another dataset, or the dataset lacks the lengths,
            shapes or captions that are required.
    """

    def __init__(
        self,
        splits: Splits,
        *,
        batch_size: int,
        workers: Annotated[int, "[0, 1000]", "0 reads in the main process"] = 2,
        updates: int,
        accumulate: int = 1,
        seed: Annotated[int, "[0, inf)"] = 0,
        bad: Policy = "substitute",
        max_bad_share: Annotated[float, "[0, 1]"] = 0.01,
        overfit: bool = False,
        bucket: Annotated[float, "[0, 1)", "0 doesn't sort"] = 0,
        budget: Annotated[int | None, "[1, inf)", "null is unlimited"] = None,
        features: Mapping[str, str] = MappingProxyType({}),
        captions: bool = False,
        block: Annotated[int, "[1, inf)"] = 1,
    ) -> None:
        super().__init__()
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
        self.sizes = _fill_unknown(splits.train.sizes()) if bucket else None
        if self.sizes is not None and not len(self.sizes):
            raise UserError("loader.bucket: the lengths of this dataset are unknown; set loader.bucket=0")
        self.budget = budget
        self.shapes = splits.train.shapes
        if budget is not None and not self.shapes and not bucket:
            raise UserError(
                "loader.budget: give loader.bucket=0.05, or data.buckets (images, video), or loader.budget=null"
            )
        if self.shapes and bucket:
            raise UserError("loader.bucket: data.buckets already groups signals; set loader.bucket=0")
        self.block = block
        if block > 1:
            self._check_block()
        self.bad = BadSampleCount(max_bad_share)
        self._validation: dict[int | None, WorkerLoader] = {}  # by limit

    def _check_block(self) -> None:
        files = self.splits.train.files
        if not files or not isinstance(files[0], Member):
            raise UserError(
                "loader.block: only shards are read in blocks; pack the files (varitok shards FOLDER --out SHARDS), or"
                " set loader.block=1"
            )
        if self.bucket or self.shapes:
            raise UserError("loader.block: batches of similar signals are read from all over; set loader.block=1")
        if self.batch_size % self.block:
            raise UserError(f"loader.block={self.block}: must divide loader.batch_size={self.batch_size}")

    def _rank(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def train_dataloader(self) -> DataLoader[Sample]:
        """Return a loader of the remaining batches of the run."""
        data = self.splits.train
        bucket_ids = data.bucket_ids() if self.shapes else None
        for kind in set(range(len(self.shapes))).difference(() if bucket_ids is None else np.unique(bucket_ids)):
            _log.warning("data.buckets: no file is closest to the shape %s; no batch has it", list(self.shapes[kind]))
        kinds = bucket_ids
        if self.sizes is not None:
            # Lengths in a bucket differ by at most `bucket`.
            bucket_ids = (np.log(self.sizes) / math.log1p(self.bucket)).astype(np.int32)
        readable = _Readable(data, self.policy, 1, bucket_ids, self.features, self.captions, self.block)
        if self.overfit:
            alike = range(len(readable)) if kinds is None else np.flatnonzero(kinds == kinds[0]).tolist()
            first = [(0, index) for index in alike[: self.batch_size]]
            return loader(readable, [first] * self.batches, self.workers)
        rank, world = self._rank()
        module: Any = self.trainer.lightning_module if self.trainer else None
        done = int(module.updates) if module else 0
        form = {"batches": self.batches, "seed": self.seed, "rank": rank, "world": world}
        form["start"] = done * self.accumulate
        sampler: Sampler[list[Key]]
        if self.sizes is not None:
            sampler = LengthSampler(self.sizes, self.batch_size, self.bucket, self.budget, **form)
        elif bucket_ids is not None:
            volumes = [math.prod(shape) for shape in self.shapes]
            counts = [max(1, self.budget // volume) if self.budget else self.batch_size for volume in volumes]
            sampler = BucketSampler(bucket_ids, counts, **form)
        else:
            sampler = UpdateBatchSampler(len(readable), self.batch_size, self.block, **form)
        return loader(readable, sampler, self.workers)

    def val_dataloader(self, limit: int | None = None) -> DataLoader[Sample]:
        """Return the loader of this rank's part of the validation split, in order; unreadable files are skipped.

        It is the same for the whole run, and so are its workers.

        Args:
            limit: Number of signals of all ranks, evenly spaced in the split; all if None.
        """
        if limit not in self._validation:
            rank, world = self._rank()
            self._validation[limit] = validation_loader(
                self.splits.val, self.batch_size, self.workers, rank, world, limit
            )
        return self._validation[limit]

    def names(self, batch: Batch) -> list[str]:
        """Return the names of a training batch's signals: their files, or their indices if the dataset has no files."""
        indices = [] if batch.sample_indices is None else batch.sample_indices.tolist()
        return [name_of(self.splits.train.files, index) for index in indices]

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Count the unreadable samples of a batch."""
        self.bad.add(batch)
        return batch

    def teardown(self, stage: str) -> None:
        """Log how many files were skipped."""
        if self.bad.names:
            _log.warning(self.bad.summary())


def _fill_unknown(sizes: Numbers) -> Numbers:
    """Replace unknown lengths (0) by the median, the expected length of a replacement."""
    sizes = np.asarray(sizes)
    known = sizes[sizes > 0]
    return np.where(sizes > 0, sizes, max(1, int(np.median(known))) if len(known) else 1)


def loader(dataset: Any, batches: Any, workers: int, stack: Callable[[Any], Any] = collate) -> WorkerLoader:
    """Build a loader of given batches of keys; it doesn't advance the global random generator.

    Args:
        dataset: See `WorkerLoader`; its `__getitems__` returns the samples of a batch.
        batches: Keys of each batch.
        workers: Number of processes; 0 reads in this one.
        stack: Function that makes a batch of the samples.
    """
    dataset.workplaces.prepare(workers)
    return WorkerLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=stack,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
        persistent_workers=workers > 0,
        multiprocessing_context=start_method(dataset) if workers else None,
    )


def validation_loader(
    dataset: SignalDataset,
    batch_size: int,
    workers: int = 0,
    rank: int = 0,
    world: int = 1,
    limit: int | None = None,
) -> WorkerLoader:
    """Build a loader of one pass over a dataset, in order; an unreadable file is left out of its batch."""
    total = len(dataset)
    count = total if limit is None else min(limit, total)
    batches = _InOrder(range(rank, count, world), batch_size, count, total)
    return loader(_Readable(dataset, "skip"), batches, workers)


@dataclass(frozen=True)
class _InOrder:
    """Batches of the keys of samples, in order: those at some places of `count`, evenly spaced in `total`."""

    places: range
    batch_size: int
    count: int
    total: int

    def __len__(self) -> int:
        return math.ceil(len(self.places) / self.batch_size)

    def __iter__(self) -> Iterator[list[Key]]:
        for at in range(0, len(self.places), self.batch_size):
            yield [(0, place * self.total // self.count) for place in self.places[at : at + self.batch_size]]
