"""The comparison of audio codecs with their peers: the turns, the timed calls, and that forms code alike."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from varitok.codecs.build import build_codec

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "audio.py"
TINY = (
    "codec.encoder.base=2",
    "codec.encoder.width=8",
    "codec.encoder.inner=null",
    "bottleneck.level.dim=8",
    "bottleneck.level.codebook_size=16",
    "data.crop_tokens=8",
    "objective.adversarial.discriminator.windows=[128]",
    "objective.adversarial.discriminator.width=2",
)


@pytest.fixture(scope="module")
def audio() -> ModuleType:
    spec = importlib.util.spec_from_file_location("benchmark_audio", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_audio"] = module
    spec.loader.exec_module(module)
    return module


class Clock:
    """A clock that advances a tenth of a second for each look, and by what a peer's step adds."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.1
        return self.now


@pytest.mark.slow
def test_every_variant_and_the_peer_take_turns(audio: ModuleType) -> None:
    clock, seen = Clock(), []

    def peer(signal: Tensor) -> None:
        seen.append(signal.shape)
        clock.now += 0.3

    cell = audio.Cell("tiny", "encodec", TINY, (), 2, {}, lambda config: audio.PeerStep(peer, 30, 12))
    learned: list[tuple[bool, bool]] = []
    plain = audio.CodecTraining.training_step

    def noted(module, batch, index):
        adversarial = module.objective.adversarial
        learned.append((adversarial.shared, adversarial.learns(module.update)))
        return plain(module, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(audio.CodecTraining, "training_step", noted)
        rows = {row.form: row for row in audio.steps(cell, 2, clock, 1)}
    # Two counted rounds and one before: exact twice, shared, and two updates, one with the discriminator.
    assert Counter(learned) == {(False, True): 9, (True, True): 3, (False, False): 3}
    assert seen == [(2, 1, 8 * 320)] * 6
    assert list(rows) == ["exact", "shared", "every 2", "peer"]
    assert rows["peer"].parameters == 42 and rows["peer"].speedup == 1
    assert rows["exact"].speedup == pytest.approx(4)
    assert rows["exact"].figure == pytest.approx(2 * 8 * 320 / 24000 / 0.1)


@pytest.mark.slow
def test_forms_code_alike_and_are_timed_against_the_first_peer(audio: ModuleType) -> None:
    cell = audio.Cell("tiny", "encodec", TINY, (), 2, {}, None)
    torch.manual_seed(0)
    codec = build_codec(audio.composed(cell))
    ours = audio.Coder(codec.eval().encode, codec.decode, 7)
    cell = cell._replace(peers={"theirs": lambda: ours, "other": lambda: ours})
    rows = audio.coding(cell, 1, Clock(), 1, 0.1, ("eager", "folded"))
    assert [(row.form, row.what) for row in rows] == [
        (form, what) for form in ("eager", "folded", "theirs", "other") for what in ("encode", "decode")
    ]
    assert all(row.speedup == pytest.approx(1) for row in rows)
    assert [row.parameters for row in rows[-2:]] == [7, 7]


@pytest.mark.slow
def test_forms_give_the_same_codes_and_sounds(audio: ModuleType, tmp_path: Path) -> None:
    codec = build_codec(audio.composed(audio.Cell("tiny", "encodec", TINY, (), 2, {}, None))).train()
    sound = audio.sounds(24000, 3200, 1)
    codec(sound)
    with torch.inference_mode():
        made = audio.forms(codec.eval(), sound, tmp_path, 1, ("eager", "folded", "TorchScript", "ONNX Runtime"))
        assert len(made) == 4
        codes = {name: torch.as_tensor(form.encode(sound)) for name, form in made.items()}
        back = {name: torch.as_tensor(form.decode(form.encode(sound))) for name, form in made.items()}
    for name in made:
        assert torch.equal(codes[name], codes["eager"])
        torch.testing.assert_close(back[name], back["eager"].clamp(-1, 1), rtol=0, atol=1e-4)


def test_a_form_that_fails_is_named(audio: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    def broken(*_: object) -> None:
        raise ValueError("no such operator\nmore")

    monkeypatch.setattr(audio, "export_onnx", broken)
    codec = build_codec(audio.composed(audio.Cell("tiny", "encodec", TINY, (), 2, {}, None))).train()
    sound = audio.sounds(24000, 3200, 1)
    codec(sound)
    assert list(audio.forms(codec.eval(), sound, tmp_path, 1, ("eager", "ONNX Runtime"))) == ["eager"]
    assert capsys.readouterr().err == "ONNX Runtime: left out: ValueError: no such operator\n"


def test_a_folder_without_peers_is_refused(audio: ModuleType, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["audio.py", "--peers", str(tmp_path)])
    with pytest.raises(SystemExit):
        audio.main()
    assert f"{tmp_path} has no peers" in capsys.readouterr().err
