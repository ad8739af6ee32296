"""Old names: what a run has saved is translated, what a user writes is answered."""

import inspect
from importlib import import_module
from pathlib import Path

import hydra
import pytest
import torch
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.build import build, build_codec, load_run
from varitok.codecs.renamed import KEYS, MODULES, NAMES, modernize, new_target
from varitok.codecs.training.config.compose import check

FSQ = "varitok.codecs.bottlenecks.fsq.FiniteScalarQuantizer"
OLD = {
    "codecs.lengths.Uniform": "codecs.lengths.distributions.Uniform",
    "codecs.lengths.Axis": "codecs.lengths.policy.Axis",
    "codecs.halting.HaltingHead": "codecs.lengths.halting.HaltingHead",
    "codecs.networks.factored.FactoredEncoder": "codecs.networks.resnet.ResNetEncoder",
    "codecs.implicit.ImplicitCodec": "codecs.implicit.codec.ImplicitCodec",
    "data.images.image_folder": "data.datasets.images.image_folder",
    "data.teachers.VisionTransformer": "data.teachers.vision.VisionTransformer",
    "export.prior.Tokenizer": "export.exporters.prior.Tokenizer",
}


@pytest.fixture
def renamed_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys as if they had had other names."""
    monkeypatch.setitem(KEYS, FSQ, {"sizes": "levels"})
    monkeypatch.setitem(KEYS, "training", {"averaging": "ema_decay"})
    monkeypatch.setitem(KEYS, "*", {"steps": "updates"})


@pytest.mark.parametrize("old", OLD)
def test_an_old_target_leads_to_what_is_there(old: str) -> None:
    assert new_target(f"varitok.{old}") == f"varitok.{OLD[old]}"
    assert new_target(f"varitok.{OLD[old]}") == f"varitok.{OLD[old]}"
    module, _, name = f"varitok.{OLD[old]}".rpartition(".")
    assert callable(getattr(import_module(module), name))


@pytest.mark.parametrize("module", sorted({*MODULES.values(), *(module for _, module in NAMES.values())}))
def test_every_module_of_today_is_there(module: str) -> None:
    assert import_module(f"varitok.{module}").__all__


def test_names_that_left_their_module_are_where_it_is_said() -> None:
    for name, (_, module) in NAMES.items():
        assert inspect.isclass(getattr(import_module(f"varitok.{module}"), name))


def test_a_users_old_names_are_answered(renamed_keys: None) -> None:
    with pytest.raises(
        UserError, match=r"_target_=varitok\.codecs\.lengths\.Full: is varitok.*distributions\.Full now$"
    ):
        build({"_target_": "varitok.codecs.lengths.Full"})
    with pytest.raises(UserError, match=r"^config\.sizes: is called levels now$"):
        build({"_target_": FSQ, "sizes": [8]})
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", ["+training.averaging=0.9"])
    with pytest.raises(UserError, match=r"^training\.averaging: is called ema_decay now$"):
        check(config)


def test_a_saved_configuration_is_translated(renamed_keys: None) -> None:
    saved = {"steps": 3, "training": {"averaging": 0.9}, "parts": [{"_target_": FSQ, "sizes": [8], "dim": None}]}
    now = {"updates": 3, "training": {"ema_decay": 0.9}, "parts": [{"_target_": FSQ, "levels": [8], "dim": None}]}
    assert modernize(saved) == now == modernize(now)


def test_a_checkpoint_of_before_loads(renamed_keys: None, tmp_path: Path) -> None:
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", ["data=cifar10", "codec=register_vit_tiny", "bottleneck=fsq"])
    codec = build_codec(config)
    plain = OmegaConf.to_container(config, resolve=True)
    plain["bottleneck"]["sizes"] = plain["bottleneck"].pop("levels")
    assert plain["length"]["_target_"] == "varitok.codecs.lengths.policy.LengthPolicy"
    plain["length"]["_target_"] = "varitok.codecs.lengths.LengthPolicy"
    state = {f"codec.{name}": value for name, value in codec.state_dict().items()}
    torch.save({"state_dict": state, "varitok": {"config": plain}}, tmp_path / "last.ckpt")
    loaded, found = load_run(tmp_path / "last.ckpt")
    assert found.bottleneck.levels == config.bottleneck.levels
    signal = torch.zeros(1, 3, 32, 32)
    assert torch.equal(loaded.encode(signal), codec.eval().encode(signal))
