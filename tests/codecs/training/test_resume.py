"""A run resumes with other values: the log lists them, and one line refuses those that it can't take."""

import logging
import sys
from pathlib import Path

import pytest
import torch

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.training.run import build_run
from varitok.export.exporters.bundle import architecture, export_bundle
from varitok.train import main

from ...composing import composed
from ..examples import QUIET, TINY_RUN

ROOT = Path(__file__).parents[3]
WORDS = [*TINY_RUN, *QUIET, "updates=2", "optim.warmup=0", "export=none"]


def start(folder, *words):
    return build_run(composed(*WORDS, *words), folder)


def fit(folder, *words):
    return train(start(folder, *words))


def train(run):
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    fit(folder)
    return folder


def test_a_resumed_run_takes_the_optimizers_new_options(finished, tmp_path, caplog):
    words = ["optim.codec.lr=0.01", "optim.codec.betas=[0.5,0.6]", "optim.codec.weight_decay=0.25", "optim.final=1"]
    with caplog.at_level(logging.INFO):
        run = fit(tmp_path, f"resume={finished}", "updates=3", *words)
    decayed, others = run.trainer.optimizers[0].param_groups
    for group in (decayed, others):
        assert (group["lr"], group["initial_lr"], list(group["betas"])) == (0.01, 0.01, [0.5, 0.6])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.25, 0.0)
    (line,) = (record.getMessage() for record in caplog.records if "resumed with" in record.getMessage())
    assert line.startswith("resumed with optim.codec.lr=0.01 (was 0.001), optim.codec.betas=[0.5,0.6] (was [0.9,0.95])")
    assert line.endswith("optim.final=1 (was 0.02), updates=3 (was 2)")
    run.module.go_back(finished / "checkpoints/last.ckpt")
    assert run.trainer.optimizers[0].param_groups[0]["initial_lr"] == 0.01, "a rollback isn't one of the options"


def test_a_run_whose_data_has_a_relative_path_resumes_from_another_folder(tmp_path, monkeypatch, caplog):
    synthetic = ("data=dead_leaves", "data.length=12", "data.val_length=5")
    words = [word for word in WORDS if word not in synthetic] + ["data=image_folder", "data.root=photos"]
    (tmp_path / "photos").symlink_to(ROOT / "data/embedded/photos")
    monkeypatch.chdir(tmp_path)
    train(build_run(composed(*words), tmp_path / "run"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    _, config = load_run(tmp_path / "run")
    with caplog.at_level(logging.INFO):
        build_run(config, tmp_path / "run")
    assert "resumed with" not in caplog.text


def test_of_a_run_that_resumes_as_it_was_nothing_is_told(finished, caplog):
    with caplog.at_level(logging.INFO):
        start(finished)
    assert "resumed with" not in caplog.text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["codec.encoder.depth=2"], r"codec\.encoder\.depth=2 \(was 1\).*\(\S+\.blocks\.1\.\S+ is missing\)"),
        (["codec.encoder.width=8"], r"codec\.encoder\.width=8 \(was 16\).*has the shape"),
        (["training.ema_decay=0"], r"training\.ema_decay=0 \(was 0\.99\).*average\.\S+ is one too many"),
        (["bottleneck=vq"], r"bottleneck\._target_=\S+VectorQuantizer \(was \S+FiniteScalarQuantizer\)"),
        (["objective=adversarial"], r"objective\.adversarial=Adversarial \(was null\).*objective\.\S+ is missing"),
        (["training.freeze=[encoder]"], r"can't resume with training\.freeze=\[encoder\] \(was \[\]\)"),
        (
            ["optim.codec._target_=torch.optim.NAdam"],
            r"can't resume with optim\.codec\._target_=torch\.optim\.NAdam \(was torch\.optim\.AdamW\)",
        ),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_what_a_run_cannot_resume_with_is_named(finished, words, told):
    with pytest.raises(UserError, match=rf"^\S+last\.ckpt: [^\n]*{told}[^\n]*$"):
        start(finished, *words)


def test_the_codec_of_another_size_is_no_start(finished, tmp_path):
    told = r"its codec isn't the one that this run builds \(\S+ has the shape [^\n]*\)"
    with pytest.raises(UserError, match=rf"^init_from=\S+: {told}; this run has codec\.encoder\.width=8 \(was 16\)"):
        start(tmp_path, f"init_from={finished}", "codec.encoder.width=8")


def test_a_run_starts_from_a_bundle(finished, tmp_path):
    codec, config = load_run(finished)
    form = {"formats": ["safetensors"], "streaming": False, "architecture": architecture(config)}
    export_bundle(codec, tmp_path / "bundle", **form)
    started = start(tmp_path / "run", f"init_from={tmp_path / 'bundle'}").module.codec.state_dict()
    for name, value in codec.state_dict().items():
        torch.testing.assert_close(started[name], value, msg=name)
    with pytest.raises(UserError, match=r"^init_from=\S+bundle: its codec isn't the one that this run builds \("):
        start(tmp_path / "other", f"init_from={tmp_path / 'bundle'}", "codec.encoder.depth=2")
    (tmp_path / "bundle" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"^\S+model\.safetensors: missing; [^\n]*$"):
        start(tmp_path / "other", f"init_from={tmp_path / 'bundle'}")


def test_a_start_that_fails_leaves_the_runs_configuration(finished, monkeypatch, capsys):
    (finished / "config.yaml").write_text("as it was")
    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(SystemExit, match="2"):
        main([*WORDS, f"hydra.run.dir={finished}", "codec.encoder.depth=2"])
    assert "codec.encoder.depth=2 (was 1)" in capsys.readouterr().err
    assert (finished / "config.yaml").read_text() == "as it was"
