"""Imports of SNAC beside the package snac: equal codes, and signals with the same noise."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from varitok import UserError
from varitok.data.noise import gaussian
from varitok.export.importers.importer import import_weights

from .test_peers import compare, randomized

NARROW = {"codebook_size": 32, "vq_strides": [4, 2, 1], "attn_window_size": None}
NARROW |= {"encoder_dim": 4, "encoder_rates": [2, 3, 4], "decoder_dim": 48, "decoder_rates": [4, 3, 2]}
SPEECH = {"encoder_dim": 48, "encoder_rates": [2, 4, 8, 8], "decoder_dim": 1024, "decoder_rates": [8, 8, 4, 2]}
MUSIC = {"encoder_dim": 64, "encoder_rates": [2, 3, 8, 8], "decoder_dim": 1536, "decoder_rates": [8, 8, 3, 2]}
LOCAL = {"attn_window_size": 12, "encoder_dim": 16, "decoder_dim": 128}  # heads have 64 channels
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "narrow": ("snac", NARROW | {"sampling_rate": 24000}),
    "narrow_windows": ("snac_44k", NARROW | LOCAL | {"sampling_rate": 44100, "vq_strides": [8, 4, 2, 1]}),
}
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "snac": ("snac", SPEECH | {"sampling_rate": 24000, "vq_strides": [4, 2, 1], "attn_window_size": None}),
    "snac_32k": ("snac_32k", MUSIC | {"sampling_rate": 32000}),
    "snac_44k": ("snac_44k", MUSIC | {"sampling_rate": 44100}),
}


def _saved(sizes: dict[str, Any], folder: Path) -> Any:
    """Save a model of random weights as it is published."""
    snac = pytest.importorskip("snac")
    torch.manual_seed(0)
    model = randomized(snac.SNAC(**sizes))
    for name, value in model.named_parameters():
        if name.endswith("bias"):
            value.data.add_(0.3 * torch.randn_like(value))
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(sizes))
    return model


def _noise(stages: int) -> Callable[..., Tensor]:
    """Return what takes the place of torch.randn: the noise of our decoder's stages, in order."""
    levels = iter(range(stages)[::-1])
    return lambda size, **_: torch.from_numpy(np.resize(gaussian((1, 1 << 16), next(levels)), size[-1])).expand(size)


def _check(sizes: dict[str, Any], family: str, folder: Path, patch: pytest.MonkeyPatch, **sounds: Any) -> None:
    model = _saved(sizes, folder)
    levels, strides = model.quantizer.quantizers, model.vq_strides

    def encode(x: Tensor) -> Tensor:
        codes = zip(model.encode(x), strides, strict=True)
        return torch.stack([code.repeat_interleave(step, 1) for code, step in codes], 1)

    def decode(codes: Tensor) -> Tensor:
        latents: Any = 0
        for index in range(codes.shape[1]):
            part = levels[index].out_proj(levels[index].decode_code(codes[:, index, :: strides[index]]))
            latents = latents + part.repeat_interleave(strides[index], 2)
        with patch.context() as patched:
            patched.setattr(torch, "randn", _noise(len(model.decoder_rates)))
            sound: Tensor = model.decoder(latents)
        return sound

    found = import_weights(folder)
    assert (found.family.name, found.config.data.sample_rate) == (family, sizes["sampling_rate"])
    assert len(encode(torch.randn(1, 1, 30 * int(model.hop_length))).unique()) > 4
    compare(found.codec, encode, decode, **sounds)


@pytest.mark.parametrize("case", CASES)
def test_a_narrow_model_of_the_package_snac_codes_alike(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, sizes = CASES[case]
    _check(sizes, family, tmp_path, monkeypatch, steps=[30, 4.6, 0.1])


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_model_of_the_package_snac_of_published_size_codes_alike(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, sizes = PUBLISHED[case]
    _check(sizes, family, tmp_path, monkeypatch, steps=[40.3, 9.3])


def test_without_a_configuration_the_sample_rate_is_asked_for(tmp_path: Path) -> None:
    _saved(CASES["narrow_windows"][1], tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="could be any of snac_32k, snac_44k; say which by --as"):
        import_weights(tmp_path)


def test_a_configuration_that_contradicts_the_tensors_is_told(tmp_path: Path) -> None:
    _saved(CASES["narrow"][1], tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CASES["narrow"][1] | {"noise": False}))
    with pytest.raises(UserError, match="its configuration says noise=False, its tensors True"):
        import_weights(tmp_path)
