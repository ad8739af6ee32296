"""Word error rate: its arithmetic with a recognizer in the place of Whisper, a small Whisper, missing files."""

import json

import pytest
import torch

from varitok import UserError
from varitok.codecs.evaluation.cli import recognizing
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.metrics import transcription
from varitok.codecs.metrics.transcription import Recognizer, word_error_rate
from varitok.codecs.modalities.audio import Audio
from varitok.codecs.modalities.image import Image
from varitok.codecs.modalities.registry import modality_of
from varitok.data.synthetic.audio import Voices

from ..evaluation.test_evaluate_audio import Louder, _batch

RATE = 16_000


class Loudness:
    """Hears a word in each tenth of a second that isn't silent, its level."""

    heard = 0

    def __init__(self, folder, device):
        self.folder = folder

    def words(self, sound, sample_rate):
        Loudness.heard += 1
        levels = [round(float(part.abs().max()) * 8) for part in sound.split(sample_rate // 10)]
        return [str(level) for level in levels if level]


def sounds(*levels):
    return torch.tensor(levels).div(8).repeat_interleave(RATE // 10)[None, None]


def test_words_are_counted_against_the_original_s_own(monkeypatch):
    monkeypatch.setattr(transcription, "Recognizer", Loudness)
    wer = Audio(RATE).with_metric(word_error_rate("FOLDER")).comparison("wer", "cpu")

    def measure(fake, real):
        return wer(fake, real, torch.tensor([real.shape[2]])).item()

    real = sounds(1, 2, 3, 4)
    assert measure(real, real) == 0
    assert measure(sounds(1, 2, 3, 0), real) == 0.25
    assert measure(sounds(2, 3, 4, 5), real) == 0.5  # one deleted, one inserted
    assert measure(sounds(1, 5, 3, 6), real) == 0.5
    assert measure(torch.zeros_like(real), real) == 1
    assert torch.tensor(measure(real, torch.zeros_like(real))).isnan()
    assert Loudness.heard == 2 + 6 - 1, "an original is heard once, and a reconstruction of silence not at all"


def test_an_evaluation_measures_it_at_each_length(monkeypatch):
    monkeypatch.setattr(transcription, "Recognizer", Loudness)
    codec = Louder()
    table = evaluate(codec, [_batch(8000, 4000)], metrics=["wer"], modality=recognizing(modality_of(codec), "FOLDER"))
    assert table.column("wer")[0] == 1 and table.column("wer")[-1] == 0 and "Whisper" in table.header["column wer"]


def test_it_is_measured_where_a_recognizer_is_given():
    assert "wer" not in Audio(RATE).available() and "wer" in Audio(RATE).with_metric(word_error_rate("X")).available()
    with pytest.raises(UserError, match="'wer' needs a speech recognizer: give --asr FOLDER"):
        Audio(RATE).comparison("wer", "cpu")
    with pytest.raises(UserError, match="--asr: word errors are measured on sounds, and this codec's"):
        recognizing(Image(), "X")
    assert recognizing(Image(), None).name == "image"


def test_a_folder_without_a_whisper_is_named(tmp_path):
    with pytest.raises(UserError, match=r"place config.json, preprocessor_config.json and .* of a Whisper"):
        recognizing(Audio(RATE), str(tmp_path)).comparison("wer", "cpu")


@pytest.fixture
def whisper(tmp_path):
    """A folder of a Whisper with random weights and a vocabulary of letters."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]
    known = {word: index for index, word in enumerate([*special, *"abcdefghijklmnopqrstuvwxyz"])}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, additional_special_tokens=special)
    config = transformers.WhisperConfig(
        vocab_size=len(known), d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=80, max_target_positions=448,
        pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=1, suppress_tokens=None,
        begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.WhisperForConditionalGeneration(config).save_pretrained(tmp_path)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_a_whisper_writes_words(whisper):
    sound = Voices(RATE, 31 * RATE, length=2, train=False)[0, 0]
    recognizer = Recognizer(str(whisper), torch.device("cpu"))
    words = recognizer.words(sound[0], RATE)
    assert words == recognizer.words(sound[0], RATE) and all(word.isalpha() for word in words)
    value = recognizing(Audio(RATE), str(whisper)).comparison("wer", "cpu")
    assert value(sound[None], sound[None], torch.tensor([31 * RATE])).item() == 0 or not words
    config = json.loads((whisper / "config.json").read_text())
    (whisper / "config.json").write_text(json.dumps(config | {"model_type": "speech_to_text"}))
    with pytest.raises(UserError):
        Recognizer(str(whisper), torch.device("cpu"))
