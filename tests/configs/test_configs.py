"""A command line becomes a run, and every mistake on it one line."""

import json
import logging
import multiprocessing
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
import pytest
from omegaconf import DictConfig, OmegaConf

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.training.config import compose
from varitok.codecs.training.config.choices import drop_foreign

from ..composing import composed

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
EXPERIMENTS = sorted(
    path.relative_to(CONFIGS / "experiment")
    for path in (CONFIGS / "experiment").rglob("*.yaml")
    if path.parent.name != "base"  # parts of others
)

# Loads Hydra once; each program is a fork of it.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([compose.__name__, __name__])


def _task(config: DictConfig) -> None:
    """Stand for training, which begins with the checked configuration: save it, and then do what its name says."""
    compose.save_resolved(config, compose.run_folder(config))
    if config.name == "mistake":
        raise UserError("signal: too short, give more")
    if config.name == "worker":
        raise UserError("Caught UserError in worker 0.\n  File x\nvaritok.UserError: signal: too short, give more")
    if config.name == "defect":
        raise KeyError("a defect")
    if config.name == "interrupt":
        raise KeyboardInterrupt
    if config.name == "lightning":
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    print(f"updates {config.updates!r} name {config.name!r} seed {config.seed}")


def _program(folder: Path, words: Sequence[str], env: dict[str, str]) -> None:
    for stream in (sys.stdout, sys.stderr):
        os.dup2(os.open(folder / stream.name.strip("<>"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC), stream.fileno())
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["program.py", *words]
    compose.run_with(_task)


class Result:
    """What a program printed, and how it ended."""

    def __init__(self, folder: Path, *words: str, **env: str) -> None:
        clean = {
            key: value for key, value in os.environ.items() if key not in ("HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK")
        }
        program = SERVER.Process(target=_program, args=(folder, words, {**clean, **env}))
        program.start()
        program.join(120)
        assert program.exitcode is not None, "it doesn't end"
        self.out, self.err = ((folder / stream).read_text() for stream in ("stdout", "stderr"))
        self.status = program.exitcode


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["export=null"], ["export=null: the option of a group must be a name"]),
        (["experiment=image/dmeo"], ["experiment=image/dmeo: no such option", "did you mean experiment=image/demo"]),
        (["experiment=dmeo"], ["experiment=dmeo: no such option", "experiment=image/demo"]),
        (["experiment=nothing_alike"], ["have: ", "image/demo"]),
        (["bottleneck=vqq"], ["bottleneck=vqq: no such option", "did you mean bottleneck=vq?", "have: autoencoder"]),
        (["hydra/launcher=nope"], ["hydra/launcher=nope: no such option", "basic"]),
        (["botleneck=vq"], ["botleneck: no such key or group", "bottleneck"]),
        (["trainer.devcies=2"], ["trainer.devcies: no such key", "trainer.devices"]),
        (["trainer.updtes=3"], ["trainer.updtes: no such key", "updates"]),
        (["bottleneck=fsq", "bottleneck.lvels=[8]"], ["bottleneck.lvels", "bottleneck.levels"]),
        (["+updtes=3"], ["updtes: no such key", "updates"]),
        (["+loader.batchsize=3"], ["loader.batchsize: no such key", "loader.batch_size"]),
        (["--config-name", "trian"], ["--config-name trian", "train"]),
        (["data=image_folder"], ["data.root is required: give data.root=FOLDER"]),
        (["experiment=prior/images", "data.root=x"], ["tokenizer is required: give tokenizer=BUNDLE"]),
        (["experiment=prior/audio", "data.root=x", "tokenizer=y"], ["tokenizer=y: not a bundle"]),
        (["init_from="], ["init_from=: is empty; give a value, or null for none"]),
        (["hydra.run.dir="], ["hydra.run.dir=: is empty"]),
        (["experiment=prior/images", "data.root=x", "tokenizer="], ["tokenizer=: is empty"]),
        (["experiment=prior/images", "data.root=x", "tokenizer=''"], ["tokenizer is required: give tokenizer=BUNDLE"]),
        (["updates=abc"], ["updates: expected a whole number, got 'abc'"]),
        (["+logger.wandb.api_key=x"], ["logger.wandb.api_key: others can read it there", "WANDB_API_KEY"]),
        (["logger=wandb", "logger.wandb.key=x"], ["logger.wandb.key: others can read it there"]),
        (["WANDB_API_KEY=x"], ["WANDB_API_KEY: others can read it there"]),
        (["codec.encoder.patch=${data.nope}"], ["codec.encoder.patch: ", "data.nope"]),
        (["codec=seanet_small"], ["codec.sample_rate: takes the value of data.sample_rate, which isn't there"]),
        (["seed=1,2"], ["seed=1,2: has several values; give -m to run each"]),
        (["demo"], ["demo: can't be read; give KEY=VALUE"]),
        (["--config-dir", "nowhere"], ["nowhere"]),
        (["hydra.run.dir=stdout/run"], ["stdout/run: can't write the run there", "hydra.run.dir=FOLDER"]),
        (["name=worker"], ["signal: too short, give more"]),
        (["--multirun", "bottleneck=vq,vqqq"], ["bottleneck=vqqq: no such option"]),
        (["--multirun", "seed=1,2", "trainer.devices=2"], ["trainer.devices=2: a sweep trains on one device"]),
    ],
    ids=lambda value: "_".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_status_2(tmp_path: Path, words: list[str], parts: list[str]) -> None:
    result = Result(tmp_path, *words)
    assert result.status == 2, result.err
    (line,) = result.err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(part in line for part in parts), line
    assert "updates 1" not in result.out, "the task went on"


