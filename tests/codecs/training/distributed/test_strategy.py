"""Whole runs on two gloo processes, which are started once for all cases; what one process at the same batch gives.

What starts processes otherwise, and what ends them, is in test_launchers.py.
"""

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DDPStrategy

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.distributed import full_tensor, local_tensor
from varitok.codecs.training.distributed import strategy as parallel
from varitok.codecs.training.run import build_run

from ...examples import QUIET
from ..test_survival import logged
from ..test_training import ADVERSARIAL, RESIDUAL, compose, fit
from .processes import in_processes

LOGGED = [*QUIET, "training.log_every=1"]
# The discriminator begins at the fourth update and is heard from the sixth.
GAN = [
    *ADVERSARIAL,
    "objective.adversarial.start=3",
    "objective.adversarial.head_start=2",
    "objective.adversarial.lecam=0.1",
]
ADAPTIVE = "objective.adversarial.adaptive=1e4"
RVQ = [*RESIDUAL, "length=two_axes", "updates=8", *LOGGED]
SHARDED = "trainer.strategy=fsdp2"
GUIDED = [
    *RVQ,
    "+objective.teachers.eye={_target_: varitok.data.teachers.vision.RandomTeacher, channels: 8}",
    "+objective.terms.contrast={weight: 0.1, module: {_target_: varitok.codecs.losses.guided.Contrast, teacher: eye}}",
]
CASES = {
    "gan": [*RVQ, *GAN, ADAPTIVE],
    "accumulated": [*RVQ, *GAN, ADAPTIVE, "training.accumulate=2"],
    "every_other": [*RVQ, *GAN, "objective.adversarial.every=2", "objective.adversarial.shared=true"],
    "unused_looked_for": [*RVQ, *GAN, "trainer.strategy=ddp_find_unused_parameters_true"],
    "halting": ["bottleneck=fsq", "length=halting", *LOGGED],
    "guided": GUIDED,  # by a term whose map learns with the codec
    "recomputed": [*RVQ, *GAN, "training.activation_checkpointing=[encoder,decoder]"],
    "sharded": [*RVQ, *GAN, SHARDED, "training.activation_checkpointing=[decoder]", "checkpoint.every=3"],
    "in_place": [*RVQ, *GAN, "training.accumulate=2", "processes.bucket=0.001", "processes.in_place=true"],
    "sharded_accumulated": ["bottleneck=vq_ema", *RVQ[-4:], "training.accumulate=2", SHARDED, "training.ema_decay=0"],
}
FIRST = ["accumulated", "sharded"]
OTHERS = [name for name in CASES if name not in FIRST]
# With a temperature of 0.01 an entropy's gradient is a hundred times as sharp, and so is what rounding does to it.
BOTTLENECKS = {
    "fsq": ["bottleneck=fsq"],
    "ema_vq": ["bottleneck=vq_ema", "bottleneck.dim=8", "bottleneck.codebook_size=64"],
    "lfq": ["bottleneck=lfq", "bottleneck.bits=8", "bottleneck.temperature=1"],
    "rvq": RESIDUAL,
}
CURVE = [*LOGGED, "length=two_axes", "updates=100", "data.length=48", "optim.codec.lr=1e-4"]
CONSTANT = ["optim.warmup=0", "optim.final=1"]


class Gradients(pl.Callback):
    """Notes the codec's gradients behind each batch that doesn't complete an update."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        if not pl_module.stepped:
            self.seen.append(torch.cat([p.grad.flatten() for p in pl_module.codec.parameters() if p.grad is not None]))


class Changing(pl.Callback):
    """Lets a parameter learn at the first updates only."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module.codec.project_out.bias.requires_grad_(pl_module.update < 3)


