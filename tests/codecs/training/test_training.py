"""Whole runs, small: what a user gets from `train.py`, and that a run can go on where it stopped."""

import csv
import logging
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.evaluation.robustness import evaluation_mode
from varitok.codecs.training.base import fastest
from varitok.codecs.training.config.launch import Launch
from varitok.codecs.training.ema import EMA
from varitok.codecs.training.logging.scalar_buffer import ScalarBuffer
from varitok.codecs.training.module import CodecTraining
from varitok.codecs.training.run import build_run
from varitok.codecs.training.schedules import averaging_decay, warmup_cosine
from varitok.data.storage.listing import list_splits

from ...composing import composed
from ..examples import GRID_IMAGES, QUIET, TINY_RUN, StandIn, shrink, tiny_codec

ROOT = Path(__file__).parents[3]
EXPERIMENTS = sorted(
    path.relative_to(ROOT / "configs/experiment").with_suffix("").as_posix()
    for path in (ROOT / "configs/experiment").rglob("*.yaml")
    if path.parent.name not in ("base", "prior")  # parts of others; in tests/export/exporters/test_prior.py
    and not (path.parent.name == "image" and path.stem in GRID_IMAGES)  # in test_image_experiments.py
)


# Whose two updates take a second or more, or whose parts are all those of others.
# One of each kind of network and objective; the others take two updates in the slow suite.
LIGHT = (
    *("image/one_d_piece_64", "audio/mimi_small", "audio/wavtokenizer_small", "video/adaptok_small"),
    *("video/nerv_pp_small", "video/vidtok_small"),
)


TINY = [
    *TINY_RUN,
    "updates=4",
    "training.log_every=2",
    "callbacks.samples.every=2",
    "callbacks.evaluation.every=2",
    "export=none",
]
ADVERSARIAL = [
    "objective=adversarial",
    "objective.adversarial.discriminator.width=8",
    "objective.adversarial.discriminator.layers=1",
    "objective.adversarial.start=1",
    "objective.adversarial.head_start=1",
    "objective.adversarial.ramp=0",
    "objective.adversarial.r1=0.1",
    "objective.adversarial.r1_every=2",
]
RESIDUAL = [
    "bottleneck=rvq",
    "bottleneck.num_codebooks=3",
    "bottleneck.level.dim=8",
    "bottleneck.level.codebook_size=16",
]
BALANCED = "+objective.balancer._target_=varitok.codecs.losses.balancer.Balancer"
SHARED = [f"objective.adversarial.{word}" for word in ("features=1.0", "shared=true", "adaptive=1e4")]
DRAWN = ["bottleneck=bernoulli", "bottleneck.part.bits=6", "bottleneck.part.anneal=3"]