def test_values_are_held_against_their_defaults() -> None:
    """In this process, as the one that a program adds to it is tested above."""
    for word, told in (
        ("updates=1.5", "updates: expected a whole number, got 1.5"),
        ("updates=null", "updates: expected a whole number, got None"),
        ("training.ema_decay=high", "training.ema_decay: expected a number, got 'high'"),
        ("training.freeze=encoder", "training.freeze: expected a list, got 'encoder'"),
        ("loader=3", "loader: holds batch_size"),
        ("optim.warmup=x", "optim.warmup: expected a whole number, got 'x'"),
    ):
        with pytest.raises(UserError, match=told):
            compose.check(composed(word))


def test_no_path_is_empty() -> None:
    """By whatever way: an environment variable in a YAML file, or quoted."""
    cached = "objective.teachers.dinov2.cached"
    for words, told in (
        (['init_from=""'], "init_from: is empty"),
        (["resume='${oc.env:NO_SUCH_VARIABLE,\"\"}'"], "resume: is empty"),
        (["data=image_folder", "data.root=''"], "data.root: is empty"),
        (["experiment=audio/demo", "data=audio_mix", "data.roots={speech: ''}"], "data.roots.speech: is empty"),
        (["experiment=image/demo", "guide=dinov2", f"{cached}=''"], f"{cached}: is empty"),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(told)}"):
            compose.check(composed(*words))


def test_a_configuration_with_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "logger").mkdir()
    target = "varitok.codecs.training.logging.wandb.WandbLog"
    text = f"wandb:\n  _target_: {target}\n  name: x\n  api_key: secret\n"
    (tmp_path / "logger" / "mine.yaml").write_text(text)
    result = Result(tmp_path, "--config-dir", ".", "logger=mine")
    assert result.status == 2 and "logger.wandb.api_key: others can read it there" in result.err
    assert "secret" not in result.err


def test_a_trial_of_wandbs_agent_has_a_folder_of_its_own(tmp_path: Path) -> None:
    result = Result(tmp_path, WANDB_SWEEP_ID="abc", WANDB_RUN_ID="xyz")
    assert result.status == 0 and (tmp_path / "runs/varitok/abc/xyz/config.yaml").is_file()


@pytest.mark.parametrize(("name", "error"), [("mistake", "varitok.UserError"), ("defect", "KeyError")])
def test_full_error_keeps_the_traceback(tmp_path: Path, name: str, error: str) -> None:
    result = Result(tmp_path, f"name={name}", HYDRA_FULL_ERROR="1")
    assert result.status == 1
    assert "Traceback" in result.err
    assert error in result.err


