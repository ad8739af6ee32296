"""Parity passes equal files and names differing ones."""

import copy

import pytest
import torch

from varitok.export.exporters.frozen import FrozenCodec
from varitok.export.exporters.parity import ParityError, check

from ...codecs.examples import SIZE, TOKENS, tiny_codec
from ..conftest import awake

SHAPE = (3, SIZE, SIZE)


class Coder:
    """The codec, with something done to what it gives."""

    def __init__(self, codec, codes=lambda codes: codes, signal=lambda signal, codes: signal):
        self.codec, self.on_codes, self.on_signal = FrozenCodec(codec), codes, signal

    def encode(self, signal):
        return self.on_codes(self.codec.encode(signal))

    def decode(self, codes):
        return self.on_signal(self.codec.decode(codes), codes)


@pytest.fixture(scope="module")
def codec():
    return awake(tiny_codec("vq", "mask_token"))


def test_equal_passes(codec):
    parity = check(codec.train(), {"it": Coder(codec)}, [SHAPE])["it"]
    assert parity.codes_equal == 1 and parity.signal_error < 1e-6 and parity.tokens == 9 * TOKENS
    assert codec.training, "the codec was changed"


def test_one_flip_is_judged_over_many_tokens(codec):
    flips = iter([1])

    def once(codes):
        codes = codes.clone()
        codes[0, 0, 0] = (codes[0, 0, 0] + next(flips, 0)) % 37
        return codes

    parity = check(codec, {"it": Coder(codec, codes=once)}, [SHAPE])["it"]
    assert parity.tokens >= 20_000 and parity.codes_equal == pytest.approx(1 - 1 / parity.tokens)


def test_wrong_codes_are_told(codec):
    with pytest.raises(ParityError, match=r"^a\.file, .* codes are equal .* needed are 99\.99%"):
        check(codec, {"a.file": Coder(codec, codes=lambda codes: (codes + 1) % 37)}, [SHAPE])


@pytest.mark.parametrize("kept", [1, 2, TOKENS - 1, TOKENS])
@pytest.mark.parametrize("off", [1e-3, float("nan")])
def test_a_wrong_signal_at_one_size_is_told(codec, kept, off):
    def signal(signal, codes):
        return signal + off if codes.shape[-1] == kept and len(codes) == 3 else signal

    with pytest.raises(ParityError, match=f"^it, batch 3, {kept} of {TOKENS} tokens: signals differ by"):
        check(codec, {"it": Coder(codec, signal=signal)}, [SHAPE])


@pytest.mark.parametrize(("off", "passes"), [(5e-7, True), (2e-6, False)])
def test_what_is_left_of_louder_parts_may_be_off_as_they_may(codec, off, passes):
    quiet = copy.deepcopy(codec)
    for parameter in (quiet.decoder.cosine_maps, *quiet.decoder.out.parameters()):  # of all paths to the signal
        parameter.data *= 1e-4
    coder = Coder(quiet, signal=lambda signal, codes: signal + off)
    if passes:
        assert check(quiet, {"it": coder}, [SHAPE])["it"].signal_error == pytest.approx(off / 0.1, rel=0.2)
    else:
        with pytest.raises(ParityError, match="signals differ by 2"):
            check(quiet, {"it": coder}, [SHAPE])


@pytest.mark.parametrize(("off", "passes"), [(0, True), (1e-4, False)])
def test_a_file_may_be_nearer_to_the_exact_signal_than_the_codec(codec, off, passes):
    """Of a deep network in float32 neither is exact, and their difference is the sum of both errors."""
    rough = copy.deepcopy(codec)
    rough.decoder.register_forward_hook(lambda _, __, signal: signal + 1024 - 1024)
    coder = Coder(codec, signal=lambda signal, codes: signal + off)
    if passes:
        assert check(rough, {"it": coder}, [SHAPE])["it"].signal_error < 1e-6
    else:
        with pytest.raises(ParityError, match="signals differ by"):
            check(rough, {"it": coder}, [SHAPE])


def test_wrong_shapes_and_types_are_told(codec):
    with pytest.raises(ParityError, match=r"codes are torch\.int32"):
        check(codec, {"it": Coder(codec, codes=lambda codes: codes.int())}, [SHAPE])
    with pytest.raises(ParityError, match=r"signals \(1, 3, 8, 16\)"):
        check(codec, {"it": Coder(codec, signal=lambda signal, codes: signal[:, :, :8])}, [SHAPE])


def test_a_codec_in_half_precision_is_compared_in_float32(codec):
    assert check(codec.to(torch.float64), {"it": Coder(codec)}, [SHAPE])["it"].codes_equal == 1
    codec.float()
