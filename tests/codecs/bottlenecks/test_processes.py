"""Every bottleneck on two processes learns what it learns on one with the whole batch.

Two gloo processes, this one and another, go through all cases once; each step is a forward, a backward through
DistributedDataParallel, a step of SGD and the bottleneck's `update`. Buffers are not broadcast in each forward, as
that would hide a codebook that goes its own way.
"""

import contextlib
import datetime
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from varitok.codecs import bottlenecks
from varitok.codecs.bottlenecks import (
    binary,
    bins,
    continuous,
    contract,
    entropy,
    factorized,
    fsq,
    hierarchy,
    library,
    multirate,
    product,
    residual,
    vq,
)
from varitok.codecs.bottlenecks import shared as shared_index
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.statistics import MovingCodebook
from varitok.codecs.masking import masked_mean, prefix_mask

from ...processes import in_two

STEPS, BATCH, TOKENS, WIDTH, ENTRIES = 18, 6, 8, 5, 12
# Steps at which the first, the second or neither of the processes has anything valid. The second has nothing at the
# first step, which is that of k-means.
NOTHING = {0: [1], 7: [0], 11: [0, 1], 12: [1], 16: [0, 1]}
SAVED = 12
CALLS: list[str] = []  # collectives by way of `torch.distributed`, which DDP's own are not

EMA = partial(vq.EMAVectorQuantizer, decay=0.9)
PLAIN = partial(EMA, revival=0.0, kmeans_init=False)
MOVED = {"dim": 4, "codebook_size": ENTRIES, "decay": 0.9}
CASES: dict[str, Callable[[], Bottleneck]] = {
    "ema": lambda: PLAIN(4, ENTRIES),
    "ema_kmeans": lambda: EMA(4, ENTRIES, revival=0.0),
    "ema_cosine": lambda: EMA(4, ENTRIES, cosine=True, revival=0.0),
    "ema_revival": lambda: EMA(4, ENTRIES, revival=0.5, kmeans_init=False),
    "ema_cosine_revival": lambda: EMA(4, ENTRIES, cosine=True, revival=0.5, entropy=0.1, temperature=0.1),
    "kmeans": lambda: vq.KMeansQuantizer(4, ENTRIES),
    "rvq": lambda: residual.residual(lambda: EMA(4, ENTRIES, revival=0.3), 3),
    "rvq_plain": lambda: residual.residual(lambda: PLAIN(4, ENTRIES), 2),
    "rvq_shared": lambda: residual.residual(lambda: EMA(4, ENTRIES, revival=0.3), 3, shared=True),
    "rvq_masked": lambda: residual.masked_channels(partial(EMA, codebook_size=ENTRIES), 4, 2, 3),
    "rvq_split": lambda: residual.Split(EMA(3, ENTRIES), residual.residual(lambda: EMA(2, ENTRIES), 2), 4),
    "rvq_multirate": lambda: multirate.multirate(partial(EMA, 4, ENTRIES, revival=0.3), [2, 1]),
    "rvq_hierarchy": lambda: hierarchy.hierarchy(partial(EMA, 2, ENTRIES, revival=0.3), [1, 2]),
    "uniform_bins": lambda: bins.UniformBins(4, 5),
    "product_rvq": lambda: product.grouped(lambda: residual.residual(lambda: EMA(2, ENTRIES), 2), 2, disentangle=0.1),
    "vq": lambda: vq.VectorQuantizer(4, ENTRIES),
    "vq_entropy": lambda: vq.VectorQuantizer(4, ENTRIES, cosine=True, rotation=True, entropy=0.5, temperature=0.1),
    "sim_vq": lambda: vq.SimVectorQuantizer(4, ENTRIES),
    "ibq": lambda: vq.IndexVectorQuantizer(4, ENTRIES, entropy=0.5),
    "mixture": lambda: vq.MixtureVectorQuantizer(4, ENTRIES),
    "rvq_mixture": lambda: residual.residual(lambda: vq.MixtureVectorQuantizer(4, ENTRIES), 2),
    "factorized": lambda: factorized.FactorizedResidualQuantizer(4, 3, ENTRIES, width=2),
    "token_flow": lambda: shared_index.SharedIndexQuantizer(2, 2, ENTRIES),
    "fsq": lambda: fsq.FiniteScalarQuantizer([3, 4, 5, 3], entropy=0.5, temperature=0.1, entropy_group=2),
    "fsq_residual": lambda: fsq.ResidualScalarQuantizer([3, 4, 5, 3], 2),
    "product_fsq": lambda: product.grouped(lambda: fsq.FiniteScalarQuantizer([3, 4], entropy=0.5, temperature=0.1), 2),
    "fsq_dithered": lambda: fsq.DitheredScalarQuantizer([5, 5, 5, 5]),
    "lfq": lambda: binary.LookupFreeQuantizer(4, entropy=0.5, temperature=1.0),
    "bsq": lambda: binary.BinarySphericalQuantizer(4, entropy=0.5, entropy_group=2),
    "bernoulli": lambda: product.grouped(lambda: binary.BernoulliQuantizer(2, anneal=40), 2),
    "kl": lambda: continuous.KLBottleneck(4, weight=0.1),
    "autoencoder": lambda: continuous.Autoencoder(4, "tanh"),
    "token_bridge": lambda: bins.DimensionBins(continuous.KLBottleneck(4), 6),
    "ema_library": partial(library.library, "VectorQuantize", MOVED | {"threshold_ema_dead_code": 1}),
    "rvq_library": partial(
        library.library, "GroupedResidualVQ", MOVED | {"groups": 2, "num_quantizers": 2, "kmeans_init": True}
    ),
}
NOISY = {"bernoulli", "fsq_dithered", "kl"}  # draws differ between processes; only penalties are compared
MOVING = [name for name in CASES if name.startswith(("ema", "rvq", "product_rvq", "kmeans")) and "mixture" not in name]
UPDATED = [*MOVING, "bernoulli"]
RESUMED = ["ema", "ema_library", "ema_kmeans", "ema_cosine_revival", "kmeans", "rvq_shared", "product_rvq", "bernoulli"]
REVIVED = ["ema_revival", "ema_cosine_revival", "rvq", "rvq_shared"]
ACCUMULATED = ["ema", "rvq_plain"]
# Both processes have something for k-means; or neither has at first, and then only the first.
STARTS = [(name, start) for name in ("ema_kmeans", "ema_cosine", "kmeans", "rvq_split") for start in (1, 11)]
ENTROPIC = ["ema_cosine_revival", "vq_entropy", "ibq", "fsq", "product_fsq", "lfq", "bsq"]