def compose(*overrides):
    return composed(*TINY, *overrides)


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_logs_the_files_that_a_start_found(tmp_path, caplog, monkeypatch, rank):
    names = [f"{split}/{number}.png" for split, count in (("train", 3), ("Test", 2)) for number in range(count)]
    for name in [*names, "train/._0.png"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr("varitok.codecs.training.run.detect_launch", lambda: Launch(rank=rank))
    monkeypatch.setattr(logging.getLogger(list_splits.__module__), "level", logging.INFO)
    words = [word for word in TINY if "length" not in word]  # of synthetic data
    build_run(composed(*words, "data=image_folder", f"data.root={tmp_path}"), tmp_path / "run")
    found = "3 for training in train/ (0.png ... 2.png), 2 for validation in Test/ (0.png ... 1.png); skipped 1 hidden"
    assert [line for line in caplog.messages if "data.root" in line] == [f"data.root={tmp_path}: {found}"] * (not rank)


def fit(folder, *overrides):
    folder.mkdir(parents=True, exist_ok=True)
    run = build_run(compose(*overrides), folder)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


def _rows(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, fit(folder)


def test_a_run_leaves_what_it_promises(finished):
    folder, run = finished
    assert run.module.update == int(run.module.updates) == run.trainer.global_step == 4
    assert (folder / "checkpoints/last.ckpt").is_file()
    assert {path.name for path in (folder / "samples").iterdir()} == {"update_0000002.png", "update_0000004.png"}
    assert (folder / "evaluation/evaluation.csv").is_file() and (folder / "evaluation/evaluation.png").is_file()
    logged = {(row["update"], row["name"]) for row in _rows(folder)}
    assert {("2", "loss/l2"), ("4", "grad_norm"), ("2", "val/psnr@4"), ("4", "val/entropy")} <= logged


def test_a_checkpoint_is_data_and_loads_back(finished):
    folder, run = finished
    torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    codec, config = load_run(folder)
    signal = torch.zeros(1, 3, 16, 16)
    torch.testing.assert_close(codec(signal).signal, run.module.evaluated(signal).signal)
    assert config.name == "demo"


@pytest.mark.parametrize("damage", ["torn", "other"])
def test_a_damaged_checkpoint_is_named(finished, tmp_path, damage):
    bad = tmp_path / "bad.ckpt"
    if damage == "torn":
        bad.write_bytes((finished[0] / "checkpoints/last.ckpt").read_bytes()[:1000])
    else:
        torch.save({"weights": 1}, bad)
    with pytest.raises(UserError, match=r"bad\.ckpt: not a varitok checkpoint"):
        load_run(bad)
    with pytest.raises(UserError, match="no such checkpoint"):
        load_run(tmp_path)


def test_a_checkpoint_of_another_version_is_told_in_one_line(finished, tmp_path):
    saved = torch.load(finished[0] / "checkpoints/last.ckpt", weights_only=True)
    name = next(name for name in saved["state_dict"] if name.startswith("average.codec.encoder."))
    saved["state_dict"][name] = saved["state_dict"][name][None]
    torch.save(saved, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match=r"^[^\n]*old\.ckpt: doesn't fit [^\n]*encoder[^\n]*$"):
        load_run(tmp_path / "old.ckpt")


class Killed(pl.Callback):
    """Ends a run in the middle of update 4."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == 3:
            raise RuntimeError("killed")


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param([*QUIET, *ADVERSARIAL, *DRAWN, BALANCED, "training.accumulate=2"], marks=pytest.mark.slow),
        [*QUIET, *ADVERSARIAL, *RESIDUAL, *SHARED, "length=two_axes", "training.accumulate=2"],
        pytest.param(["bottleneck=kl", "length=halting"], marks=pytest.mark.slow),
    ],
    ids=["drawn_balanced", "residual_shared", "halting"],
)
def test_a_killed_run_goes_on_where_it_was_saved(tmp_path, extra):
    whole = fit(tmp_path / "whole", *extra)
    killed = build_run(compose(*extra), tmp_path / "part")
    killed.trainer.callbacks.append(Killed())
    with pytest.raises(RuntimeError, match="killed"):
        killed.trainer.fit(killed.module, killed.data)
    resumed = fit(tmp_path / "rest", *extra, f"resume={tmp_path / 'part'}")
    assert_equal_states(whole, resumed)


def test_a_finished_run_goes_on_for_more_updates(tmp_path):
    constant = [*QUIET, "optim.warmup=0", "optim.final=1"]
    whole = fit(tmp_path / "whole", *constant)
    fit(tmp_path / "part", *constant, "updates=2")
    assert_equal_states(whole, fit(tmp_path / "rest", *constant, f"resume={tmp_path / 'part'}"))


def assert_equal_states(one, other):
    assert one.module.update == other.module.update == 4
    for (name, value), again in zip(one.module.state_dict().items(), other.module.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


def test_the_discriminator_waits_learns_and_is_heard(tmp_path):
    fit(tmp_path, *QUIET, *ADVERSARIAL, "training.log_every=1")
    names = {(row["update"], row["name"]) for row in _rows(tmp_path)}
    assert ("1", "discriminator/loss") not in names and ("2", "discriminator/loss") in names
    assert ("2", "loss/adversarial") not in names and ("3", "loss/adversarial") in names


def test_with_a_discriminator_updates_are_not_counted_double(tmp_path):
    run = fit(tmp_path, *QUIET, *ADVERSARIAL, "objective.adversarial.start=0", "checkpoint.every=1")
    assert run.trainer.global_step == run.module.update == 4


def test_accumulation_equals_the_larger_batch(tmp_path):
    plain = [*QUIET, "length=full", "training.ema_decay=0", "optim.clip=1e9"]
    small = fit(tmp_path / "small", *plain, "training.accumulate=2", "loader.batch_size=3", "updates=2")
    large = fit(tmp_path / "large", *plain, "loader.batch_size=6", "updates=2")
    for (name, one), other in zip(small.module.codec.named_parameters(), large.module.codec.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=name)


def test_a_codebooks_statistics_are_those_of_the_whole_update(tmp_path):
    """Batches of an update are gathered, and the codebook moves once, as for one batch of them all."""
    plain = [*QUIET, *RESIDUAL, "length=full", "training.ema_decay=0", "optim.clip=1e9", "bottleneck.level.revival=0"]
    plain += ["bottleneck.level.kmeans_init=false"]
    small = fit(tmp_path / "small", *plain, "training.accumulate=2", "loader.batch_size=3", "updates=2")
    large = fit(tmp_path / "large", *plain, "loader.batch_size=6", "updates=2")
    for (name, one), other in zip(small.module.codec.named_buffers(), large.module.codec.buffers(), strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-3, msg=name)
    assert int(small.module.codec.bottleneck.parts[0].codebook.age) == 2


def test_second_stage_trains_the_decoder_alone(finished, tmp_path):
    folder, first = finished
    run = fit(
        tmp_path,
        *QUIET,
        f"init_from={folder}",
        "training.freeze=[encoder,project_in,bottleneck]",
        "training.ema_decay=0",
    )
    start, end = first.module.average.codec.state_dict(), run.module.codec.state_dict()
    changed = {name.partition(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert changed == {"decoder", "project_out"}


@pytest.mark.parametrize("option", ["freeze", "compile"])
def test_an_unknown_part_is_named(tmp_path, option):
    with pytest.raises(UserError, match=rf"training\.{option}: the codec has no part 'encodr'"):
        build_run(compose(f"training.{option}=[encodr]"), tmp_path)


@pytest.mark.slow
def test_an_adaptive_weight_and_a_compiled_decoder_exclude_each_other(tmp_path):
    with pytest.raises(UserError, match=r"^training\.compile: not the decoder with objective\.adversarial\.adaptive"):
        build_run(compose(*ADVERSARIAL, *SHARED, "training.compile=[decoder]"), tmp_path)


@pytest.mark.parametrize(
    "key",
    ["callbacks.samples.every", "callbacks.evaluation.every", "checkpoint.every", "training.log_every", "updates"],
)
def test_what_must_count_is_told(tmp_path, key):
    with pytest.raises(UserError, match=rf"^{key}=0: must be at least 1$"):
        build_run(compose(f"{key}=0"), tmp_path)


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("trainer.precision=16-mixed", "trainer.precision=16-mixed: not supported; take auto or 32-true or bf16-mixed"),
        ("trainer.precision=64-true", "trainer.precision=64-true: not supported"),
        ("trainer.accelerator=gpu", "trainer.accelerator=gpu .*: No supported gpu backend found"),
        ("trainer.accelerator=nope", "trainer.accelerator=nope .*: .* Available names are: "),
        ("trainer.devices=0", "trainer.devices=0 .*: .* not a valid input"),
        ("+trainer.devcies=2", "trainer.devcies=2: .* unexpected keyword argument 'devcies'"),
    ],
)
def test_what_the_trainer_can_not_do_is_told(tmp_path, monkeypatch, word, told):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=told):
        build_run(compose(word), tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
def test_precision_suits_the_device(tmp_path, monkeypatch, rank):
    """On a GPU images train in bfloat16, products of float32 in TF32; evaluation and codebooks in exact float32."""
    assert build_run(compose(*QUIET), tmp_path / "cpu").trainer.precision == "32-true"
    chosen = []
    monkeypatch.setattr("varitok.codecs.training.run._trains_on_gpu", lambda arguments: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr("varitok.codecs.training.run.detect_launch", lambda: Launch(rank=rank, local=rank))
    try:
        run = build_run(compose(*QUIET), tmp_path / "gpu")
        assert run.trainer.precision == "bf16-mixed" and chosen == [rank]
        assert torch.get_float32_matmul_precision() == "high" and torch.backends.cudnn.allow_tf32
        found = []
        note = lambda *_: found.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))  # noqa: E731
        run.module.codec.bottleneck.register_forward_hook(note)
        run.module.codec(torch.zeros(1, 3, 16, 16))
        with evaluation_mode(run.module.codec):
            note()
        note()
        assert found == [("highest", False), ("highest", False), ("high", True)]
    finally:
        torch.set_float32_matmul_precision("highest")


def test_bfloat16_trains_with_backward_and_updates_outside_autocast(tmp_path):
    """There, operations in float32, such as LFQ's entropies, would multiply in bfloat16 on the way back."""
    seen = {}

    class Look(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            def note(name):
                seen.setdefault(name, torch.is_autocast_enabled("cpu"))

            module, update = pl_module, pl_module.codec.bottleneck.update
            module.codec.project_out.weight.register_hook(lambda gradient: note("backward"))
            module.codec.register_forward_hook(lambda *_: note("forward"))
            for name, optimizer in zip(("codec", "discriminator"), trainer.optimizers, strict=True):
                optimizer.register_step_pre_hook(lambda *_, name=name: note(name))
            module.codec.bottleneck.update = lambda: [note("codebooks"), update()]

    run = build_run(compose(*QUIET, *ADVERSARIAL, "bottleneck=vq_ema", "trainer.precision=bf16-mixed"), tmp_path)
    run.trainer.callbacks.insert(0, Look())
    run.trainer.fit(run.module, run.data)
    assert run.module.update == 4 and seen.pop("forward")
    assert seen == dict.fromkeys(("backward", "codec", "discriminator", "codebooks"), False)


@pytest.mark.slow
def test_compiled_parts_keep_their_names(tmp_path):
    words = [*ADVERSARIAL, "training.compile=[decoder,discriminator,losses]"]
    module, plain = (build_run(compose(*given), tmp_path).module for given in (words, ADVERSARIAL))
    assert module.state_dict().keys() == plain.state_dict().keys()
    compiled = [name for name, part in module.named_modules() if part._compiled_call_impl is not None]
    # Each block of the decoder, so that DDP averages its gradient while others are computed.
    assert [name for name in compiled if name.startswith("codec")] == ["codec.decoder.transformer.blocks.0"]
    assert {"objective.terms.l2", "objective.adversarial.discriminator"} < set(compiled)


def test_wandb_offline_does_not_disturb_a_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit(tmp_path, *QUIET, "logger=wandb")
    assert list((tmp_path / "wandb").glob("offline-run-*"))
    assert _rows(tmp_path)


def test_a_broken_wandb_does_not_end_a_run(tmp_path, monkeypatch, caplog):
    import wandb

    def broken(*_, **__):
        raise ConnectionResetError("gone")

    monkeypatch.setattr(wandb, "init", broken)
    assert fit(tmp_path, *QUIET, "logger=wandb").module.update == 4
    assert "the run goes on" in caplog.text


def test_average_follows_parameters_and_copies_buffers():
    codec = tiny_codec()
    codec.register_buffer("counter", torch.zeros((), dtype=torch.int64))
    average = EMA(codec, 0.5)
    before = codec.project_in.weight.detach().clone()
    with torch.no_grad():
        codec.project_in.weight.add_(1.0)
    codec.counter.fill_(3)
    average.update(codec, 10**6)
    torch.testing.assert_close(average.codec.project_in.weight, before + 0.5)
    assert average.codec.counter == 3
    for moved in (codec, average):
        moved.double()  # their parameters have new storage
    average.update(codec, 10**6)
    torch.testing.assert_close(average.codec.project_in.weight, before.double() + 0.75)


@pytest.mark.parametrize(("given", "faster"), [({}, True), ({"foreach": True}, False), ({"fused": False}, False)])
def test_an_optimizer_on_a_gpu_is_fused_unless_chosen_otherwise(given, faster):
    make = partial(torch.optim.AdamW, lr=1e-3, **given)
    assert fastest(make, torch.device("cuda")) == ({"fused": True} if faster else {})
    assert fastest(make, torch.device("cpu")) == fastest(torch.optim.LBFGS, torch.device("cuda")) == {}


def test_schedules():
    rates = [warmup_cosine(u, 100, 10, 0.1) for u in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] == pytest.approx(0.1)
    assert averaging_decay(0, 0.999) == pytest.approx(0.1) and averaging_decay(10**6, 0.999) == 0.999


def test_record_gives_means_and_starts_anew():
    record = ScalarBuffer(2)
    record.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    record.add({"a": torch.tensor(3.0)})
    assert record.read() == {"a": 2.0, "b": 5.0}
    assert record.read() == {}


def _train_py(folder, *arguments):
    environment = os.environ | {"PYTHONPATH": str(ROOT / ".pkg"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    done = subprocess.run(command, check=False, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bottleneck", "error"),
    [
        pytest.param(["bottleneck=vq"], 2e-4, id="vq"),
        pytest.param(RESIDUAL, 1e-3, id="rvq"),
    ],
)
def test_two_processes_give_what_one_gives(tmp_path, bottleneck, error):
    """The same codec, codebook, average and discriminator at the same global batch."""
    shared = [*TINY, *ADVERSARIAL, "length=full", *bottleneck, "data.val_length=6"]
    two = ["trainer.devices=2", "trainer.strategy=ddp_find_unused_parameters_true"]
    _train_py(tmp_path, *shared, *two, "loader.batch_size=3", "hydra.run.dir=two")
    _train_py(tmp_path, *shared, "loader.batch_size=6", "hydra.run.dir=one")
    states = [
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("one", "two")
    ]
    for name, value in states[0].items():
        torch.testing.assert_close(
            value, states[1][name], atol=error, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
    tables = [(tmp_path / name / "evaluation/evaluation.csv").read_text().splitlines()[-1] for name in ("one", "two")]
    assert tables[0].split(",")[-1] == tables[1].split(",")[-1] == "6"


@pytest.mark.slow
def test_saved_configuration_repeats_the_run(tmp_path):
    exporting = [word for word in TINY if word != "export=none"]
    _train_py(tmp_path, *exporting, "export.formats=[safetensors]", "hydra.run.dir=first")
    _train_py(tmp_path, "--config-dir", "first", "--config-name", "config", "hydra.run.dir=second")
    one, other = (OmegaConf.load(tmp_path / name / "config.yaml") for name in ("first", "second"))
    assert one == other
    assert isinstance(build_run(compose(), tmp_path).module, CodecTraining)
    assert (tmp_path / "second" / "bundle" / "model.safetensors").is_file()
    states = [load_run(tmp_path / name)[0].state_dict() for name in ("first", "second")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize(
    "experiment",
    [pytest.param(name, marks=[pytest.mark.slow] * (name not in LIGHT)) for name in EXPERIMENTS],
)
def test_every_experiment_takes_two_updates(tmp_path, experiment, monkeypatch):
    """With its own objective, networks and schedules, on small signals and with a stand-in for LPIPS's weights.

    What a run leaves is tested with one of each modality: here, in test_evaluate_sound.py, test_evaluate_video.py and
    test_nerv.py.
    """
    monkeypatch.setattr("varitok.codecs.losses.perceptual.LPIPS", lambda net: StandIn())
    small = [
        "loader.batch_size=2", "loader.workers=0", "updates=2", "trainer=default", "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu", "training.log_every=1", "export=none", *QUIET,
    ]  # fmt: skip
    features = "clips." if experiment.startswith("video/landiff") else ""
    if not experiment.startswith("video/nerv"):
        small += [f"data.{features}length=4", f"data.{features}val_length=2"]
    if experiment.startswith("audio/"):
        small += ["data=voices", "data.crop_tokens=8"]
    elif experiment.startswith("video/nerv"):
        small += ["data=single_scene", "data.frames=3", "data.image_size=80"]
    elif experiment.startswith("video/"):
        small += [f"data={'feature_scenes' if features else 'scenes'}", "loader.bucket=0"]
        small += [f"data.{features}crop_tokens=2", f"data.{features}image_size=16"]
        small += ["codec.encoder.image_size=2", "codec.encoder.channels=64", "data.device=cpu"] if features else []
        small += ["trainer.precision=32-true"]
    else:
        small += ["data=dead_leaves", "data.image_size=32"]
    config = composed(f"experiment={experiment}", *small)
    shrink(config.codec)
    shrink(config.objective, {"width": 2, "layers": 1})
    OmegaConf.set_struct(config, False)
    for key in ("loudness", "gain"):  # of files
        config.data.pop(key, None)
    run = build_run(config, tmp_path)
    run.trainer.fit(run.module, run.data)
    assert run.module.update == 2
    assert all(parameter.isfinite().all() for parameter in run.module.parameters())


@pytest.mark.parametrize("name", ["one_batch", "overfit", "profile"])
def test_debug_presets(tmp_path, name):
    small = ["updates=2", "debug=" + name] if name != "one_batch" else ["debug=one_batch"]
    config = composed(*(o for o in TINY if not o.startswith(("updates", "callbacks"))), *small)
    run = build_run(config, tmp_path)
    run.trainer.fit(run.module, run.data)
    assert run.module.update == (1 if name == "one_batch" else 2)
    assert (tmp_path / "evaluation").exists() is (name != "profile")


def test_missing_perceptual_weights_are_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"vgg16-397923af\.pth"):
        build_run(compose("objective=perceptual"), tmp_path)
