"""Word error rate by a speech recognizer: a folder of a Whisper of the package `transformers`.

The reference is the recognizer's own transcript of the original, so that its mistakes on clean speech don't count.
"""

import math
import re
from dataclasses import replace
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from torchaudio.functional import edit_distance, resample

from varitok import UserError
from varitok.data.teachers.base import load_pretrained
from varitok.data.teachers.text import load_tokenizer

from .audio import each_sound
from .metric import Comparison, Metric

__all__ = ["METRICS", "Recognizer", "word_error_rate"]

SECONDS = 30  # Whisper's window
START, END = "<|startoftranscript|>", "<|endoftext|>"
TASK = ("<|en|>", "<|transcribe|>")  # of a Whisper of several languages
KNOWN = (
    "feature_size",
    "sampling_rate",
    "hop_length",
    "chunk_length",
    "n_fft",
    "padding_value",
    "dither",
)  # of the features
PLAIN = "<|notimestamps|>"
MOST = 224  # tokens of a window, half of Whisper's positions


class Recognizer:
    """A Whisper (Radford et al., arXiv 2212.04356) that writes English down by greedy search.

    Args:
        folder: Folder of config.json, preprocessor_config.json, the weights and the tokenizer's files: a path, or a
            name below one of `weights.weight_folders`.
        device: Device of the network.

    Raises:
        UserError: `load_pretrained` fails, the tokenizer can't be read, or the network isn't a Whisper.
    """

    def __init__(self, folder: str, device: torch.device) -> None:
        found = load_pretrained(
            folder, "a Whisper, such as openai/whisper-base", processor=True, auto="AutoModelForSpeechSeq2Seq"
        )
        from transformers import GenerationConfig, WhisperFeatureExtractor  # noqa: PLC0415 (an extra)

        if found.network.config.model_type != "whisper":
            raise UserError(f"--asr {folder}: a {found.network.config.model_type}, not a Whisper")
        self.network: Any = found.network.float().eval().requires_grad_(False).to(device)
        self.tokenizer: Any = load_tokenizer(found.folder)
        self.features: Any = WhisperFeatureExtractor(**{k: v for k, v in found.processor.items() if k in KNOWN})
        known = self.tokenizer.get_vocab()
        missing = [word for word in (START, END, PLAIN) if word not in known]
        if missing:
            raise UserError(f"--asr {folder}: its tokenizer has no {missing[0]}, which a Whisper's has")
        several = self.network.config.vocab_size > 51864  # that of English alone
        self.prompt = [known[word] for word in (START, *(TASK if several else ()), PLAIN) if word in known]
        own = found.network.generation_config
        self.search = GenerationConfig(
            max_new_tokens=MOST,
            eos_token_id=known[END],
            pad_token_id=known[END],
            suppress_tokens=own.suppress_tokens,
            begin_suppress_tokens=own.begin_suppress_tokens,
        )

    @torch.no_grad()
    def words(self, sound: Tensor, sample_rate: int) -> list[str]:
        """Return the words of a waveform `(t,)`, in small letters and without punctuation; 30 s at a time."""
        from transformers import GenerationMixin  # noqa: PLC0415

        rate = int(self.features.sampling_rate)
        text = []
        for part in resample(sound.cpu(), sample_rate, rate).split(SECONDS * rate):
            given = self.features(part.numpy(), sampling_rate=rate, return_tensors="pt").input_features
            prompt = torch.tensor([self.prompt], device=self.network.device)
            # Whisper's own `generate` needs more of the folder, and cuts long sounds by timestamps.
            written = GenerationMixin.generate(
                self.network, given.to(self.network.device), self.search, decoder_input_ids=prompt
            )
            text.append(self.tokenizer.decode(written[0, len(self.prompt) :], skip_special_tokens=True))
        return re.findall(r"[\w']+", " ".join(text).lower())


class _WordErrors:
    """Compares transcripts; an original is written down once, however many reconstructions are compared with it."""

    def __init__(self, recognizer: Recognizer, sample_rate: int) -> None:
        self.recognizer, self.sample_rate = recognizer, sample_rate
        self.known: dict[bytes, list[str]] = {}  # words of the originals, by a digest of their samples

    def __call__(self, fake: Tensor, real: Tensor) -> float:
        """Compute the word error rate of a waveform `(c, t)`, mixed to mono; NaN if the original has no words."""
        key = sha256(real.cpu().numpy().tobytes()).digest()
        if key not in self.known:
            self.known[key] = self._words(real)
        wanted = self.known[key]
        return edit_distance(self._words(fake), wanted) / len(wanted) if wanted else math.nan

    def _words(self, sound: Tensor) -> list[str]:
        return self.recognizer.words(sound.mean(0), self.sample_rate)


def _build(folder: str | None, device: torch.device, sample_rate: int) -> Comparison:
    if folder is None:
        raise UserError("metric 'wer' needs a speech recognizer: give --asr FOLDER, a Whisper of transformers")
    return partial(each_sound, _WordErrors(Recognizer(folder, device), sample_rate))


def word_error_rate(folder: str) -> Metric:
    """Return the word error rate by the recognizer in a folder; see `Recognizer`."""
    return replace(WER, build=partial(_build, folder), available=lambda _: True)


WER = Metric(
    "wer",
    "WER",
    "{:.3f}",
    label="word error rate",
    definition="mean over sounds in which the recognizer hears words; words to replace, insert and delete to come from"
    " the reconstruction's transcript to the original's, by the same Whisper (--asr), greedy, divided by the words of"
    " the original's; lower is better",
    higher_is_better=False,
    build=partial(_build, None),
    available=lambda _: False,
)
METRICS = (WER,)
