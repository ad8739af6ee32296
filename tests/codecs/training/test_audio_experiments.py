"""Every audio preset: its bit rate, that padding changes nothing, and that chunks give what the whole gives."""

import copy
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from varitok.codecs.build import build, build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.streaming import ChunkedCodec

from ...composing import composed
from ..examples import shrink

FOLDER = Path(__file__).parents[3] / "configs" / "experiment" / "audio"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
PUBLISHED = {  # kbit/s, from the papers that the presets name
    "bigcodec": 1.04,
    "dac_16k": 6.0,
    "dac_24k": 24.0,
    "dac_44k": 7.75,
    "dmel": 25.6,
    "encodec": 24.0,
    "encodec_48k": 24.0,
    "focalcodec": 0.65,
    "focalcodec_12": 0.163,
    "focalcodec_25": 0.325,
    "language_codec": 6.0,
    "lfsc": 1.89,
    "mimi": 1.1,
    "snac": 0.984,
    "snac_32k": 1.875,
    "snac_44k": 2.584,
    "soundstream": 6.0,
    "stable_codec": 0.613,
    "wavtokenizer": 0.9,
    "wavtokenizer_40": 0.48,
}
OURS = {"continuous", "demo", "vocos"} | {name for name in NAMES if name.endswith("_small")}  # of no rate in a paper
# A small twin has the structure of what it is named after.
EACH = [
    pytest.param(name, marks=[pytest.mark.slow] * (name not in PUBLISHED and name.removesuffix("_small") in PUBLISHED))
    for name in NAMES
]
PARTIAL = {"encodec", "encodec_48k", "mimi"}  # each layer completes a signal's own last step
CAUSAL = {"encodec", "mimi", "soundstream"}
QUICK = ("dac_small", "demo", "dmel", "focalcodec_12", "language_codec", "snac")  # a kind of network or rate each
FIXED = ("dmel", "vocos")  # of mel bands, whose number is no width to be shrunk


@cache
def _composed(name: str):
    return composed(f"experiment=audio/{name}")


def _config(name: str):
    return copy.deepcopy(_composed(name))


@cache
def _codec(name: str) -> Codec:
    """Make a preset's codec with narrow networks and its own strides, and with codebooks that have seen a batch."""
    torch.manual_seed(0)
    config = _config(name)
    if name not in FIXED:
        shrink(config.codec)
    codec = build_codec(config).train()
    codec(_sound(4 * codec.downsample[0] + 1, 2, 3, codec.encoder.channels))  # k-means
    return codec.eval()


def _sound(samples: int, batch: int = 1, seed: int = 0, channels: int = 1) -> Tensor:
    return 0.1 * torch.randn(batch, channels, samples, generator=torch.Generator().manual_seed(seed))


def test_no_preset_is_left_out():
    assert set(NAMES) == PUBLISHED.keys() | OURS
    assert {f"{name}_small" for name in ("dac", "encodec", "soundstream", "bigcodec", "wavtokenizer")} <= OURS
    assert {
        f"{name}_small" for name in ("language_codec", "lfsc", "stable_codec", "snac", "mimi", "continuous")
    } <= OURS


@pytest.mark.parametrize("name", PUBLISHED)
def test_bits_a_second_are_those_of_the_paper(name):
    """From the configuration alone, whose steps are the networks' (test_padding_changes_nothing, for one)."""
    config = _config(name)
    with torch.device("meta"):
        bottleneck = build(config.bottleneck)
    rate = bottleneck.bits * config.codec.sample_rate / config.data.downsample / 1000
    assert rate == pytest.approx(PUBLISHED[name], abs=0.006)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_padding_changes_nothing(name):
    codec = _codec(name)
    hop = codec.downsample[0]
    assert hop == _config(name).data.downsample and codec.sample_rate == _config(name).codec.sample_rate
    # Of a sound within a batch, layers know its last token, not its last sample.
    sizes = [5 * hop, 3 * hop, hop] if name in PARTIAL else [5 * hop, 3 * hop + 1, hop // 2]
    sounds = [_sound(size, seed=seed, channels=codec.encoder.channels) for seed, size in enumerate(sizes)]
    # After a sound a batch has zeros; after its last token anything may follow.
    batch = torch.cat([torch.nn.functional.pad(sound, (0, sizes[0] - sound.shape[2])) for sound in sounds])
    lengths = codec.layout.valid(torch.tensor(sizes), (sizes[0],))
    with torch.no_grad():
        codes = codec.encode(batch, lengths)
        back = codec.decode(codes, (sizes[0],), lengths)
        for item, (sound, length) in enumerate(zip(sounds, lengths.tolist(), strict=True)):
            alone = codec.encode(sound)
            assert alone.shape[2] == length
            if codec.num_codebooks:
                assert torch.equal(codes[item : item + 1, :, :length], alone)
            else:
                torch.testing.assert_close(codes[item : item + 1, :, :length], alone, atol=1e-5, rtol=0)
            signal = codec.decode(alone, (sizes[item],))
            torch.testing.assert_close(back[item : item + 1, :, : sizes[item]], signal, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", EACH)
def test_chunks_of_causal_presets_give_what_the_whole_gives(name):
    codec = _codec(name)
    chunked = ChunkedCodec(codec)
    assert chunked.streams is (name.removesuffix("_small") in CAUSAL), chunked.obstacle
    if not chunked.streams:
        return
    hop = chunked.latency
    sound, cuts = _sound(9 * hop + 7, channels=codec.encoder.channels), [hop, 4 * hop, 2 * hop, 2 * hop + 7]
    with torch.no_grad():
        codes, signal = codec.encode(sound), codec.decode(codec.encode(sound))
        state, played, coded, heard = None, None, [], []
        for number, chunk in enumerate(sound.split(cuts, 2)):
            last = number == len(cuts) - 1
            new, state = chunked.encode_chunk(chunk, state, last=last)
            made, played = chunked.decode_chunk(new, played, last=last)
            coded.append(new)
            heard.append(made)
    assert torch.equal(torch.cat(coded, 2), codes)
    torch.testing.assert_close(torch.cat(heard, 2), signal, atol=1e-5, rtol=0)