def _steps(name: str) -> range:
    return range(STEPS if name in UPDATED else 9)


Results = dict[str, dict[str, Any]]


class _Model(nn.Module):
    """A linear encoder, so that there are parameters before every bottleneck, and a loss."""

    def __init__(self, name: str, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.bottleneck = CASES[name]()
        self.linear = nn.Linear(WIDTH, self.bottleneck.dim)
        self.weight = 0.0 if name in NOISY else 1.0
        if name == "token_bridge":  # nothing of it is trained
            self.bottleneck.requires_grad_(False)

    def forward(self, batch: "_Batch") -> Tensor:
        codebooks = len(self.bottleneck.codebook_sizes) or 1
        latents, _, penalties, _ = self.bottleneck(
            self.linear(batch.inputs), batch.lengths, 1 + batch.depth % codebooks
        )
        error = (latents * batch.wanted[..., : latents.shape[-1]]).mean(-1)
        error = masked_mean(error, prefix_mask(batch.lengths, TOKENS))
        return sum(penalties.values(), start=self.weight * error)


class _Batch(NamedTuple):
    inputs: Tensor
    lengths: Tensor
    depth: Tensor
    wanted: Tensor

    def part(self, of: slice) -> "_Batch":
        inputs = self.inputs[of].detach().clone().requires_grad_()
        return _Batch(inputs, self.lengths[of], self.depth[of], self.wanted[of])


def _batch(step: int, junk: float, nothing: bool = True) -> _Batch:
    """Make the global batch of a step, the first process's half first, with `junk` in the padding."""
    random = torch.Generator().manual_seed(step)
    inputs = torch.randn(BATCH, TOKENS, WIDTH, generator=random)
    # Clusters of unequal size, which some entries never meet.
    inputs = 0.1 * inputs + 2 * torch.randint(0, 2, (BATCH, TOKENS, WIDTH), generator=random).float() - 1
    lengths = torch.randint(1, TOKENS + 1, (BATCH,), generator=random)
    for rank in NOTHING.get(step, []) if nothing else []:
        lengths[rank * BATCH // 2 : (rank + 1) * BATCH // 2] = 0
    inputs = torch.where(prefix_mask(lengths, TOKENS)[..., None], inputs, junk)
    depth = torch.randint(0, 12, (BATCH,), generator=random)
    return _Batch(inputs, lengths, depth, torch.randn(BATCH, TOKENS, WIDTH, generator=random))


def _counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        CALLS.append(name)
        return call(*args)

    return counted


class _Run:
    """Trains one case, on this process's share of the batch or on all of it."""

    def __init__(self, name: str, rank: int | None, seed: int = 0, broadcast: bool = False) -> None:
        self.model = _Model(name, seed)
        self.module: nn.Module = self.model
        if rank is not None:
            self.module = DistributedDataParallel(self.model, broadcast_buffers=broadcast)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.02)
        self.share = slice(None) if rank is None else slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        self.junk = -3.0 if rank is None else 99.0  # which must not matter
        self.results: dict[str, Any] = {name: [] for name in ("forwards", "updates", "losses", "gradients", "inputs")}

    def backward(self, batch: _Batch, accumulate: int = 1) -> None:
        batch = batch.part(self.share)
        CALLS.clear()
        loss = self.module(batch)
        self.results["forwards"].append(CALLS.copy())
        (loss / accumulate).backward()
        self.results["losses"].append(loss.detach())
        assert batch.inputs.grad is not None
        self.results["inputs"].append(batch.inputs.grad)

    def step(self) -> None:
        gradients = [parameter.grad.flatten() for parameter in self.model.parameters() if parameter.grad is not None]
        self.results["gradients"].append(torch.cat(gradients))
        self.optimizer.step()
        self.model.zero_grad()
        CALLS.clear()
        self.model.bottleneck.update()
        self.results["updates"].append(CALLS.copy())

    def train(self, steps: range, between: Callable[[_Batch], None] = lambda batch: None) -> "_Run":
        """Train, with a call `between` the forward and the update of each step."""
        for step in steps:
            if step == SAVED:
                self.saved = self.state
            self.backward(_batch(step, self.junk))
            between(_batch(step + 1000, self.junk).part(self.share))
            self.step()
        self.results["state"] = self.state
        return self

    def accumulate(self, steps: int, at_once: bool = False) -> "_Run":
        """Train with two batches to an update, or with one of twice the size."""
        for step in range(steps):
            first, second = (_batch(2 * step + turn, self.junk, nothing=False) for turn in range(2))
            if at_once:
                self.backward(_Batch(*(torch.cat(parts) for parts in zip(first, second, strict=True))))
            else:
                waiting = isinstance(self.module, DistributedDataParallel)
                with self.module.no_sync() if waiting else contextlib.nullcontext():  # type: ignore[operator]
                    self.backward(first, 2)
                self.backward(second, 2)
            self.step()
        self.results["state"] = self.state
        return self

    @property
    def state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.model.state_dict().items()}


