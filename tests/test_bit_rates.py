"""Each preset of a published codec has the published bit rate."""

from pathlib import Path

import hydra
import pytest
import torch

from varitok.codecs.build import build_codec

FOLDER = Path(__file__).parents[1] / "configs" / "experiment" / "audio"
PUBLISHED = {  # kbit/s, from the papers that the presets name
    "bigcodec": 1.04,
    "dac_16k": 6.0,
    "dac_24k": 24.0,
    "dac_44k": 7.75,
    "encodec": 6.0,
    "language_codec": 6.0,
    "lfsc": 1.89,
    "mimi": 1.1,
    "soundstream": 6.0,
    "stable_codec": 0.613,
    "wavtokenizer": 0.9,
    "wavtokenizer_40": 0.48,
}
OURS = {"continuous", "dac_small", "demo", "stable_codec_small", "wavtokenizer_small"}  # of no paper


def test_no_preset_is_left_out():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == PUBLISHED.keys() | OURS


@pytest.mark.parametrize("name", PUBLISHED)
def test_bits_a_second_are_those_of_the_paper(name):
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        config = hydra.compose("train", [f"experiment=audio/{name}", "data.root=nowhere"])
    with torch.device("meta"):  # sizes only
        codec = build_codec(config)
    rate = codec.bits(1) * codec.sample_rate / codec.hop[0] / 1000
    assert rate == pytest.approx(PUBLISHED[name], abs=0.006)
