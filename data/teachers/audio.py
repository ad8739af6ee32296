"""Audio teachers."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.compliance.kaldi import fbank
from torchaudio.transforms import Resample

from varitok import UserError

from ..feature_map import FeatureMap
from .base import Layer, Teacher, check_layer, layer_of, load_pretrained

__all__ = ["AudioTransformer"]

BAND_WINDOW, BAND_STEP = 400, 160  # window and hop length of mel features, in samples


class AudioTransformer(Teacher):
    """An audio transformer of the package `transformers`: HuBERT, WavLM, wav2vec 2.0, w2v-BERT 2.0.

    Audio is mixed to mono, resampled to the network's rate, and normalized as by its own feature extractor. Zeros at
    both ends, about (window - stride) / 2 samples, center the receptive field of each step on its samples.

    Args:
        folder: Folder of config.json, preprocessor_config.json and the weights: a path, or a name below one of
            `weights.weight_folders`.
        sample_rate: Sample rate of the input signals, in Hz.
        layer: Layer whose hidden states are the features.

    Raises:
        UserError: `load_pretrained` fails, or the network isn't a complete audio transformer.
    """

    def __init__(self, folder: str, sample_rate: int, layer: Layer = "last") -> None:
        super().__init__()
        what = "an audio transformer, such as microsoft/wavlm-large or facebook/hubert-base-ls960"
        found = load_pretrained(folder, what, processor=True)
        config = found.network.config
        # The mask embedding is used in pretraining only.
        missing = [name for name in found.missing if "masked_spec_embed" not in name]
        self.bands = config.model_type == "wav2vec2-bert"  # its input is mel features, not a waveform
        if missing or not (self.bands or hasattr(config, "conv_stride")):
            reason = f"{len(missing)} weights are missing, {missing[0]} first" if missing else f"a {config.model_type}"
            raise UserError(f"{found.folder}: not a complete audio transformer ({reason})")
        self.network: nn.Module = found.network.eval().requires_grad_(False)
        self.name = found.folder.name
        self.channels = int(config.hidden_size)
        self.layer = check_layer(layer, found.network)
        self.normalizes = bool(found.processor.get("do_normalize", True))
        self.sample_rate = sample_rate
        self.rate = int(found.processor.get("sampling_rate", 16000))
        self.resample = Resample(sample_rate, self.rate) if sample_rate != self.rate else nn.Identity()
        if self.bands:
            self.stride, self.window = 2 * BAND_STEP, BAND_WINDOW + BAND_STEP
        else:
            self.stride, self.window = math.prod(config.conv_stride), 1
            for kernel, stride in zip(reversed(config.conv_kernel), reversed(config.conv_stride), strict=True):
                self.window = (self.window - 1) * stride + kernel
        # False if the first layer normalizes over time, regardless of the mask.
        self.masks = self.bands or config.feat_extract_norm == "layer"

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Compute the features of waveforms `(b, c, t)`; see `Teacher.forward`."""
        with torch.autocast(signal.device.type, enabled=False):
            sounds = signal.float().mean(1)  # (b, c, t) -> (b, t)
            whole = lengths is None or bool((lengths == sounds.shape[1]).all())
            if lengths is None:
                lengths = torch.full((len(sounds),), sounds.shape[1], device=sounds.device)
            sounds = self.resample(torch.where(_before(lengths, sounds.shape[1]), sounds, 0.0))
            valid = -(-lengths * self.rate // self.sample_rate)
            sounds, samples = self.prepare(sounds, valid)
        steps = (samples - self.window) // self.stride + 1
        if whole or self.masks:
            values = self._run(sounds, None if whole else samples)
        else:
            values = self._run_by_length(sounds, samples, int(steps.max()))
        step = self.stride * self.sample_rate / self.rate
        return FeatureMap(values, (step,), None if whole else steps)

    def prepare(self, sounds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Normalize waveforms `(b, n)` at the network's rate to mean 0 and variance 1 if it expects that, and pad.

        Returns:
            Waveforms `(b, m)`, and the number of samples of each that its steps cover, padding included, `(b,)`.
        """
        mask = _before(valid, sounds.shape[1])
        if self.normalizes and not self.bands:
            count = valid.clamp(min=1)[:, None]
            mean = torch.where(mask, sounds, 0.0).sum(1, keepdim=True) / count
            away = sounds - mean
            variance = torch.where(mask, away.square(), 0.0).sum(1, keepdim=True) / count
            sounds = away * (variance + 1e-7).rsqrt()
        sounds = torch.where(mask, sounds, 0.0)
        before = (self.window - self.stride) // 2
        total = int(self._count_covered(torch.tensor(sounds.shape[1])))
        return functional.pad(sounds, (before, total - before - sounds.shape[1])), self._count_covered(valid)

    def _count_covered(self, valid: Tensor) -> Tensor:
        """Return the number of samples, padding included, in the receptive field of the steps of `valid` samples."""
        # A mel frame in the padding would bias the mean of each band, so there the last step must be complete.
        steps = valid // self.stride if self.bands else -(-valid // self.stride)
        return (steps.clamp(min=1) - 1) * self.stride + self.window

    def _run(self, sounds: Tensor, samples: Tensor | None) -> Tensor:
        """Run the network on waveforms `(b, m)` with `samples` valid samples, None for all: features `(b, c, n)`."""
        given, counts = sounds, samples
        if self.bands:
            given = self.mel(sounds, samples)
            counts = None if samples is None else (samples - self.window) // self.stride + 1
        mask = None if counts is None else _before(counts, given.shape[1]).long()
        output = self.network(given, attention_mask=mask, output_hidden_states=True)
        return layer_of(output, self.layer).transpose(1, 2).float()  # (b, n, c) -> (b, c, n)

    def _run_by_length(self, sounds: Tensor, samples: Tensor, most: int) -> Tensor:
        """Run the network on the waveforms of each length separately, without padding: features `(b, c, most)`."""
        values = sounds.new_zeros(len(sounds), self.channels, most)
        for count in sorted(set(samples.tolist())):
            alike = (samples == count).nonzero()[:, 0]
            part = self._run(sounds[alike, :count], None)
            values = values.index_copy(0, alike, functional.pad(part, (0, most - part.shape[2])))
        return values

    def mel(self, sounds: Tensor, samples: Tensor | None = None) -> Tensor:
        """Compute the input of w2v-BERT `(b, n, 160)`: pairs of frames of 80 log mel bands, standardized over time."""
        counts = [sounds.shape[1]] * len(sounds) if samples is None else samples.tolist()
        with torch.autocast(sounds.device.type, enabled=False):
            rows = []
            for sound, count in zip(sounds, counts, strict=True):
                bands = fbank(sound[None, :count] * 2**15, num_mel_bins=80, window_type="povey")
                bands = (bands - bands.mean(0)) * (bands.var(0) + 1e-7).rsqrt()
                rows.append(bands[: len(bands) // 2 * 2].reshape(-1, 160))  # (2n, 80) -> (n, 160)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _before(lengths: Tensor, total: int) -> Tensor:
    """Return the mask of the first `lengths` steps, bool `(b, total)`."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]
