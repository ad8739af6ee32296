"""Sweeps: their files, as W&B reads them and as we do; a search that is killed, or fails; what it has found."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import sweeps
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from PIL import Image
from wandb.sdk.launch.sweeps import utils as agent

from varitok import UserError
from varitok.codecs.training.config.compose import check
from varitok.codecs.training.logging.loggers import CsvLog
from varitok.codecs.training.logging.scalars import read_scalars
from varitok.codecs.training.run import build_run
from varitok.codecs.training.sweep import search
from varitok.codecs.training.sweep.cli import main
from varitok.codecs.training.sweep.figure import draw_parallel
from varitok.codecs.training.sweep.results import Result, Results, read_results
from varitok.codecs.training.sweep.space import read_sweep, word

from ....composing import composed

ROOT = Path(__file__).parents[4]
FILES = sorted((ROOT / "configs/sweep").glob("*.yaml"))

# Stands for train.py where what matters is how a run ends: x says what comes of it.
STUB = """
import os, signal, sys, time
from pathlib import Path
words = dict(word.partition("=")[::2] for word in sys.argv[1:])
folder, x = Path(words["hydra.run.dir"]), float(words["x"])
with (folder / "lives").open("a") as file:
    file.write(f"{x}\\n")
if x > float(words.get("fails_above", "inf")):
    sys.exit("error: x: too large, give less")
signal.signal(signal.SIGTERM, lambda number, _: sys.exit(143))
signal.signal(signal.SIGINT, lambda number, _: sys.exit(130))
with (folder / "metrics.csv").open("w") as file:
    file.write("update,name,value\\n")
    for update in range(1, 5):
        file.write(f"{update},val/x,{x * update}\\n")
        file.flush()
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(float(words.get("pause", "0")))
"""
SWEEP = {
    "method": "random",
    "metric": {"name": "val/x", "goal": "maximize"},
    "parameters": {"x": {"min": 0.0, "max": 1.0}, "logger": {"value": "wandb"}},
}


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """A program in the place of train.py."""
    (tmp_path / "stub.py").write_text(STUB)
    monkeypatch.setattr(search, "PROGRAM", [str(tmp_path / "stub.py")])
    monkeypatch.setattr(search, "PULSE", 0.02)


def written(folder, **changes):
    (folder / "sweep.yaml").write_text(yaml.safe_dump(SWEEP | changes))
    return folder / "sweep.yaml"


def sweep(folder, *words):
    main([str(folder / "sweep.yaml"), *words, "--out", str(folder / "out")])


def lives(folder):
    return [len(path.read_text().splitlines()) for path in sorted(folder.glob("out/trial_*/lives"))]


def as_agent(path, runs=()):
    """Return the words that W&B's agent would call train.py with."""
    config = agent.load_sweep_config(str(path))
    drawn = sweeps.next_run(config, list(runs)).config
    drawn = json.loads(json.dumps(drawn, default=lambda number: number.item()))
    assert config["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    return agent.create_sweep_command_args({"args": drawn})["args_no_hyphens"]


def synthetic(path):
    """Return overrides for data without files."""
    made = {"image": "dead_leaves", "audio": "voices", "video": "scenes"}
    return [f"data={made[path.stem.partition('_')[0]]}"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_wandbs_and_ours(path):
    assert not sweeps.schema_violations_from_proposed_config(agent.load_sweep_config(str(path)))
    found = read_sweep(path)
    assert found.fixed["logger"] == "wandb" and len(found.space) >= 3
    check(composed(*as_agent(path), *synthetic(path)))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = found.words(optuna.create_study().ask(found.space).params)
    check(composed(*(f"{key}={value}" for key, value in (found.fixed | drawn).items()), *synthetic(path)))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_files_metric_is_logged(path, tmp_path):
    small = ["debug=one_batch", "export=none", "callbacks.samples=null", "data.val_length=2", "trainer.accelerator=cpu"]
    words = [word for word in as_agent(path) if not word.startswith("logger=")] + synthetic(path)
    run = build_run(composed(*words, *small, "trainer.enable_progress_bar=false"), tmp_path)
    run.trainer.fit(run.module, run.data)
    assert read_sweep(path).metric in read_scalars(tmp_path / "metrics.csv")


PARSER = OverridesParser.create()
TEXT = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "Zs"], exclude_characters="\\$"), min_size=1)


@settings(max_examples=20)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.floats(-1e9, 1e9) | TEXT,
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    )
)
@example("0")
@example("a,b = {it's}")
@example(["null", None, "[x]", True])
def test_hydra_reads_what_a_word_says(value):
    (override,) = PARSER.parse_overrides([f"key={word(value)}"])
    found = override.value()
    assert (str(found) if isinstance(value, str) else found) == value


