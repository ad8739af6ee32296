"""The bundle at the end of a run, and the command `varitok` on what there is then."""

import io
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

import varitok
from varitok.codecs.training.run import build_run
from varitok.export.cli.main import SUBCOMMANDS, main

from ...codecs.examples import TINY_RUN
from ...composing import composed

SMALL = [
    *TINY_RUN,
    "updates=2",
    "callbacks.samples=null",
    "callbacks.evaluation=null",
    "export=bundle",
    "export.formats=[safetensors]",
]


def trained(folder, *words):
    config = composed(*SMALL, *words)
    OmegaConf.save(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), folder / "config.yaml")
    run = build_run(config, folder)
    run.trainer.fit(run.module, run.data)
    return run.module


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, trained(folder)


@torch.no_grad()
def test_a_run_ends_with_the_bundle_of_its_averaged_codec(run):
    folder, module = run
    codec, signal = varitok.load_torch(folder / "bundle"), torch.rand(3, 3, 16, 16) * 2 - 1
    codes = codec.encode(signal)
    torch.testing.assert_close(codec.decode(codes), module.evaluated.eval().decode(codes).clamp(-1, 1))
    assert module.average is not None
    assert (codec.decode(codes) - module.codec.eval().decode(codes).clamp(-1, 1)).abs().max() > 1e-5
    config = json.loads((folder / "bundle" / "config.json").read_text())
    assert config["architecture"]["codec"]["encoder"]["type"] == "RegisterEncoder"


@pytest.mark.slow
@torch.no_grad()
def test_the_graphs_of_a_run_are_its_averaged_codec(tmp_path):
    module = trained(tmp_path, "export.formats=[onnx]")
    bundle = varitok.load(tmp_path / "bundle")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    codes = bundle.encode(pixels)
    expected = module.evaluated.eval().decode(torch.from_numpy(codes)).clamp(-1, 1)
    np.testing.assert_allclose(bundle.decode(codes), expected, atol=1e-5)


