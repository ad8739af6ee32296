"""The audio modality."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import Dataset

from varitok.data.batch import Splits

from ..codec import Codec
from ..metrics import audio, speech, transcription
from ..metrics.metric import Column
from .base import Exhibit, GraphNames, Modality, Rows
from .media import draw_spectrograms, lossless_audio, spectrogram, write_wav

__all__ = ["Audio"]


class Audio(Modality):
    """Waveforms `(b, c, t)`, compared as 16-bit samples."""

    name = "audio"
    noun = kind = file_noun = "sound"
    examples = ("speech/00.ogg", "speech/01.ogg")
    grid = "t"
    graph = GraphNames("input_values", "audio_codes", "audio_values", ("num_samples",), ("num_frames",))
    rounding = "both sides are compared as 16-bit values; decoded ones are clamped and rounded to the nearest"
    metrics = (*audio.METRICS, *speech.METRICS, *transcription.METRICS)
    shown = ("mel", "si_sdr")
    rate = size = Column("kbps", "kbit/s", "{:.3f}", "kbit/s", "bits / seconds / 1000")
    element = "audio"

    @classmethod
    def recognizes(cls, codec: Any) -> bool:
        """Return whether a codec has a sample rate."""
        return getattr(codec, "sample_rate", None) is not None

    def as_written(self, signal: Tensor) -> Tensor:
        """Round to 16-bit samples, as floats in [-1, 1)."""
        return audio.round_to_16_bits(signal)

    def amount(self, signal: Tensor, lengths: Tensor) -> float:
        """Return the batch's duration in ms, so that bits per amount are kbit/s."""
        return float(lengths.sum()) / self.sample_rate * 1000

    def cut(self, signal: Tensor, seconds: float) -> Tensor:
        """Return the first `seconds` of a waveform `(c, t)`."""
        return signal[:, : max(1, round(seconds * self.sample_rate))]

    def write_samples(self, stem: Path, rows: Rows, scale: int = 1) -> tuple[Path, dict[str, Path]]:
        """Draw spectrograms, and write each waveform as a WAV file."""
        picture, media = stem.with_suffix(".png"), {}
        draw_spectrograms(picture, rows, self.sample_rate)
        for label, sounds in rows:
            for column, sound in enumerate(sounds):
                name = f"{column}_{label.replace(': ', '_')}"
                media[name] = stem / f"{name}.wav"
                write_wav(media[name], sound, self.sample_rate)
        return picture, media

    def exhibit(self, signals: Sequence[Tensor]) -> list[Exhibit]:
        """Return spectrograms, and lossless audio files."""
        return [
            Exhibit(spectrogram(sound, self.sample_rate), *lossless_audio(sound, self.sample_rate)) for sound in signals
        ]

    def describe(self, codec: Codec, size: Sequence[int]) -> dict[str, Any]:
        """Return the sample rate, the hop length and the frame rate of tokens."""
        rate, hop = self.sample_rate, codec.downsample[0]
        return {"sampling_rate": rate, "hop_length": hop, "frame_rate": rate / hop}

    def folder_splits(self, data: DictConfig, folder: Path) -> Splits:
        """Build the splits of a folder of audio files."""
        from varitok.data.datasets.audio import audio_folder  # noqa: PLC0415 (torchaudio is slow to import)

        form = {key: data[key] for key in ("channels", "val_seconds") if key in data}
        form |= {"sample_rate": data.sample_rate, "crop_tokens": None, "downsample": 1}
        return audio_folder(str(folder), val_share=1.0, **form)

    def dataset(
        self, config: Mapping[str, Any], files: Sequence[Path], seconds: float | None, side: int
    ) -> tuple[Dataset[Tensor], str]:
        """Build a dataset of audio files, resampled to the bundle's rate."""
        from varitok.data.datasets.audio import splits_of  # noqa: PLC0415 (torchaudio is slow to import)

        splits = splits_of(
            "", files, files, sample_rate=int(config["sampling_rate"]), crop_tokens=None,
            downsample=int(config["hop_length"]), channels=int(config["channels"]), val_seconds=seconds,
        )  # fmt: skip
        return splits.val, splits.about["protocol"]