def test_a_defect_keeps_its_traceback(tmp_path: Path) -> None:
    result = Result(tmp_path, "name=defect")
    assert result.status == 1
    assert "KeyError: 'a defect'" in result.err
    assert Path(__file__).name in result.err


@pytest.mark.parametrize("name", ["interrupt", "lightning"])
def test_an_interrupt_is_130(tmp_path: Path, name: str) -> None:
    result = Result(tmp_path, f"name={name}")
    assert result.status == 130
    assert "Traceback" not in result.err


def test_values_become_what_their_defaults_are(tmp_path: Path) -> None:
    result = Result(tmp_path, "updates=1e3", "name=7", "checkpoint.archive=600", "checkpoint.keep=null")
    assert "updates 1000 name '7'" in result.out, result.err
    (saved,) = tmp_path.glob("runs/7/*/config.yaml")
    assert OmegaConf.load(saved).checkpoint == {"every": 200, "archive": 600, "keep": None, "best": None}


def test_sweep_runs_each(tmp_path: Path) -> None:
    result = Result(tmp_path, "--multirun", "seed=1,2")
    assert result.status == 0, result.err
    assert "seed 1" in result.out
    assert "seed 2" in result.out
    assert len(list(tmp_path.glob("runs/varitok/*_sweep/*/config.yaml"))) == 2


def test_overrides_and_options_come_in_any_order(tmp_path: Path) -> None:
    result = Result(tmp_path, "updates=7", "-m", "seed=1,2", "--config-dir", ".", "name=x")
    assert [line for line in result.out.splitlines() if line.startswith("updates")] == [
        "updates 7 name 'x' seed 1",
        "updates 7 name 'x' seed 2",
    ], result.err
    (tmp_path / "lr=1" / "experiment").mkdir(parents=True)
    (tmp_path / "lr=1" / "experiment" / "mine.yaml").write_text("# @package _global_\nupdates: 5\n")
    assert "updates 5 name 'y'" in Result(tmp_path, "name=y", "--config-dir", "lr=1", "experiment=mine").out


# The parser itself is tested with any name (tests/codecs/training/config/test_overrides.py).
@pytest.mark.parametrize("folder", ["Größe (1e3)", "it's #1 & [only], 写真", "~a=b"])
def test_a_folder_may_have_any_name(tmp_path: Path, folder: str) -> None:
    result = Result(tmp_path, f"init_from={folder}", f"hydra.run.dir={folder}/run")
    assert result.status == 0, result.err
    assert OmegaConf.load(tmp_path / folder / "run" / "config.yaml").init_from == str(tmp_path / folder)


def test_hydras_own_options_work(tmp_path: Path) -> None:
    assert "experiment" in Result(tmp_path, "--help").out
    shown = Result(tmp_path, "--cfg", "job", "updates=3")
    assert OmegaConf.create(shown.out).updates == 3