class Parting(pl.Callback):
    """Changes a weight of the second process alone, as a fault of a device or of a driver does."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == 2 and trainer.global_rank:
            with torch.no_grad():
                pl_module.codec.project_out.bias += 1e-3


def train(rank, words, folder, disturbed=False, callback=None):
    run = build_run(compose("trainer.devices=2", "trainer.strategy=ddp", *words), folder)
    if callback:
        run.trainer.callbacks.insert(0, callback)
    if disturbed and rank:  # it begins elsewhere, with other codebooks, and must be brought back
        with torch.no_grad():
            for tensor in (*run.module.parameters(), *run.module.codec.buffers()):
                tensor.copy_(torch.rand_like(tensor, dtype=torch.float32))
    gradients = Gradients()
    if isinstance(run.trainer.strategy, parallel.Parallel) and SHARDED not in words:
        run.trainer.callbacks.insert(0, gradients)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    state = {name: full_tensor(value) for name, value in run.module.state_dict().items()}
    return {"state": state, "gradients": gradients.seen, "shares": _elements(run.module.codec)}


def _elements(codec):
    return sum(local_tensor(parameter).numel() for parameter in codec.parameters())


def quick(rank, folder):
    results = {name: train(rank, CASES[name], folder / name) for name in FIRST}
    results["disturbed"] = train(rank, CASES["accumulated"], folder / "disturbed", disturbed=True)
    # As Lightning would have it.
    ours, parallel.STRATEGIES["ddp"] = parallel.STRATEGIES["ddp"], lambda **_: DDPStrategy()
    try:
        train(rank, CASES["gan"], folder / "lightnings")
    except (RuntimeError, UserError) as error:
        results["lightnings"] = str(error)
    parallel.STRATEGIES["ddp"] = ours
    return results


def slow(rank, folder):
    results = {name: train(rank, CASES[name], folder / name) for name in OTHERS}
    for name, words in BOTTLENECKS.items():
        train(rank, [*words, *CURVE], folder / name)
    # The first life ends in the middle; the second, in the same folder, goes on from its checkpoint.
    words = [*CASES["sharded"], *CONSTANT]
    results["constant"] = train(rank, words, folder / "constant")
    train(rank, [*words, "updates=5"], folder / "lives")
    results["lives"] = train(rank, words, folder / "lives")
    results["unsharded"] = train(rank, [word for word in words if word != SHARDED], folder / "unsharded")
    with pytest.raises(UserError, match="fsdp2: not with a loss term that has trainable"):
        train(rank, [*GUIDED, SHARDED], folder / "guided_sharded")
    with pytest.raises(UserError, match=r"fsdp2: not with objective\.adversarial\.adaptive"):
        train(rank, [*CASES["gan"], SHARDED], folder / "adaptive_sharded")
    # Each process has a folder of its own, as on nodes that share none: only the first finds a checkpoint.
    train(rank, [*words, "updates=2"], folder / "apart" / str(rank))
    with pytest.raises(UserError, match=r"has checkpoint .* bytes, process 1 \(.*\) none; the run's folder must"):
        train(rank, [*words, "updates=4"], folder / "apart" / str(rank))
    with pytest.raises(UserError, match="update 3: the weights of process 1 differ"):
        train(rank, ["bottleneck=fsq", *LOGGED], folder / "parting", callback=Parting())
    # The last: what the processes had begun to average is not finished.
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        train(rank, CASES["accumulated"], folder / "changing", callback=Changing())
    saved = torch.load(folder / "changing/checkpoints/last.ckpt", weights_only=True)
    results["changing"] = int(saved["state_dict"]["updates"])
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    return in_processes(quick, folder), folder


@pytest.fixture(scope="module")
def both_slow(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    return in_processes(slow, folder), folder


def equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_two_processes_stay_one_and_learn_what_one_learns(request, tmp_path, name):
    (first, second), _ = request.getfixturevalue("both" if name in FIRST else "both_slow")
    equal(first[name]["state"], second[name]["state"])
    words = [word for word in CASES[name] if not word.startswith("trainer.strategy")]
    close(fit(tmp_path, *words, "loader.batch_size=6").module.state_dict(), first[name]["state"])


@pytest.mark.slow
@pytest.mark.parametrize("name", BOTTLENECKS)
def test_two_processes_have_the_loss_curve_of_one(both_slow, tmp_path, name):
    _, folder = both_slow
    fit(tmp_path, *BOTTLENECKS[name], *CURVE, "loader.batch_size=6")
    one, two = ([float(row[2]) for row in logged(at) if row[1] == "loss"] for at in (tmp_path, folder / name))
    assert len(one) == 100 and one == pytest.approx(two, abs=1e-4)


@pytest.mark.slow
def test_processes_that_begin_apart_are_brought_together(both):
    """Nothing of Lightning's would: it broadcasts no buffers under manual optimization."""
    (first, second), _ = both
    equal(first["disturbed"]["state"], second["disturbed"]["state"])
    equal(first["disturbed"]["state"], first["accumulated"]["state"])