def test_parameters_are_read_as_wandb_does(tmp_path):
    written(
        tmp_path,
        method="bayes",
        run_cap=7,
        early_terminate={"type": "hyperband", "s": 2, "eta": 3, "max_iter": 27},
        parameters={
            "a": {"value": None},
            "b": {"values": [[8, 5], "a,b"]},
            "c": {"min": 1, "max": 3},
            "d": {"min": 1.0, "max": 3},
            "e": {"distribution": "q_log_uniform_values", "min": 8, "max": 64, "q": 8},
        },
    )
    found = read_sweep(tmp_path / "sweep.yaml")
    assert found.fixed == {"a": "null"}
    assert found.space == {
        "b": CategoricalDistribution(["[8,5]", "'a,b'"]),
        "c": IntDistribution(1, 3),
        "d": FloatDistribution(1, 3),
        "e": FloatDistribution(8, 64, log=True),
    }
    assert found.trials == 7 and found.halving == (3, 3)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    drawn = [found.words(study.ask(found.space).params) for _ in range(30)]
    assert {float(words["e"]) % 8 for words in drawn} == {0} and len({words["e"] for words in drawn}) > 2
    assert {words["c"] for words in drawn} == {"1", "2", "3"}
    assert {words["b"] for words in drawn} == {"[8,5]", "'a,b'"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"method": "guess"}, "method: guess is none of bayes, random, grid"),
        ({"metod": "bayes"}, "metod: not supported"),
        ({"metric": {"goal": "maximize"}}, "metric: give its name"),
        ({"program": "other.py"}, r"program: other\.py can't be run here"),
        ({"parameters": {"x": {"value": 1}}}, "parameters: all are constant"),
        ({"parameters": {"x": 3}}, r"parameters\.x: give it a value"),
        ({"parameters": {"x": {"parameters": {"y": {"value": 1}}}}}, r"parameters\.x: nested values"),
        ({"parameters": {"x": {"min": 1}}}, r"parameters\.x: uniform takes numbers as min and max"),
        ({"parameters": {"x": {"min": 3, "max": 1}}}, r"parameters\.x: min must be below max"),
        ({"parameters": {"x": {"mu": 1, "sigma": 2, "distribution": "normal"}}}, "distribution normal is none of"),
        ({"parameters": {"x": {"min": 1, "max": 2, "p": 1}}}, r"parameters\.x: p is not supported with int_uniform"),
        ({"method": "grid"}, "method: a grid has no ranges"),
        ({"early_terminate": {"type": "envelope"}}, "early_terminate: give type: hyperband"),
    ],
)
def test_a_mistake_in_a_file_is_one_line(tmp_path, changes, told):
    written(tmp_path, **changes)
    with pytest.raises(UserError, match=told) as raised:
        sweep(tmp_path, "--trials", "1")
    assert "\n" not in str(raised.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere.yaml"], r"nowhere\.yaml: No such file"),
        ([], "give a sweep's file, or --summary FOLDER"),
        (["sweep.yaml"], "has no run_cap; give --trials"),
        (["sweep.yaml", "seed", "--trials", "1"], "seed: can't be read; give KEY=VALUE"),
        (["sweep.yaml", "--trials", "1", "--jobs", "0"], "--jobs=0: must be at least 1"),
        (["--summary", "."], "no runs that were evaluated"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(tmp_path, monkeypatch, words, told):
    written(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        main(words)


def test_a_sweep_goes_on_where_it_was(tmp_path, stub, capsys):
    written(tmp_path)
    sweep(tmp_path, "--trials", "2")
    sweep(tmp_path, "--trials", "5")
    results = read_results(tmp_path / "out")
    values = [result.value for result in results.runs]
    assert lives(tmp_path) == [1] * 5 and results.maximize
    assert values == sorted(values, reverse=True) and len(set(values)) == 5
    assert all(float(run.parameters["x"]) * 4 == pytest.approx(run.value, rel=1e-6) for run in results.runs)
    with (tmp_path / "out/results.csv").open() as file:
        assert file.readline() == "# best: the largest val/x\n"
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [run.name for run in results.runs] and rows[0]["state"] == "finished"
    assert "trial_004" in capsys.readouterr().out
    with pytest.raises(UserError, match="has trials of another sweep or of other overrides"):
        sweep(tmp_path, "--trials", "6", "pause=0.1")


def test_a_grid_tries_each_once(tmp_path, stub):
    written(tmp_path, method="grid", parameters={"x": {"values": [0.1, 0.2, 0.4]}, "y": {"values": ["a", "b"]}})
    sweep(tmp_path)
    tried = [(run.parameters["x"], run.parameters["y"]) for run in read_results(tmp_path / "out").runs]
    assert len(tried) == len(set(tried)) == 6


def test_a_failed_trial_is_told_and_too_many_end_the_sweep(tmp_path, stub, capsys):
    written(tmp_path, method="grid", parameters={"x": {"values": [0.1, 0.9, 0.2]}})
    sweep(tmp_path, "fails_above=0.5")
    assert "trial_001: failed, status 1: error: x: too large, give less; x=0.9" in capsys.readouterr().out
    found = {run.name: run for run in read_results(tmp_path / "out").runs}
    assert found["trial_001"].state.startswith("status 1: error: x") and found["trial_001"].value is None
    written(tmp_path, method="grid", parameters={"x": {"values": [0.1, 0.9, 0.8, 0.7, 0.2]}})
    with pytest.raises(UserError, match="3 trials in a row have failed, the last by: status 1: error: x: too large"):
        main([str(tmp_path / "sweep.yaml"), "fails_above=0.5", "--out", str(tmp_path / "second")])
    assert len(read_results(tmp_path / "second").runs) == 4


def test_trials_that_fall_behind_end_early(tmp_path, stub):
    written(
        tmp_path,
        method="grid",
        parameters={"x": {"values": [0.9, 0.1, 0.2]}},
        early_terminate={"type": "hyperband", "min_iter": 1, "eta": 2},
    )
    sweep(tmp_path, "pause=0.4")
    found = {run.name: (run.state, run.updates) for run in read_results(tmp_path / "out").runs}
    assert found["trial_000"] == ("finished", 4)
    assert found["trial_001"][0] == found["trial_002"][0] == "fell behind" and found["trial_002"][1] < 4


@pytest.mark.slow
def test_jobs_run_side_by_side_on_devices_of_their_own(tmp_path, stub, monkeypatch):
    with (tmp_path / "stub.py").open("a") as file:
        file.write('(folder / "device").write_text(os.environ["CUDA_VISIBLE_DEVICES"])\n')
        file.write('(folder / "threads").write_text(os.environ["OMP_NUM_THREADS"])\n')
    written(tmp_path)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    sweep(tmp_path, "--trials", "4", "--jobs", "2", "pause=0.3")
    begun = [path.stat().st_mtime for path in sorted(tmp_path.glob("out/trial_*/lives"))]
    assert lives(tmp_path) == [1] * 4 and begun[1] - begun[0] < 1.0
    assert {path.read_text() for path in tmp_path.glob("out/*/device")} == {"4", "7"}
    assert {path.read_text() for path in tmp_path.glob("out/*/threads")} == {
        str(max(1, len(os.sched_getaffinity(0)) // 2))
    }


def started(folder, *words):
    """Start the command in a process of its own, with the stub in the place of train.py."""
    script = f"""
from varitok.codecs.training.sweep import search
search.PROGRAM = [{str(folder / "stub.py")!r}]
from varitok.export.cli.main import main
main(["sweep", {str(folder / "sweep.yaml")!r}, "--out", {str(folder / "out")!r}, *{list(words)!r}])
"""
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait_for(path):
    until = time.monotonic() + 900
    while not path.exists() or not path.read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(path.read_text())


@pytest.mark.slow
def test_a_stopped_sweep_leaves_a_trial_that_goes_on(tmp_path, stub):
    written(tmp_path)
    first = started(tmp_path, "--trials", "2", "pause=30")
    wait_for(tmp_path / "out/trial_000/begun")
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=900)
    assert first.returncode == 130 and "run the same command again" in err and "was stopped" in out, err
    drawn = (tmp_path / "out/trial_000/lives").read_text()
    (tmp_path / "stub.py").write_text(STUB.replace('words.get("pause", "0")', '"0"'))
    sweep(tmp_path, "--trials", "2", "pause=30")
    assert lives(tmp_path) == [2, 1] and (tmp_path / "out/trial_000/lives").read_text() == drawn * 2
    assert [run.state for run in read_results(tmp_path / "out").runs] == ["finished", "finished"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_when_its_trial_has_ended(tmp_path, stub):
    written(tmp_path)
    first = started(tmp_path, "--trials", "2", "pause=30")
    trial = wait_for(tmp_path / "out/trial_000/begun")
    first.kill()
    first.communicate(timeout=900)
    with pytest.raises(UserError, match="a trial that it left, still runs there"):
        sweep(tmp_path, "--trials", "2", "pause=30")
    os.kill(trial, signal.SIGKILL)
    (tmp_path / "stub.py").write_text(STUB.replace('words.get("pause", "0")', '"0"'))
    until = time.monotonic() + 10
    while True:
        try:
            sweep(tmp_path, "--trials", "2", "pause=30")
            break
        except UserError:
            assert time.monotonic() < until
    assert lives(tmp_path) == [2, 1]


def run_of(folder, value, **config):
    folder.mkdir(parents=True)
    plain = {"name": folder.name, "updates": 4, "logger": {"csv": {"name": folder.name}}} | config
    OmegaConf.save(OmegaConf.create(plain), folder / "config.yaml")
    CsvLog(str(folder), "run").log_metrics({"val/mel@1": 9.0, "val/mel@4": value, "val/si_sdr@1": 1.0}, 4)


def test_any_runs_are_compared_by_what_differs(tmp_path):
    vq = {"_target_": "varitok.codecs.bottlenecks.vq.VectorQuantizer", "dim": 4, "codebook_size": 16}
    fsq = {"_target_": "varitok.codecs.bottlenecks.fsq.FiniteScalarQuantizer", "levels": [8, 8]}
    run_of(tmp_path / "0", 2.0, bottleneck=vq, data={"size": 32}, codec={"size": 32}, seed=0)
    run_of(tmp_path / "deep/1", 1.0, bottleneck=fsq, data={"size": 64}, codec={"size": 64}, seed=0)
    run_of(tmp_path / "2", 3.0, bottleneck=vq, data={"size": 64}, codec={"size": 64}, seed=0, updates=9)
    results = read_results(tmp_path)
    assert results.metric == "val/mel@4" and not results.maximize
    assert [(run.name, run.value, run.state) for run in results.runs] == [
        ("1", 1.0, "finished"),
        ("0", 2.0, "finished"),
        ("2", 3.0, "cut off"),
    ]
    assert results.runs[0].parameters == {"bottleneck": "FiniteScalarQuantizer", "data.size": "64", "updates": "4"}
    assert [run.name for run in read_results(tmp_path, maximize=True).runs] == ["2", "0", "1"]
    with pytest.raises(UserError, match="no run logged val/psnr; there are val/mel@1, val/mel@4, val/si_sdr@1"):
        read_results(tmp_path, "val/psnr")


@settings(max_examples=3)
@given(st.lists(st.tuples(st.floats(1e-6, 1e6), st.sampled_from("abc"), st.floats(-9, 9)), min_size=1, max_size=9))
def test_any_number_of_runs_is_drawn(tmp_path_factory, points):
    runs = [Result(str(at), "finished", 1, z, {"x": str(x), "y": y}) for at, (x, y, z) in enumerate(points)]
    path = tmp_path_factory.mktemp("drawn") / "results.png"
    draw_parallel(path, Results("val/x", True, [*runs, Result("none", "failed", 0, None, {"x": "1", "y": "a"})]))
    with Image.open(path) as picture:
        assert picture.convert("RGB").getcolors(10**6)[1:], "nothing but paper"


@pytest.mark.slow
def test_a_sweep_of_real_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["experiment=image/demo", "data=dead_leaves", "debug=one_batch", "export=none", "data.val_length=2"]
    words += ["trainer.accelerator=cpu"]
    main([str(ROOT / "configs/sweep/image_rate.yaml"), *words, "--trials", "2", "--jobs", "2"])
    results = read_results(tmp_path / "runs/sweep/image_rate")
    assert [run.state for run in results.runs] == ["finished"] * 2
    assert read_results(tmp_path / "runs").metric == "val/psnr@64"


@pytest.mark.slow
def test_wandbs_agent_runs_a_trial_and_the_same_trial_again(tmp_path):
    """Its environment, its words: a folder of its own, a run of its name; a preempted one continues there."""
    words = [*as_agent(ROOT / "configs/sweep/image_rate.yaml"), "debug=one_batch", "export=none"]
    words += ["data=dead_leaves", "data.val_length=2"]
    names = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "trial7", "WANDB_MODE": "offline"}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *words, "trainer.accelerator=cpu"],
            env=os.environ | names, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/*/sweep1/*")
    assert folder.name == "trial7" and "val/psnr@16" in read_scalars(folder / "metrics.csv")
    assert {path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")} == {"trial7"}


def test_without_optuna_it_is_one_line():
    script = (
        "import sys; sys.modules['optuna'] = None\nfrom varitok.export.cli.main import main\nmain(['sweep', 'x.yaml'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "needs the package optuna" in done.stderr and "pip install 'varitok[sweep]'" in done.stderr
