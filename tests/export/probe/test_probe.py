"""Probes of codes: labels by folder, CSV and transcript, honest cross-validation, mistakes in one line."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.export.cli.main import main
from varitok.export.exporters.bundle import architecture
from varitok.export.probe.labels import Span, read_labels
from varitok.export.probe.latents import mutual_information
from varitok.export.probe.probes import PROBES, Score, Sequences, cross_validate, ctc, interval

from ...codecs.examples import HOP, RATE, WIDTH

CLASSES, WIDE = 3, 4
SIZES = {"width": WIDTH, "base": 8, "strides": [5, 8], "dilations": [3]}


def sequences(seed: int, files: int = 30, length: int = 12, groups: int | None = None) -> Sequences:
    """Draw latents whose class is that of the previous token, so that a token itself says nothing of its own."""
    random = torch.Generator().manual_seed(seed)
    latents, targets = [], []
    for _ in range(files):
        classes = torch.randint(CLASSES, (length,), generator=random)
        latents.append(torch.eye(CLASSES)[classes] + 0.1 * torch.randn(length, CLASSES, generator=random))
        targets.append(torch.cat([torch.tensor([-1]), classes[:-1]]))
    return Sequences(latents, targets, [str(index % (groups or files)) for index in range(files)], CLASSES)


def share(scores: list[Score]) -> float:
    return sum(score.right for score in scores) / sum(score.counted for score in scores)


def test_convolutions_see_neighbours_and_a_linear_probe_does_not():
    data = sequences(0)
    assert share(cross_validate(data, PROBES["conv"], 3)) > 0.95
    assert share(cross_validate(data, PROBES["linear"], 3)) < 0.5
    own = data._replace(targets=[one.argmax(1) for one in data.latents])
    assert share(cross_validate(own, PROBES["linear"], 3)) > 0.95


def test_a_group_is_not_learned_by_heart():
    """Where latents name the speaker and each speaker has one class by chance, files of known speakers would pass."""
    random = torch.Generator().manual_seed(0)
    speakers = torch.arange(60) % 12
    latents = [torch.eye(12)[one][None] + 0.01 * torch.randn(1, 12, generator=random) for one in speakers]
    targets = [(one % 2)[None] for one in speakers]
    apart = Sequences(latents, targets, [str(int(one)) for one in speakers], 2)
    assert share(cross_validate(apart._replace(groups=[str(i) for i in range(60)]), PROBES["linear"], 5)) == 1
    assert share(cross_validate(apart, PROBES["linear"], 6)) < 0.8


def test_ctc_writes_down_what_is_there():
    random = torch.Generator().manual_seed(0)
    latents, targets = [], []
    for _ in range(48):
        word = 1 + torch.randperm(CLASSES, generator=random)
        latents.append(torch.eye(CLASSES + 1)[word].repeat_interleave(3, 0))
        targets.append(word)
    data = Sequences(latents, targets, [str(index) for index in range(48)], CLASSES)
    assert share(cross_validate(data, ctc, 3)) < 0.1, "errors per character"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20), st.integers(1, 5))
def test_an_interval_holds_its_share(counts, groups):
    scores = [Score(min(pair), max(pair)) for pair in counts]
    middle, low, high = interval(scores, [str(index % groups) for index in range(len(scores))])
    assert 0 <= low <= high <= 1
    if groups == 1:
        assert low == pytest.approx(high) == pytest.approx(middle)


def test_information_is_of_codes_about_classes():
    classes = torch.tensor([0, 1, 2, 0, 1, 2, -1])
    same = torch.tensor([[5, 6, 7, 5, 6, 7, 9]])
    assert mutual_information([same], [classes], 0) == pytest.approx(1)
    assert mutual_information([torch.zeros_like(same)], [classes], 0) == pytest.approx(0)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    found = [tmp_path / kind / f"{name}.wav" for kind in ("train", "val") for name in ("one", "two")]
    for file in found:
        file.parent.mkdir(exist_ok=True)
        file.touch()
    return found


def write(path: Path, rows: list[dict[str, object]]) -> str:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def test_labels_are_found_by_the_end_of_a_path(tmp_path, files):
    rows = [{"path": "train/one.wav", "label": "a", "group": "x"}, {"path": "val/one.wav", "label": "b", "group": "y"}]
    kind, found = read_labels(write(tmp_path / "labels.csv", rows), files)
    assert kind == "class"
    assert [(one.file, one.label, one.group) for one in found] == [(files[0], "a", "x"), (files[2], "b", "y")]
    assert [one.label for one in read_labels("folders", files)[1]] == ["train", "train", "val", "val"]
    spans = [{"file": "two.wav", "start": i, "end": i + 1, "label": label} for i, label in enumerate("ab")]
    kind, found = read_labels(write(tmp_path / "spans.csv", spans), files)
    assert (kind, [one.file for one in found]) == ("spans", [files[1], files[3]])
    assert found[0].spans == (Span(0, 1, "a"), Span(1, 2, "b"))
    texts = [{"file": "one.wav", "text": "A  B"}]
    kind, found = read_labels(write(tmp_path / "texts.csv", texts), files[:1])
    assert (kind, found[0].text) == ("text", "a b")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"name": "one.wav", "label": "a"}], "needs the columns file, and label or text; it has name, label"),
        ([{"file": "none.wav", "label": "a"}], "names none of the files of --data, such as one.wav"),
        ([{"file": "one.wav", "label": "a"}], "the files have only the class a; a probe needs two"),
        ([{"file": "one.wav", "label": ""}], "the files have no class; a probe needs two"),
        ([{"file": "one.wav", "label": "a", "start": 1, "end": "x"}], "line 2: start and end should be ascending"),
        ([{"file": "one.wav", "label": "a", "start": 2, "end": 1}], "line 2: start and end should be ascending"),
    ],
)
def test_wrong_labels_are_told(tmp_path, files, rows, message):
    with pytest.raises(UserError, match=rf"^--labels .*{message}"):
        read_labels(write(tmp_path / "labels.csv", rows), files)
    with pytest.raises(UserError, match="can't be read as CSV; or write --labels folders"):
        read_labels(str(tmp_path / "nowhere.csv"), files)


def test_too_few_files_are_told():
    data = sequences(0, files=4)
    with pytest.raises(UserError, match=r"^--folds 5: the labeled files are 4 groups; give at most 4$"):
        cross_validate(data, PROBES["linear"], 5)
    classes = data._replace(targets=[torch.tensor([index % 2]) for index in range(4)])
    with pytest.raises(UserError, match=r"^--folds 3: no class has more than 2 files; give at most 2$"):
        cross_validate(classes._replace(latents=[one[:1] for one in data.latents]), PROBES["linear"], 3)


@pytest.fixture(scope="session")
def sounds(once) -> Path:
    """Return a bundle of sounds that says how its codec was built: a token for every 40 samples, 4 codebooks."""
    networks, bottlenecks = "varitok.codecs.networks.conv_codec", "varitok.codecs.bottlenecks"
    config = OmegaConf.create(
        {
            "codec": {
                "_target_": "varitok.codecs.codec.Codec",
                "encoder": {"_target_": f"{networks}.ConvEncoder", **SIZES},
                "decoder": {"_target_": f"{networks}.ConvDecoder", **SIZES, "tanh": True},
                "sample_rate": RATE,
            },
            "bottleneck": {
                "_target_": f"{bottlenecks}.residual.residual",
                "num_codebooks": 4,
                "level": {
                    "_target_": f"{bottlenecks}.vq.EMAVectorQuantizer",
                    "_partial_": True,
                    "dim": 12,
                    "codebook_size": 32,
                },
            },
            "length": {
                "_target_": "varitok.codecs.lengths.policy.LengthPolicy",
                "distribution": {"_target_": "varitok.codecs.lengths.distributions.Full"},
                "mechanism": {"_target_": "varitok.codecs.lengths.policy.Truncate"},
            },
        }
    )
    torch.manual_seed(0)
    codec = build_codec(config)
    codec(torch.rand(4, 1, 40 * HOP) * 2 - 1)
    codec.bottleneck.update()  # entries are the latents of noise
    codec.eval()
    return once("probed", codec, architecture=architecture(config), formats=["safetensors", "onnx"])[0]


@pytest.fixture
def tones(tmp_path) -> tuple[Path, list[dict[str, object]]]:
    """Write sounds with one loud half, and return their folder and the halves as spans."""
    chance, half = np.random.default_rng(0), 20 * HOP
    folder, spans = tmp_path / "tones", []
    folder.mkdir()
    for index in range(8):
        sound = chance.uniform(-0.9, 0.9, 2 * half)
        first, second = ("loud", "quiet") if index % 2 else ("quiet", "loud")
        sound[half:] *= second == "loud"
        sound[:half] *= first == "loud"
        soundfile.write(folder / f"{index}.wav", sound, RATE)
        for label, start in ((first, 0.0), (second, half / RATE)):
            spans.append({"file": f"{index}.wav", "start": start, "end": start + half / RATE, "label": label})
    return folder, spans


def test_spans_of_sounds(tmp_path, sounds, tones, capsys):
    folder, spans = tones
    labels, out = write(tmp_path / "spans.csv", spans), tmp_path / "probe.csv"
    words = ["probe", str(sounds), "--data", str(folder), "--labels", labels, "--folds", "4", "--workers", "0"]
    main([*words, "--out", str(out), "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["codebooks"] for row in rows] == [1, 2, 4]
    assert all(row["chance"] == 0.5 and row["counted"] == 8 * 40 and row["groups"] == 8 for row in rows)
    assert rows[-1]["accuracy"] > 0.85 and rows[0]["information"] > 0.3
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows)
    assert "95 % interval" in out.read_text()
    main([*words, "--keep", "4", "--probe", "conv"])
    assert "accuracy" in capsys.readouterr().out


def test_classes_of_sounds_and_their_transcripts(tmp_path, sounds, tones, capsys):
    folder, _ = tones
    classes = [{"file": f"{index}.wav", "label": "ab"[index % 2]} for index in range(8)]
    words = ["probe", str(sounds), "--data", str(folder), "--folds", "2", "--keep", "4", "--workers", "0", "--json"]
    main([*words, "--labels", write(tmp_path / "classes.csv", classes), "--probe", "conv"])
    assert json.loads(capsys.readouterr().out)["rows"][0]["counted"] == 8
    texts = [{"file": f"{index}.wav", "text": "ab" if index else "a" * 41} for index in range(8)]
    main([*words, "--labels", write(tmp_path / "texts.csv", texts)])
    shown = capsys.readouterr()
    row = json.loads(shown.out)["rows"][0]
    assert 0 <= row["cer"] and (row["counted"], row["files"]) == (14, 7)
    assert "0.wav: its transcript has 41 characters, its codes 40 tokens" in shown.err


@pytest.fixture
def squares(tmp_path) -> Path:
    for index in range(12):
        for name, level in (("dark", 20), ("light", 220)):
            path = tmp_path / "squares" / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = np.random.default_rng(index).integers(-15, 15, (16, 16, 3))
            Image.fromarray((level + noise).astype(np.uint8)).save(path)
    return tmp_path / "squares"


def test_classes_of_images_by_their_folders(exported, squares, capsys):
    _, bundle, _ = exported
    words = ["probe", str(bundle), "--data", str(squares), "--workers", "0"]
    main([*words, "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["k"] for row in rows] == [1, 2, 4, 6]
    assert rows[-1]["accuracy"] > 0.8 and rows[-1]["classes"] == 2 and rows[-1]["files"] == 24


def test_a_broken_file_is_left_out(exported, squares, capsys):
    _, bundle, _ = exported
    (squares / "dark" / "broken.png").write_bytes(b"\x89PNG nothing")
    main(["probe", str(bundle), "--data", str(squares), "--workers", "0", "--keep", "6"])
    assert "left out: " in (shown := capsys.readouterr()).err and "broken.png" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--keep", "7"], "--keep 7: write whole numbers from 1 to 6"),
        (["--keep", "x"], "--keep x: write whole numbers from 1 to 6"),
        (["--folds", "1"], "--folds=1: must be at least 2"),
        (["--labels", "TEXT"], "spans and transcripts are of sounds"),
    ],
)
def test_wrong_options_are_told(exported, squares, tmp_path, words, message, capsys):
    text = write(tmp_path / "text.csv", [{"file": "0.png", "text": "a"}])
    words = [text if word == "TEXT" else word for word in words]
    with pytest.raises(SystemExit) as ended:
        main(["probe", str(exported[1]), "--data", str(squares), "--workers", "0", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_scikit_learn_it_is_one_line():
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "from varitok.export.cli.main import main\nmain(['probe', 'x', '--data', 'y'])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert re.fullmatch(r"varitok probe: needs the package sklearn\S*; pip install 'varitok\[probe\]'\n", ended.stderr)