def test_own_experiments_from_a_config_dir(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "experiment" / "mine.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("# @package _global_\nupdates: 7\n")
    assert "updates 7" in Result(tmp_path, "--config-dir", "mine", "experiment=mine").out
    line = Result(tmp_path, "--config-dir", "mine", "experiment=mien").err
    assert "did you mean experiment=mine?" in line
    assert "image/demo" in line


def test_a_saved_run_repeats_in_a_new_folder(tmp_path: Path) -> None:
    first = Result(tmp_path, "updates=5", "bottleneck=fsq", "hydra.run.dir=first", "name=again")
    assert first.status == 0, first.err
    saved = (tmp_path / "first" / "config.yaml").read_text()
    of_before = saved.replace("codecs.lengths.policy.LengthPolicy", "codecs.lengths.LengthPolicy")
    assert of_before != saved
    (tmp_path / "first" / "config.yaml").write_text(of_before)
    again = Result(tmp_path, "--config-dir", "first", "--config-name", "config")
    assert "updates 5 name 'again'" in again.out, again.err
    (folder,) = (tmp_path / "runs" / "again").iterdir()
    assert (folder / "config.yaml").read_text() == saved
    changed = Result(tmp_path, "--config-dir", "first", "--config-name", "config", "updates=6", "hydra.run.dir=second")
    assert "updates 6" in changed.out
    group = Result(tmp_path, "--config-dir", "first", "--config-name", "config", "bottleneck=vq")
    assert group.status == 2
    assert "bottleneck: there is no group" in group.err


def test_paths_are_saved_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run is repeated and resumed from any folder. Values that are no paths, or lead nowhere, stay as given."""
    for name in ("photos", "run", "auto"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    data = {"root": "photos", "roots": {"near": "./photos", "far": "s3://photos"}, "clips": {"root": "../x"}}
    config = {"data": data, "init_from": "run", "resume": "auto", "name": "run", "tokenizer": None}
    compose.save_resolved(OmegaConf.create(config), tmp_path)
    saved = OmegaConf.load("config.yaml")
    photos = str(tmp_path / "photos")
    roots = {"near": photos, "far": "s3://photos"}
    assert saved.data == {"root": photos, "roots": roots, "clips": {"root": "../x"}}
    assert saved.init_from == str(tmp_path / "run")
    assert (saved.resume, saved.name, saved.tokenizer) == ("auto", "run", None)


def test_provenance_names_versions_and_no_local_path(tmp_path: Path) -> None:
    Result(tmp_path, f"resume={tmp_path}/here.ckpt", "hydra.run.dir=run")
    text = (tmp_path / "run" / "provenance.json").read_text()
    found = json.loads(text)
    assert str(tmp_path) not in text
    assert found["argv"] == ["program.py", "resume=here.ckpt", "hydra.run.dir=run"]
    assert {"python", "varitok", "torch", "pytorch-lightning", "hydra-core"} <= set(found["versions"])
    if (ROOT / ".git").exists():
        assert len(found["git"]["commit"]) == 40


def test_only_the_first_process_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = OmegaConf.create({"name": "x", "a": 1, "b": "${a}"})
    monkeypatch.setenv("RANK", "1")
    compose.save_resolved(config, tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    compose.save_resolved(config, tmp_path)
    saved = OmegaConf.load(tmp_path / "config.yaml")
    assert saved.b == 1
    assert "${run_id:}" in (tmp_path / "config.yaml").read_text(), "a repeated run makes a new folder"


def test_experiments_are_global() -> None:
    """Without this first line Hydra puts its keys below `experiment`, where they do nothing."""
    for name in EXPERIMENTS:
        assert (CONFIGS / "experiment" / name).read_text().startswith("# @package _global_\n"), name


# The small twins are composed where they take two updates (test_training.py, test_image_experiments.py).
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * name.stem.endswith(("_small", "_64")), id=str(name))
        for name in EXPERIMENTS
    ],
)
def test_an_experiment_composes(name: Path, tmp_path: Path) -> None:
    overrides = [f"experiment={name.with_suffix('').as_posix()}"]
    if name.parts[0] == "prior":  # what it reads of the tokenizer's bundle
        told = {"image_size": 64, "sampling_rate": 16000, "hop_length": 320, "channels": 1}
        (tmp_path / "config.json").write_text(json.dumps(told | {"hop": [4, 8, 8], "lead": 3, "frame_rate": 8.0}))
        overrides.append(f"tokenizer={tmp_path}")
    _check(*overrides)


def _chosen() -> set[str]:
    """List the options that experiments choose, which are composed with these."""
    text = "".join(path.read_text() for path in (CONFIGS / "experiment").rglob("*.yaml"))
    return {f"{group}/{name}.yaml" for group, name in re.findall(r"override /(\w+)\S*: (\w+)", text)}


# The experiment that has what an option asks for; all others compose without one.
HOMES = {
    "audio/demo": ("codec=seanet", "data=audio", "data=libri", "data=s", "guide=h", "guide=w"),
    "video/demo": ("data=kinetics", "data=ucf101", "objective=video"),
    "video/nerv_pp_small": ("length=weight_bits",),
}


def _rounds() -> list[list[str]]:
    """Choose the options that no experiment chooses, each once, and as many at once as there are groups."""
    paths = [path.relative_to(CONFIGS) for path in sorted(CONFIGS.glob("*/*.yaml"))]
    options = [
        f"{path.parent}={path.stem}"
        for path in paths
        if path.parts[0] not in ("experiment", "debug", "finetune", "sweep") and path.as_posix() not in _chosen()
    ]
    homes = {option: home for home, heads in HOMES.items() for option in options if option.startswith(heads)}
    rounds: list[dict[str, str]] = []
    for option in sorted(options, key=lambda option: option not in homes):
        group, _, name = option.partition("=")
        home = homes.get(option, "image/demo" if group in ("codec", "data", "guide", "length", "objective") else "")
        fitting = (one for one in rounds if group not in one and home in ("", one["experiment"]))
        made = next(fitting, None)
        if made is None:
            rounds.append(made := {"experiment": home or "image/demo"})
        made[group] = name
    return [[f"{group}={name}" for group, name in one.items()] for one in rounds]


@pytest.mark.parametrize("words", _rounds(), ids=" ".join)
def test_options_compose(words: list[str]) -> None:
    _check(*words)


def test_what_tests_compose_is_what_hydra_composes() -> None:
    """By `composed`, which chooses groups once, and sets values in a copy."""
    words = ["experiment=audio/demo", "updates=3", "bottleneck=vq", "~data.val_seconds", "+optim.new=1", "export=none"]
    for _ in range(2):  # composed, and kept
        found = composed(*words)
        with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
            wanted = hydra.compose("train", words)
        assert found == wanted and OmegaConf.to_yaml(found) == OmegaConf.to_yaml(wanted)
        assert OmegaConf.is_struct(found)
        found.updates = 4  # which must not stay


def _check(*words: str) -> None:
    config = composed(*words)
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "FOLDER")
    compose.check(config)


@pytest.mark.parametrize(
    ("modality", "option", "folder"),
    [("image", "image_folder", "photos"), ("audio", "audio_folder", "speech"), ("video", "video_folder", "clips")],
)
def test_a_demo_takes_a_folder_of_files(modality: str, option: str, folder: str) -> None:
    """Nothing in the experiment may be an argument of its synthetic dataset alone."""
    config = composed(
        f"experiment={modality}/demo", f"data={option}", f"data.root={ROOT / 'data' / 'embedded' / folder}"
    )
    splits = build(config.data)
    assert len(splits.train) > len(splits.val) >= 1
    assert splits.val[0, 0].shape[0] == (1 if modality == "audio" else 3)


@pytest.mark.parametrize(
    ("experiment", "option", "dropped"),
    [
        ("audio/dmel", "data=audio_folder", "without data.val_length, which"),
        ("audio/demo", "bottleneck=fsq", "without bottleneck.num_codebooks, bottleneck.level, which"),
        ("image/demo", "bottleneck=vq", ""),
    ],
)
def test_an_option_drops_what_the_experiment_sets_for_its_own(
    caplog: pytest.LogCaptureFixture, experiment: str, option: str, dropped: str
) -> None:
    words = [f"experiment={experiment}", option]
    config = composed(*words)
    with caplog.at_level(logging.INFO):
        drop_foreign(config, words, [CONFIGS])
    assert caplog.text.count("without") == bool(dropped) and dropped in caplog.text
    if option.startswith("bottleneck"):
        assert build(config.bottleneck).dim >= 1
    kept = composed(*words, "+bottleneck.nope=1")
    drop_foreign(kept, [*words, "+bottleneck.nope=1"], [CONFIGS])
    assert kept.bottleneck.nope == 1, "a user's own key is answered by what takes it"


def test_check_names_every_missing_value() -> None:
    config = OmegaConf.create({"data": {"root": "???", "size": "???"}})
    with pytest.raises(
        UserError, match=r"data\.root, data\.size are required: give data\.root=FOLDER data\.size=VALUE"
    ):
        compose.check(config)


@pytest.mark.parametrize(
    "group", ["perceptual", "perceptual_adversarial", "video_perceptual", "video_perceptual_adversarial"]
)
def test_lpips_takes_the_place_of_structure(group):
    terms = composed("experiment=image/demo", f"objective={group}").objective.terms
    assert terms.structure is None and terms.lpips.weight == 1
