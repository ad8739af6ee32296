"""A bundle of sounds as an audio tokenizer of transformers: the same codes and sounds, also saved and loaded again."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

import varitok  # noqa: E402
from varitok import UserError  # noqa: E402

from ...codecs.examples import RATE  # noqa: E402
from ..exporters.test_rebuild import exported_preset  # noqa: E402


@pytest.fixture(scope="module", params=["audio/demo", pytest.param("audio/mimi_small", marks=pytest.mark.slow)])
def bundle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sounds") / "bundle"
    exported_preset(request.param, folder)
    return folder


@torch.inference_mode()
def test_it_is_the_bundles_codec_and_survives_a_round_trip(bundle, tmp_path):
    from transformers import AutoConfig, AutoModel
    from transformers.modeling_utils import PreTrainedAudioTokenizerBase

    from varitok.export.adapters.transformers_audio import VaritokAudioTokenizer

    made = VaritokAudioTokenizer.from_bundle(bundle)
    assert isinstance(made, PreTrainedAudioTokenizerBase) and not made.training
    codec = varitok.load_torch(bundle)
    hop, codebooks = made.config.hop_length, made.config.num_quantizers
    sounds = torch.rand(2, 1, 3 * hop + 5) - 0.5
    codes = made.encode(sounds).audio_codes
    assert torch.equal(codes, codec.encode(sounds)) and codes.shape == (2, codebooks, 4)
    assert torch.equal(made.decode(codes).audio_values, codec.decode(codes))
    made.save_pretrained(tmp_path / "saved")
    assert not list((tmp_path / "saved").glob("*.bin")), "weights are data"
    again = AutoModel.from_pretrained(tmp_path / "saved")
    assert isinstance(again, VaritokAudioTokenizer)
    assert AutoConfig.from_pretrained(tmp_path / "saved").sampling_rate == made.config.sampling_rate >= RATE
    assert torch.equal(again.encode(sounds).audio_codes, codes)
    assert torch.equal(again.decode(codes).audio_values, codec.decode(codes))
    assert torch.equal(again.encode(sounds, num_quantizers=1).audio_codes, codes[:, :1])
    mask = torch.ones(2, sounds.shape[2])
    mask[1, 2 * hop :] = 0
    quiet = sounds * mask[:, None]
    assert torch.equal(again.encode(sounds, mask).audio_codes, codec.encode(quiet))
    whole = again(sounds, mask)
    assert whole.audio_values.shape == sounds.shape and torch.equal(whole.audio_codes, codec.encode(quiet))
    assert again.decode(codes, mask).audio_values.shape == sounds.shape


def test_only_bundles_of_sounds_are_taken(exported):
    from varitok.export.adapters.transformers_audio import VaritokAudioTokenizer

    with pytest.raises(UserError, match="not a bundle of an audio codec"):
        VaritokAudioTokenizer.from_bundle(exported[1])