@pytest.mark.slow
def test_accumulated_batches_are_not_averaged_one_by_one(both):
    """But for the first of all, from which the graph is learnt."""
    (first, second), _ = both
    pairs = list(zip(first["accumulated"]["gradients"], second["accumulated"]["gradients"], strict=True))
    assert len(pairs) == 8 and torch.equal(*pairs[0])
    assert not any(torch.equal(*pair) for pair in pairs[1:])


@pytest.mark.slow
def test_a_graph_that_changes_is_told_before_the_step(both_slow):
    (first, second), _ = both_slow
    assert first["changing"] == second["changing"] == 2


@pytest.mark.slow
def test_lightnings_wrapper_fails_with_a_discriminator(both):
    """A test of the tests above, and why there is a strategy of our own: replicas part in the first update."""
    (first, second), _ = both
    assert all("weights of process 1 differ" in one["lightnings"] for one in (first, second))


@pytest.mark.slow
def test_each_process_has_a_share(both):
    (first, second), _ = both
    whole = first["accumulated"]["shares"]
    shares = [results["sharded"]["shares"] for results in (first, second)]
    assert sum(shares) == whole and max(shares) < 0.75 * whole


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_bit_and_its_checkpoint_is_like_any_other(both_slow, tmp_path):
    (first, _), folder = both_slow
    equal(first["lives"]["state"], first["constant"]["state"])
    close(first["unsharded"]["state"], first["constant"]["state"])
    saved = [
        torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True) for name in ("constant", "unsharded")
    ]
    for one, other in zip(*(each["optimizer_states"] for each in saved), strict=True):
        assert one["state"].keys() == other["state"].keys()
    codec, _ = load_run(folder / "constant")
    assert codec(torch.zeros(1, 3, 16, 16)).signal.isfinite().all()
    # One process goes on from it.
    words = [word for word in CASES["sharded"] if word != SHARDED]
    assert fit(tmp_path, *words, "updates=10", f"resume={folder / 'constant'}").module.update == 10


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trainer.strategy=deepspeed"], "trainer.strategy=deepspeed: no such strategy; take one of auto, ddp,"),
        (["processes.silence=1"], "processes.silence=1: must be at least 2"),
        (["processes.bucket=0"], "processes.bucket=0: must be above 0"),
        (["processes.timeout=0"], "processes.timeout=0: must be at least 1"),
    ],
)
def test_a_mistake_is_told(tmp_path, words, told):
    with pytest.raises(UserError, match=told):
        build_run(compose(*words), tmp_path)


def test_what_ddp_takes_is_handed_through(tmp_path):
    words = ["trainer.devices=2", "trainer.strategy=ddp", "processes.bucket=100", "processes.in_place=true"]
    strategy = build_run(compose(*words), tmp_path).trainer.strategy
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 100 and strategy._ddp_kwargs["gradient_as_bucket_view"]


def test_checkpoints_come_when_due_whenever_the_discriminator_begins(tmp_path):
    """Lightning's counter of steps would be odd for good, and no checkpoint due at even ones."""
    words = [*ADVERSARIAL, *LOGGED, "objective.adversarial.start=3", "updates=8", "checkpoint.every=2"]
    fit(tmp_path, *words, "checkpoint.archive=2", "checkpoint.keep=null")
    names = [path.name for path in sorted((tmp_path / "checkpoints").glob("update_*"))]
    assert names == [f"update_000000{update}.ckpt" for update in (2, 4, 6, 8)]
