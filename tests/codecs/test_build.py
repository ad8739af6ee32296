"""One place follows `_target_`; it follows only what it should, and reports a wrong value before anything is built."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.build import build, build_codec
from varitok.codecs.training.logging.loggers import CsvLog

from ..composing import composed

FSQ = "varitok.codecs.bottlenecks.fsq.FiniteScalarQuantizer"
VQ = "varitok.codecs.bottlenecks.vq.VectorQuantizer"
IMAGES, SOUNDS = "varitok.data.datasets.images.image_folder", "varitok.data.datasets.audio.audio_mix"
FULL = "varitok.codecs.lengths.distributions.Full"
POLICY = "varitok.codecs.lengths.policy.LengthPolicy"
ADAMW = "torch.optim.AdamW"


def weights() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2))]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "torch.load",
        "torch.optim.lr_scheduler.warnings.warn",
        "varitok.codecs.build.import_module",
        "varitok.codecs.build.instantiate",
        "varitok.codecs.build.inspect.os.system",
        "varitok.data.datasets.images.os.system",
        "varitok.codecs.nothing.Here",
        "varitok.codecs",
        "varitok_evil.Thing",
        "pytorch_lightning.Trainer",
        "",
        7,
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_else_can_be_named(target: object, nested: bool) -> None:
    node = {"_target_": target}
    with pytest.raises(UserError, match="_target_="):
        build({"_target_": FSQ, "levels": [8], "more": [node]} if nested else node)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"_target_": FSQ, "levls": [8]},
            r"levls: FiniteScalarQuantizer takes no such argument; did you mean levels\?",
        ),
        ({"_target_": FSQ}, r"levels: FiniteScalarQuantizer needs this argument"),
        ({"_target_": FSQ, "levels": [8.5]}, r"levels: expected a list, each a whole number, got \[8\.5\]"),
        ({"_target_": FSQ, "levels": 8}, r"levels: expected a list, each a whole number, got 8"),
        ({"_target_": FSQ, "_args_": [[8]]}, r"_args_: FiniteScalarQuantizer takes no such argument"),
        ({"_target_": VQ, "dim": "ten", "codebook_size": 8}, r"dim: expected a whole number, got 'ten'"),
        ({"_target_": VQ, "dim": 4, "codebook_size": 8, "cosine": "yes"}, r"cosine: expected true or false, got 'yes'"),
        ({"_target_": VQ, "dim": True, "codebook_size": 8}, r"dim: expected a whole number, got True"),
        ({"_target_": ADAMW, "_partial_": True, "lr": "abc"}, r"lr: expected a number, got 'abc'"),
        ({"_target_": ADAMW, "_partial_": True, "betas": [0.9]}, r"betas: expected 2 values"),
        ({"_target_": ADAMW, "_partial_": True, "wieght_decay": 0}, r".*did you mean weight_decay\?"),
        # Also of what a data set hands on.
        ({"_target_": IMAGES, "root": "x", "image_sise": 8}, r".*did you mean image_size\?"),
        (
            {"_target_": SOUNDS, "roots": {}, "downsample": 1, "crop_tokens": 9},
            r"sample_rate: audio_mix needs this argument",
        ),
        ({"_target_": "varitok.codecs.codec.Codec", "encoder": 3}, r"encoder: expected Encoder, got 3"),
        (  # an experiment's values, of an option that is no longer chosen: `experiment=image/var_64 length=full`
            {"_target_": POLICY, "distribution": {"_target_": FULL}, "codebooks": {"granularity": "sample"}},
            r"codebooks: expected Axis or null, got granularity without _target_",
        ),
    ],
)
def test_a_wrong_argument_is_told_with_its_key(config: dict[str, object], message: str) -> None:
    tree = OmegaConf.create({"part": {"inner": config}})
    with pytest.raises(UserError, match=rf"^part\.inner\.{message}"):
        build(tree.part)


def test_a_group_by_its_own_path() -> None:
    tree = OmegaConf.create({"optim": {"codec": {"_target_": ADAMW, "_partial_": True, "lr": "abc"}}})
    with pytest.raises(UserError, match=r"^optim\.codec\.lr: expected a number, got 'abc'$"):
        build(tree.optim.codec)


def test_extra_arguments_stay_what_they_are() -> None:
    """Hydra would copy them, and build what a configuration among them names."""
    (weight,) = weights()
    optimizer = build({"_target_": ADAMW, "lr": 1e-3}, params=[weight])
    assert optimizer.param_groups[0]["params"][0] is weight
    inner = build({"_target_": FSQ, "levels": [8]})
    codec = {"_target_": ADAMW, "_partial_": True, "lr": 1e-3}
    assert build(codec, params=inner.parameters())
    given_back = build({"_target_": ADAMW, "_partial_": True}, lr={"_target_": "os.system"}).keywords["lr"]
    assert given_back == {"_target_": "os.system"}


def test_partial() -> None:
    make = build(OmegaConf.create({"_target_": ADAMW, "_partial_": True, "lr": 0.5, "betas": [0.8, 0.9]}))
    optimizer = make(weights())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["lr"] == 0.5
    assert list(optimizer.defaults["betas"]) == [0.8, 0.9]


@given(levels=st.lists(st.integers(3, 9), min_size=1, max_size=4))
def test_whole_numbers_may_be_written_as_floats(levels: list[int]) -> None:
    built = build({"_target_": FSQ, "levels": [float(level) for level in levels]})
    assert built.codebook_sizes == build({"_target_": FSQ, "levels": levels}).codebook_sizes
    assert all(isinstance(size, int) for size in built.codebook_sizes)


@given(value=st.floats(allow_nan=True).filter(lambda number: not number.is_integer()))
def test_other_floats_are_no_whole_numbers(value: float) -> None:
    with pytest.raises(UserError, match=r"^config\.dim: expected a whole number"):
        build({"_target_": VQ, "dim": value, "codebook_size": 8})


def test_a_constructors_user_error_is_told_as_it_is() -> None:
    with pytest.raises(UserError) as direct:
        build({"_target_": FSQ, "levels": []})
    with pytest.raises(UserError) as nested:
        build({"parts": [{"_target_": FSQ, "levels": []}]})
    assert str(direct.value) == str(nested.value)
    assert "level" in str(direct.value)


def test_a_constructors_other_error_is_told_with_its_key_and_cause() -> None:
    with pytest.raises(UserError, match=r"^config: ValueError: Invalid learning rate: -1") as direct:
        build({"_target_": ADAMW, "lr": -1.0}, params=weights())
    assert isinstance(direct.value.__cause__, ValueError)
    stopping = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "loss", "mode": "least"}
    nested = {"_target_": FSQ, "levels": [8]}, stopping
    with pytest.raises(UserError, match=r"^config\.b: MisconfigurationException") as inner:
        build({"a": nested[0], "b": nested[1]})
    assert type(inner.value.__cause__).__name__ == "MisconfigurationException"
    assert "\n" not in str(inner.value)


def test_plain_containers_and_none_come_back() -> None:
    config = OmegaConf.create({"a": [1, {"b": None}], "c": "${a}"})
    assert build(config) == {"a": [1, {"b": None}], "c": [1, {"b": None}]}
    assert build(None) is None


def test_the_configuration_is_left_as_it_was() -> None:
    config = {"_target_": FSQ, "levels": [8.0]}
    build(config)
    assert config == {"_target_": FSQ, "levels": [8.0]}
    assert isinstance(config["levels"][0], float)


def test_lightnings_loggers_and_ours() -> None:
    assert isinstance(
        build({"_target_": "varitok.codecs.training.logging.loggers.CsvLog", "folder": "x", "name": "y"}), CsvLog
    )
    assert build({"_target_": "pytorch_lightning.callbacks.LearningRateMonitor"}).logging_interval is None


@pytest.mark.parametrize("bottleneck", ["fsq", "vq"])
def test_a_composed_codec_is_built(bottleneck: str) -> None:
    words = ["data=cifar10", "codec=register_vit_tiny", f"bottleneck={bottleneck}", "codec.encoder.tokens=4"]
    codec = build_codec(composed(*words))
    assert codec.tokens == 4
    assert codec.encode(torch.zeros(1, 3, 32, 32)).shape == (1, len(codec.bottleneck.codebook_sizes), 4)