def test_the_command_makes_the_same_codec(run, tmp_path, capsys):
    folder, _ = run
    main(
        [
            "export",
            str(folder / "checkpoints" / "last.ckpt"),
            "--out",
            str(tmp_path / "out"),
            "--formats",
            "safetensors",
        ]
    )
    shown = capsys.readouterr().out
    assert "model.safetensors" in shown and "parity holds" in shown and "KiB" in shown
    config = (tmp_path / "out" / "config.json").read_text()
    assert config == (folder / "bundle" / "config.json").read_text()
    assert "_target_" not in config and str(folder) not in config
    weights = [load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "bundle")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["export", "nowhere"], "varitok export: nowhere"),
        (["export", "RUN", "--formats", "onxx"], "varitok export: "),
        (["export", "RUN", "--out", "RUN/checkpoints"], "varitok export: "),
        (["exprot", "RUN"], "varitok: 'exprot' is no subcommand; did you mean export?"),
        (["zzz"], "varitok: 'zzz' is no subcommand; there are train, "),
        (["info", "nowhere"], "varitok info: nowhere: neither a bundle "),
        (["info", "RUN/checkpoints"], "varitok info: RUN/checkpoints: neither a bundle "),
        (["completion", "cmd"], "varitok completion: cmd: "),
        (["evaluate", "RUN", "--data", ""], "varitok evaluate: --data: is empty; "),
        (["evaluate", "RUN", "--data="], "varitok evaluate: --data: is empty; "),
        (["encode", "RUN/bundle", ""], "varitok encode: argument 2: is empty; "),
    ],
)
def test_mistakes_end_in_one_line(run, words, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main([word.replace("RUN", str(run[0])) for word in words])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(told.replace("RUN", str(run[0]))) and error.count("\n") == 1


@pytest.mark.parametrize("words", [["--help"], ["info", "--help"], ["info", "BUNDLE"], ["train", "--cfg", "job"]])
def test_a_reader_that_ends_is_no_error(exported, words):
    """`varitok info BUNDLE | head`: the pipe is closed before or while the command writes to it."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "varitok.export.cli.main"]
    command += [word.replace("BUNDLE", str(exported[1])) for word in words]
    env = os.environ | {"PYTHONUNBUFFERED": ""}  # or argparse would pass over the error
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=env)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, "")


def test_help_names_all_there_is(capsys):
    main([])
    shown = capsys.readouterr().out
    assert all(f"varitok {name} {one.example}" in shown for name, one in SUBCOMMANDS.items())
    main(["--version"])
    assert capsys.readouterr().out == f"varitok {varitok.__version__}\n"


@pytest.mark.parametrize("name", [name for name in SUBCOMMANDS if name != "train"])  # whose help is Hydra's
def test_each_subcommand_helps_by_an_example_and_refuses_what_it_does_not_know(name, capsys):
    with pytest.raises(SystemExit) as left:
        main([name, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert left.value.code == 0 and f"usage: varitok {name}" in shown and f"varitok {name} " in shown.split("usage")[1]
    answering = ("shards", "evaluate", "export", "compare", "probe", "encode", "decode", "info", "doctor")
    assert ("--json" in shown) == (name in answering)
    with pytest.raises(SystemExit) as left:
        main([name, "--nonsense"])
    assert left.value.code == 2


def test_evaluate_and_export_tell_scripts_what_they_found(run, tmp_path, capsys):
    folder, module = run
    main(["evaluate", str(folder), "--metrics", "psnr", "--out", str(tmp_path / "table"), "--workers", "0", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert rows[-1]["k"] == module.codec.tokens and all(row["psnr"] > 0 for row in rows)
    main(["export", str(folder), "--formats", "safetensors", "--out", str(tmp_path / "bundle"), "--json"])
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "bundle" / "export.json").read_text())


def test_info_tells_of_a_run_and_of_its_checkpoint(run, capsys):
    folder, module = run
    found = []
    for path in (folder, folder / "checkpoints" / "last.ckpt"):
        main(["info", str(path), "--json"])
        found.append(json.loads(capsys.readouterr().out))
    of_run, of_checkpoint = found
    assert of_run | {"run": ""} == of_checkpoint | {"run": ""}
    assert of_run["weights"] == sum(weight.numel() for weight in module.evaluated.parameters())
    assert of_run["codebook_sizes"] == list(module.codec.bottleneck.codebook_sizes)


def test_info_tells_of_a_bundle(exported, capsys):
    codec, folder, _ = exported
    main(["info", str(folder), "--json"])
    bundle = json.loads(capsys.readouterr().out)
    sizes = {name: (folder / name).stat().st_size for name in bundle["file_bytes"]}
    assert sizes == bundle["file_bytes"] and "config.json" in sizes
    assert bundle["rates"][f"{codec.tokens} tokens"] == f"{codec.bits(codec.tokens) / 8:g} bytes for an image"
    main(["info", str(folder)])
    shown = capsys.readouterr().out
    assert "modality" in shown and f"{codec.tokens} tokens" in shown and "config.json" in shown


@pytest.mark.slow
def test_info_of_a_bundle_and_of_its_run_agree(tmp_path, capsys):
    trained(tmp_path, "export.formats=[onnx]")
    capsys.readouterr()
    found = []
    for path in (tmp_path / "bundle", tmp_path):
        main(["info", str(path), "--json"])
        found.append(json.loads(capsys.readouterr().out))
    bundle, of_run = found
    assert (
        bundle["codebook_sizes"] == of_run["codebook_sizes"] and bundle["bits_of_a_token"] == of_run["bits_of_a_token"]
    )


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_finds_subcommands_options_and_experiments(shell, tmp_path, capsys):
    main(["completion", shell])
    script = tmp_path / "script"
    script.write_text(capsys.readouterr().out)
    if not shutil.which("bash"):
        pytest.skip("no bash here")
    for words, wanted in [
        ("varitok in", {"info"}),
        ("varitok info --js", {"--json"}),
        ("varitok train experiment=video/vidtok_", {"experiment=video/vidtok_small", "experiment=video/vidtok_kl"}),
    ]:
        ask = f"source {script}; COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1)); _varitok"
        done = subprocess.run(
            ["bash", "-c", f'{ask}; printf "%s\n" "${{COMPREPLY[@]}}"'], capture_output=True, text=True, check=False
        )
        found = set(done.stdout.split())
        assert wanted <= found and len(found) < 8, (found, done.stderr)


def test_completion_of_fish(tmp_path, capsys):
    main(["completion", "fish"])
    text = capsys.readouterr().out
    assert '-n "__fish_seen_subcommand_from info" -a "--help --json"' in text
    if not shutil.which("fish"):
        pytest.skip("no fish here")
    (tmp_path / "script").write_text(text)
    for words, wanted in [("varitok in", "info"), ("varitok info --js", "--json")]:
        ask = f"source {tmp_path / 'script'}; complete -C '{words}'"
        done = subprocess.run(["fish", "-c", ask], capture_output=True, text=True, check=False)
        assert wanted in done.stdout.split(), done.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_told_on_terminals_only(terminal, monkeypatch):
    shown = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", shown)
    assert list(varitok.progress(iter("abc"), 3, "files")) == ["a", "b", "c"]
    text = shown.getvalue()
    assert ("0/3 files" in text and "2/3 files, 0:00 left" in text and text.endswith("\x1b[K")) == terminal
    assert bool(text) == terminal
