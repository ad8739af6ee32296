"""Imports of published weights, without any package that saves them."""

import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.codec import Codec
from varitok.codecs.training.run import build_run
from varitok.export.cli.main import main
from varitok.export.importers.importer import import_weights

from ...composing import composed
from ...processes import READS_PEAKS, peak_memory
from .published import CONFIG, narrow_codec, published


@pytest.fixture(scope="module")
def codec() -> Codec:
    return narrow_codec()


@pytest.fixture(scope="module")
def state(codec: Codec) -> dict[str, Tensor]:
    return published(codec)


def test_an_import_is_a_run_with_the_same_codes(
    codec: Codec, state: dict[str, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state, tmp_path / "encodec.th")
    main(["import", str(tmp_path / "encodec.th"), "--out", str(tmp_path / "run")])
    assert "EnCodec at 24 kHz, saved by transformers" in capsys.readouterr().out
    imported, config = load_run(tmp_path / "run")
    assert (config.data.sample_rate, config.name) == (24000, "encodec")
    signal = 0.3 * torch.randn(2, 1, 1000)
    with torch.no_grad():
        codes = imported.encode(signal)
        assert torch.equal(codes, codec.encode(signal))
        assert torch.equal(imported.decode(codes), codec.decode(codes))
    with pytest.raises(SystemExit):
        main(["import", str(tmp_path / "encodec.th"), "--out", str(tmp_path / "run")])
    assert "has a run already" in capsys.readouterr().err


def test_shards_folded_weights_and_halves_are_read(state: dict[str, Tensor], codec: Codec, tmp_path: Path) -> None:
    plain = {name: value for name, value in state.items() if not name.endswith(("weight_g", "weight_v"))}
    for name in [name for name in state if name.endswith("weight_g")]:
        owner = name.removesuffix("_g")
        plain[owner] = torch._weight_norm(state[f"{owner}_v"], state[name], 0)
    files = {name: f"model-{index % 2}.safetensors" for index, name in enumerate(sorted(plain))}
    for file in set(files.values()):
        save_file({name: plain[name].half().contiguous() for name in plain if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match="could be any of encodec, encodec_48k"):
        import_weights(tmp_path)  # folded weights look like those of a network without weight norm
    found = import_weights(tmp_path, "encodec")
    assert "half precision" in found.notes[0]


def test_of_two_sets_of_weights_the_average_is_taken(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save({"state_dict": state, "ema": {name: value + 1 for name, value in state.items()}}, tmp_path / "both.pt")
    found = import_weights(tmp_path / "both.pt")
    assert "'ema', not state_dict" in found.notes[0]
    assert torch.equal(found.codec.encoder.first.layer.bias, state["encoder.layers.0.conv.bias"] + 1)  # type: ignore[union-attr]
    chosen = import_weights(tmp_path / "both.pt", weights="state_dict")
    assert torch.equal(chosen.codec.encoder.first.layer.bias, state["encoder.layers.0.conv.bias"])  # type: ignore[union-attr]
    with pytest.raises(UserError, match="has no weights 'best'; it has ema, state_dict"):
        import_weights(tmp_path / "both.pt", weights="best")


class _Code:
    """An object that runs a command when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("false",)


def _lacking(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != "decoder.layers.0.conv.bias"}


WRONG = {
    "another family's": (lambda state: {"layer.weight": torch.zeros(2)}, "is of none of the families"),
    "a missing tensor": (_lacking, "lacks decoder.layers.0.conv.bias"),
    "one too many": (lambda state: state | {"extra.weight": torch.zeros(2)}, "encodec has no place for extra.weight"),
    "code": (lambda state: state | {"code": _Code()}, "holds more than weights"),
    "a list": (lambda state: [1, 2], "holds a list, not a state dict"),
    "nothing": (lambda state: {}, "holds no weights"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_pickle_is_told_in_a_line(kind: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    change, message = WRONG[kind]
    torch.save(change(state), tmp_path / "weights.th")
    with pytest.raises(UserError, match=message) as error:
        import_weights(tmp_path / "weights.th")
    assert "\n" not in str(error.value)


def test_a_damaged_or_contradictory_file_is_told_in_a_line(state: dict[str, Tensor], tmp_path: Path) -> None:
    whole = tmp_path / "model.safetensors"
    save_file(state, whole)
    with pytest.raises(UserError, match="isn't dac_24k; it looks like encodec"):
        import_weights(whole, "dac_24k")
    with pytest.raises(UserError, match="--as encodek: is no family"):
        import_weights(whole, "encodek")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_filters": 64}))
    with pytest.raises(UserError, match="its configuration says num_filters=64, its tensors 4"):
        import_weights(tmp_path)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(UserError, match="damaged, or not a safetensors file"):
        import_weights(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not JSON"):
        import_weights(tmp_path)
    whole.unlink()
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "lost.safetensors"}}))
    with pytest.raises(UserError, match=r"lacks lost\.safetensors"):
        import_weights(tmp_path)
    with pytest.raises(UserError, match="no such file or folder"):
        import_weights(tmp_path / "nothing")


@pytest.mark.slow
@READS_PEAKS
@pytest.mark.parametrize("suffix", [".safetensors", ".th"])
def test_an_import_takes_less_memory_than_two_and_a_half_files(
    suffix: str, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Beside the peak of a process that imports a narrow file: its modules are the same."""
    wide = published(narrow_codec("codec.encoder.base=64", "codec.encoder.inner.width=1024"))
    peaks = []
    for name, tensors in (("narrow", state), ("wide", wide)):
        path = tmp_path / f"{name}{suffix}"
        torch.save(tensors, path) if suffix == ".th" else save_file(tensors, path)  # type: ignore[func-returns-value]
        peaks.append(peak_memory(["import", path, "--out", tmp_path / name]))
    size = path.stat().st_size
    assert size > 2e8
    assert peaks[1] - peaks[0] < 2.5 * size


@pytest.mark.slow
def test_an_imported_run_is_trained_further(state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "encodec.th")
    main(["import", str(tmp_path / "encodec.th"), "--out", str(tmp_path / "run")])
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    voices = composed("data=voices", "data.sample_rate=24000", "data.crop_tokens=20", "data.downsample=320").data
    config.data = OmegaConf.to_container(voices, resolve=True)
    config.objective = OmegaConf.to_container(composed("experiment=audio/encodec_small").objective, resolve=True)
    config.trainer, config.callbacks, config.export = composed().trainer, {}, None
    config.updates, config.loader.batch_size, config.loader.workers = 1, 2, 0
    config.hydra = None
    run = build_run(config, tmp_path / "run")
    assert run.resume is None
    run.fit()
    trained, _ = load_run(tmp_path / "run")
    assert not torch.equal(trained.encoder.first.layer.bias, state["encoder.layers.0.conv.bias"])  # type: ignore[union-attr]