def _cut(values: Tensor) -> Tensor:
    """Average as `all_reduce` alone would: each process's gradient stops at its own share."""
    averaged = values.clone() / 2
    dist.all_reduce(averaged.detach())  # shares its memory
    return averaged


def _all_results(rank: int) -> Results:
    """Go through everything that takes two processes."""
    everything: Results = {}
    for name in CASES:
        run = _Run(name, rank).train(_steps(name))
        everything[name] = run.results
        run.model.eval()
        CALLS.clear()
        with torch.no_grad():
            run.model(_batch(0, 99.0))
        everything[name]["evaluation"] = CALLS.copy()
        if name in RESUMED:  # from a different beginning
            resumed = _Run(name, rank, seed=1)
            resumed.model.load_state_dict(run.saved)
            everything[f"{name} resumed"] = resumed.train(range(SAVED, STEPS)).results
    for name in ACCUMULATED:
        everything[f"{name} accumulated"] = _Run(name, rank, broadcast=True).accumulate(10).results
    for name, start in STARTS:
        everything[f"{name} from {start}"] = _Run(name, rank).train(range(start, start + 6)).results
    for name in ("ema", "rvq", "vq_entropy"):
        everything[f"{name} begun apart"] = _Run(name, rank, seed=rank, broadcast=True).train(range(10)).results
    for name in ENTROPIC:
        with mock.patch.object(entropy, "differentiable_mean_over_ranks", _cut):
            everything[f"{name} cut"] = _Run(name, rank).train(range(2)).results
    with mock.patch.object(contract, "sum_over_ranks", lambda tensors: tensors):
        everything["ema apart"] = _Run("ema", rank).train(range(10)).results
    return everything


