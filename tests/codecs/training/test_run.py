"""A run is built from any numbers, or a line says which is wrong."""

import copy
import math
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.training import run as run_module
from varitok.codecs.training.config.compose import check
from varitok.codecs.training.run import build_run
from varitok.data.batch import SignalDataset

from ...composing import composed
from ..examples import CONFIGS, SMALLER, TINY_CLIP, TINY_RUN, TINY_SOUND

EMBEDDED = CONFIGS.parent / "data" / "embedded"
REST = {"data": ["codec=vidtok_small", "length=full"], "objective": ["data=voices", "codec=seanet"]}
GIVEN = {"downsample": 4, "causal_pad": 3, "download": False, "length": 4}
DEMOS = {"image": [*TINY_RUN, "export=none"], "audio": TINY_SOUND, "video": TINY_CLIP}
EXTREMES = (-1, 0, None, math.inf, math.nan, 1e15)  # the last is more than any address space


def _demo(modality: str) -> dict[str, Any]:
    plain: dict[str, Any] = OmegaConf.to_container(composed(*DEMOS[modality]), resolve=True)  # type: ignore[assignment]
    return plain


def _numbers(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """List the paths of a configuration's numbers, and of its nulls, which may stand for numbers."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        return [found for key, child in items for found in _numbers(child, (*path, key))]
    return [path] if node is None or (isinstance(node, int | float) and not isinstance(node, bool)) else []


KEYS = [(modality, path) for modality in DEMOS for path in _numbers(_demo(modality))]


def _is_built_or_refused(modality: str, path: tuple[Any, ...], value: float | None) -> None:
    plain = node = _demo(modality)
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    config = OmegaConf.create(plain)
    assert isinstance(config, DictConfig)
    OmegaConf.set_struct(config, True)
    with TemporaryDirectory() as folder:
        try:
            check(config)
            build_run(config, Path(folder) / "run")
        except UserError as told:
            assert len(str(told).splitlines()) == 1 and "HYDRA_FULL_ERROR" not in str(told), told


@settings(max_examples=8)  # the slow test below draws all
@given(key=st.sampled_from(KEYS), value=st.sampled_from(EXTREMES))
def test_a_number_builds_or_is_refused_in_a_line(key: tuple[str, tuple[Any, ...]], value: float | None) -> None:
    _is_built_or_refused(*key, value)


@pytest.mark.slow
@pytest.mark.parametrize("modality", DEMOS)
def test_every_number_builds_or_is_refused_in_a_line(modality: str) -> None:
    for of, path in KEYS:
        for value in EXTREMES if of == modality else ():
            _is_built_or_refused(modality, path, value)


@cache
def _option(group: str, name: str) -> Any:
    """Compose an option of a group, as plain containers with nothing missing."""
    smaller = SMALLER.get(name, []) if group == "bottleneck" else []
    words = [*REST.get(group, []), f"{group}={name}", *(f"{group}.{word}" for word in smaller)]
    config = OmegaConf.select(composed(*words), group.replace("/", "."))
    node = config.get("clips", config) if "features" in config._target_ else config
    node.update({key: value for key, value in GIVEN.items() if key in node})
    kind = "speech" if "audio" in node._target_ else "photos" if "images" in node._target_ else "clips"
    for key in ("root", "roots", "clips", "images"):
        if OmegaConf.is_missing(node, key):
            folder = str(EMBEDDED / kind / ("00.mp4" if name == "single_clip" else ""))
            node.update({"roots": {"a": folder}, "weights": {"a": 1.0}} if key == "roots" else {key: folder})
    plain: Any = OmegaConf.to_container(config, resolve=True)
    return plain


OPTIONS = [
    (group, path.stem)
    for group in ("bottleneck", "codec/perturbation", "data", "length", "objective")
    for path in sorted((CONFIGS / group).glob("*.yaml"))
    if path.stem not in ("none", "feature_videos")
]


LARGE = ("dac", "encodec", "wavtokenizer")  # to build their discriminators for each number takes minutes


def _is_taken_or_refused(group: str, name: str, path: tuple[Any, ...], value: float | None) -> None:
    plain = node = copy.deepcopy(_option(group, name))
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    try:
        build(OmegaConf.create({group: plain})[group])
    except UserError as told:
        assert len(str(told).splitlines()) == 1 and "HYDRA_FULL_ERROR" not in str(told), told


@settings(max_examples=6)  # the slow test below draws all
@given(option=st.sampled_from(OPTIONS), value=st.sampled_from(EXTREMES), draw=st.data())
def test_a_number_of_an_option_is_taken_or_refused(
    option: tuple[str, str], value: float | None, draw: st.DataObject
) -> None:
    _is_taken_or_refused(*option, draw.draw(st.sampled_from(_numbers(_option(*option)))), value)


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in OPTIONS if option[1] not in LARGE], ids="=".join)
def test_every_number_of_an_option_is_taken_or_refused(option: tuple[str, str]) -> None:
    for key in _numbers(_option(*option)):
        for value in EXTREMES:
            _is_taken_or_refused(*option, key, value)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("bottleneck.levels=[8,2]", "bottleneck.levels[1]=2: must be at least 3"),
        ("data.image_size=1", "data.image_size=1: must be at least 2"),
        ("length.full_share=1.5", "length.full_share=1.5: must be at least 0 and at most 1"),
        ("optim.clip=-1", "optim.clip=-1: must be above 0; inf doesn't clip"),
        ("optim.clip=0", "optim.clip=0: must be above 0; inf doesn't clip"),
        ("optim.clip=null", "optim.clip: expected a number, got None; inf doesn't clip"),
        ("optim.final=-1", "optim.final=-1: must be at least 0 and at most 1; 1 keeps the learning rate constant"),
        ("optim.warmup=-1", "optim.warmup=-1: must be at least 0"),
        ("optim.codec.lr=-1", "optim.codec: Invalid learning rate: -1"),
        ("optim.codec.lr=0", "optim.codec.lr=0: must be above 0; training.freeze keeps parts as they are"),
        ("optim.codec.lr=inf", "optim.codec.lr=inf: must be finite"),
        ("optim.codec.betas=[0.9,1]", "optim.codec: Invalid beta parameter at index 1: 1"),
        ("optim.codec.weight_decay=inf", "optim.codec.weight_decay=inf: must be finite"),
        ("training.ema_decay=1", "training.ema_decay=1: must be at least 0 and below 1; 0 averages nothing"),
        ("training.log_every=0", "training.log_every=0: must be at least 1"),
        ("training.accumulate=-1", "training.accumulate=-1: must be at least 1"),
        ("training.guard.spike=0", "training.guard.spike=0: must be above 1; null refuses none"),
        ("checkpoint.keep=0", "checkpoint.keep=0: must be at least 1; null keeps all"),
        ("checkpoint.archive=0", "checkpoint.archive=0: must be at least 1; null archives none"),
        ("loader.workers=-1", "loader.workers=-1: must be at least 0 and at most 1000; 0 reads in the main process"),
        ("loader.bucket=-1", "loader.bucket=-1: must be at least 0 and below 1; 0 doesn't sort"),
        ("loader.budget=0", "loader.budget=0: must be at least 1; null is unlimited"),
        ("objective.terms.l2.weight=-1", "objective.terms.l2.weight=-1: must be at least 0; 0 only logs the term"),
        ("objective.terms.structure=1", "objective.terms.structure: expected `weight` and `module`, got 1"),
        ("callbacks.samples.count=-1", "callbacks.samples.count=-1: must be at least 1"),
        ("seed=-1", "seed=-1: must be at least 0 and at most 4294967295"),
        ("updates=0", "updates=0: must be at least 1"),
        ("codec.encoder.heads=5", "transformer: width=192 should be a multiple of its heads=5"),
        ("codec.encoder.width=1e15", "codec.encoder: is too large for the memory of this machine"),
        ("+trainer.gradient_clip_val=1", "trainer.gradient_clip_val: set optim.clip instead"),
        ("trainer.log_every_n_steps=50", "trainer.log_every_n_steps: set training.log_every instead"),
        ("+trainer.max_steps=5", "trainer.max_steps: set updates instead"),
    ],
)
def test_a_number_that_means_something_else_is_refused(tmp_path: Path, word: str, message: str) -> None:
    config = composed("experiment=image/demo", "export=none", word)
    with pytest.raises(UserError) as told:
        check(config)
        build_run(config, tmp_path)
    assert str(told.value) == message


def test_none_is_null_as_sweeps_write_it(tmp_path: Path) -> None:
    words = ("checkpoint.keep=None", "loader.budget=None", "init_from=None", "callbacks.samples=None")
    config = composed("experiment=image/demo", "export=none", *words)
    check(config)
    assert config.checkpoint.keep is config.loader.budget is config.init_from is config.callbacks.samples is None
    build_run(config, tmp_path)


def test_an_infinite_clip_and_a_null_are_off(tmp_path: Path) -> None:
    config = composed("experiment=image/demo", "export=none", "optim.clip=inf", "+trainer.gradient_clip_val=null")
    check(config)
    assert build_run(config, tmp_path).module.clip == math.inf


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (["loader.batch_size=8", "training.accumulate=3"], "loader.batch_size=4 training.accumulate=6, training.activ"),
        (["loader.bucket=0.1", "loader.budget=9000"], "a smaller loader.budget, training.activ"),
        (["loader.batch_size=1", "training.activation_checkpointing=[decoder]"], "trainer=fsdp2 on several GPUs"),
    ],
)
def test_a_gpu_too_small_for_the_batch_is_answered_with_what_to_set(tmp_path, monkeypatch, words, remedy):
    monkeypatch.setattr(SignalDataset, "sizes", lambda data: [16] * len(data))  # for buckets
    run = build_run(composed(*TINY_RUN, "export=none", *words), tmp_path)
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.15 GiB, 1 MiB is free."

    def full(*_, **__):
        raise torch.OutOfMemoryError(said)

    monkeypatch.setattr(run.trainer, "fit", full)
    with pytest.raises(UserError) as told:
        run.fit()
    assert str(told.value).startswith(f"out of memory: GPU 0 has 79.15 GiB; give {remedy}")


@pytest.mark.parametrize(("words", "fixed"), [([], True), (["loader.bucket=0.1"], False)])
def test_a_gpu_tunes_convolutions_for_one_shape_and_grows_segments_for_several(tmp_path, monkeypatch, words, fixed):
    monkeypatch.setattr(SignalDataset, "sizes", lambda data: [16] * len(data))  # for buckets
    monkeypatch.setattr(run_module, "_trains_on_gpu", lambda _: True)
    monkeypatch.setattr(run_module, "allow_tf32", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    run = build_run(composed(*TINY_RUN, "export=none", *words), tmp_path)
    assert torch.backends.cudnn.benchmark == fixed
    assert ("PYTORCH_ALLOC_CONF" in os.environ) == (not fixed)
    assert run.trainer.strategy.checkpoint_io.on_gpu
