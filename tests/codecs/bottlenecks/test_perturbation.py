"""A codec that is trained under perturbation."""

import pytest
import torch

from varitok import UserError
from varitok.codecs.bottlenecks.perturbation import Nearest, Noise
from varitok.codecs.codec import Codec

from ..examples import SIZE, tiny_codec


def _with(perturbation, bottleneck: str = "vq") -> Codec:
    plain = tiny_codec(bottleneck)
    codec = Codec(plain.encoder, plain.bottleneck, plain.decoder, plain.length, perturbation=perturbation)
    codec.project_in, codec.project_out = plain.project_in, plain.project_out
    return codec


@pytest.mark.parametrize("make", [Nearest, Noise])
def test_a_codec_perturbs_what_it_paints_and_not_what_it_reports(make) -> None:
    codec = _with(make(beta=1.0))
    signal = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
    perturbed = codec(signal)
    codec.perturbation = None
    plain = codec(signal)
    assert not torch.allclose(perturbed.signal, plain.signal, atol=1e-6)
    assert torch.equal(perturbed.quantized.codes, plain.quantized.codes)
    codec.perturbation = make(beta=1.0)
    codec.eval()
    assert torch.equal(codec(signal).signal, plain.signal)


def test_a_codec_without_nearest_entries_is_told() -> None:
    with pytest.raises(UserError, match="perturbation=noise"):
        _with(Nearest(), "fsq")