def _worker(rank: int, folder: Path) -> None:
    patience = datetime.timedelta(seconds=60)  # a process that waits for ever is a failure
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=patience)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "broadcast"):
            patch.setattr(dist, name, _counted(name, getattr(dist, name)))
        torch.save(_all_results(rank), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """What each of two processes got."""
    folder = tmp_path_factory.mktemp("bottlenecks")
    in_two(_worker, folder)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _close(mine: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_no_bottleneck_is_left_out() -> None:
    for module in pkgutil.iter_modules(bottlenecks.__path__, bottlenecks.__name__ + "."):
        importlib.import_module(module.name)
    kinds: list[type] = [Bottleneck]
    for kind in kinds:  # it grows as we go
        kinds += filter(lambda below: below.__module__.startswith(bottlenecks.__name__), kind.__subclasses__())
    made = {type(module) for make in CASES.values() for module in make().modules()}
    concrete = [kind for kind in kinds if not inspect.isabstract(kind) and not kind.__name__.startswith("_")]
    assert not [kind.__name__ for kind in concrete if kind not in made]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(both: list[Results], name: str) -> None:
    _equal(both[0][name]["state"], both[1][name]["state"])  # bit for bit
    results = _Run(name, None).train(_steps(name)).results
    first, second, alone = (
        {key: torch.stack(run[key]) for key in ("losses", "gradients", "inputs")}
        for run in (both[0][name], both[1][name], results)
    )
    _close((first["losses"] + second["losses"]) / 2, alone["losses"])
    assert torch.equal(first["gradients"], second["gradients"])
    _close(first["gradients"], alone["gradients"])
    # A process's loss is the mean over its own half.
    _close(torch.cat([first["inputs"], second["inputs"]], 1) / 2, alone["inputs"])
    for key, value in results["state"].items():
        _close(both[0][name]["state"][key], value)


@pytest.mark.parametrize(("name", "start"), STARTS)
def test_kmeans_takes_the_rows_of_all(both: list[Results], name: str, start: int) -> None:
    alone = _Run(name, None).train(range(start, start + 6)).state
    _equal(both[0][f"{name} from {start}"]["state"], both[1][f"{name} from {start}"]["state"])
    for key, value in both[0][f"{name} from {start}"]["state"].items():
        _close(value, alone[key])


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_one_collective(both: list[Results], name: str) -> None:
    """All codebooks go together. Only dead entries ask for more: their candidates, and those that were chosen."""
    first, second = (results[name]["updates"] for results in both)
    assert first == second
    once = ["all_reduce"] if name in UPDATED else []
    for calls in first:
        assert calls in (once, [*once, "all_gather", "all_reduce"])
    if name in REVIVED:
        assert min(map(len, first)) == 1 < max(map(len, first))


@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_is_the_same_run(both: list[Results], name: str) -> None:
    for results in both:
        _equal(results[f"{name} resumed"]["state"], results[name]["state"])


@pytest.mark.parametrize("name", MOVING)
def test_kmeans_is_done_once(both: list[Results], name: str) -> None:
    """It ends with two broadcasts, of means and of counts."""
    codebooks = sum(not module.ready for module in CASES[name]().modules() if isinstance(module, MovingCodebook))
    for results in both:
        assert sum(calls.count("broadcast") for calls in results[name]["forwards"]) == 2 * codebooks
        if name in RESUMED:
            assert not any("broadcast" in calls for calls in results[f"{name} resumed"]["forwards"])


@pytest.mark.parametrize("name", CASES)
def test_evaluation_waits_for_nobody(both: list[Results], name: str) -> None:
    """The first process logs samples alone, and one may have more batches to evaluate than another."""
    assert [results[name]["evaluation"] for results in both] == [[], []]


@pytest.mark.parametrize("name", ACCUMULATED)
def test_two_batches_to_an_update_are_one_of_twice_the_size(both: list[Results], name: str) -> None:
    whole = _Run(name, None).accumulate(10, at_once=True).state
    for results in both:
        accumulated = results[f"{name} accumulated"]
        for key, value in whole.items():
            _close(accumulated["state"][key], value)
        assert accumulated["updates"] == [["all_reduce"]] * 10 and accumulated["forwards"] == [[]] * 20


@pytest.mark.parametrize("name", ["ema", "rvq", "vq_entropy"])
def test_different_beginnings_are_brought_together(both: list[Results], name: str) -> None:
    first, second = (results[f"{name} begun apart"]["state"] for results in both)
    _equal(first, second)


@pytest.mark.parametrize("name", ENTROPIC)
def test_an_entropy_whose_gradient_is_cut_is_another(both: list[Results], name: str) -> None:
    """A test of the tests above: the value is the same, the gradient is not."""
    whole, cut = both[0][name], both[0][f"{name} cut"]
    _close(cut["losses"][0], whole["losses"][0])
    assert not torch.allclose(cut["gradients"][0], whole["gradients"][0], rtol=0.01, atol=1e-4)


def test_statistics_of_each_process_alone_drift_apart(both: list[Results]) -> None:
    """Another test of the tests."""
    first, second = (results["ema apart"]["state"]["bottleneck.codebook.entries"] for results in both)
    assert not torch.allclose(first, second, atol=1e-2)


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("training", [False, True])
def test_only_the_training_forward_is_learnt_from(name: str, training: bool) -> None:
    """Neither an evaluation nor a forward without gradients, between forward and update, leaves a trace."""
    run = _Run(name, None)

    def disturb(batch: _Batch) -> None:
        run.model.train(training)
        with torch.set_grad_enabled(not training):
            run.model(batch)
        run.model.train()

    _equal(run.train(range(10), between=disturb).state, _Run(name, None).train(range(10)).state)
