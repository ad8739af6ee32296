"""Teachers of sounds."""

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

BAND_WINDOW, BAND_STEP = 400, 160  # samples of a frame of mel bands, and between two


class AudioTransformer(Teacher):
    """A transformer of the package `transformers` that hears sounds: HuBERT, WavLM, wav2vec 2.0, w2v-BERT 2.0.

    Sounds are mixed to one channel, brought to its sample rate, and prepared as its own extractor does. Zeros before
    and behind, half of what its first layers overlap, center each step on its samples.

    Args:
        folder: With config.json, preprocessor_config.json and the weights: a path, or a name below one of
            `weights.weight_folders`.
        sample_rate: Sample rate of its input, in Hz.
        layer: Whose hidden states.

    Raises:
        UserError: `load_pretrained` fails, or the network isn't a whole transformer of sounds.
    """

    def __init__(self, folder: str, sample_rate: int, layer: Layer = "last") -> None:
        super().__init__()
        what = "a transformer of sounds, such as microsoft/wavlm-large or facebook/hubert-base-ls960"
        found = load_pretrained(folder, what, processor=True)
        config = found.network.config
        # A vector that only training needs.
        missing = [name for name in found.missing if "masked_spec_embed" not in name]
        self.bands = config.model_type == "wav2vec2-bert"  # mel bands are what it is given
        if missing or not (self.bands or hasattr(config, "conv_stride")):
            reason = f"{len(missing)} weights are missing, {missing[0]} first" if missing else f"a {config.model_type}"
            raise UserError(f"{found.folder}: not a whole transformer of sounds ({reason})")
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
        # A norm over time, in the first layer of some, ignores the mask.
        self.masks = self.bands or config.feat_extract_norm == "layer"

    def forward(self, signal: Tensor, lengths: Tensor | None = None) -> FeatureMap:
        """Compute the features of audio `(b, c, t)`; see `Teacher.forward`."""
        with torch.autocast(signal.device.type, enabled=False):
            sounds = signal.float().mean(1)
            whole = lengths is None or bool((lengths == sounds.shape[1]).all())
            if lengths is None:
                lengths = torch.full((len(sounds),), sounds.shape[1], device=sounds.device)
            sounds = self.resample(torch.where(_before(lengths, sounds.shape[1]), sounds, 0.0))
            valid = -(-lengths * self.rate // self.sample_rate)
            sounds, samples = self.prepare(sounds, valid)
        steps = (samples - self.window) // self.stride + 1
        if whole or self.masks:
            values = self._hear(sounds, None if whole else samples)
        else:
            values = self._apart(sounds, samples, int(steps.max()))
        step = self.stride * self.sample_rate / self.rate
        return FeatureMap(values, (step,), None if whole else steps)

    def prepare(self, sounds: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Bring sounds `(b, n)` of its rate to its scale, and put zeros around them.

        Returns:
            Sounds `(b, m)`, and how many samples of each make whole steps.
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
        """Count the samples, padding included, in the receptive field of that many steps."""
        # A frame of mel bands that is silent would spoil the bands' mean: there the last step must be full.
        steps = valid // self.stride if self.bands else -(-valid // self.stride)
        return (steps.clamp(min=1) - 1) * self.stride + self.window

    def _hear(self, sounds: Tensor, samples: Tensor | None) -> Tensor:
        """Run the network over prepared audio with `samples` valid samples; all if None."""
        given, counts = sounds, samples
        if self.bands:
            given = self.mel(sounds, samples)
            counts = None if samples is None else (samples - self.window) // self.stride + 1
        mask = None if counts is None else _before(counts, given.shape[1]).long()
        output = self.network(given, attention_mask=mask, output_hidden_states=True)
        return layer_of(output, self.layer).transpose(1, 2).float()

    def _apart(self, sounds: Tensor, samples: Tensor, most: int) -> Tensor:
        """Run the network over those of each length alone."""
        values = sounds.new_zeros(len(sounds), self.channels, most)
        for count in sorted(set(samples.tolist())):
            alike = (samples == count).nonzero()[:, 0]
            heard = self._hear(sounds[alike, :count], None)
            values = values.index_copy(0, alike, functional.pad(heard, (0, most - heard.shape[2])))
        return values

    def mel(self, sounds: Tensor, samples: Tensor | None = None) -> Tensor:
        """Compute w2v-BERT's input, mel bands `(b, n, 160)` of two frames each, every band standardized."""
        counts = [sounds.shape[1]] * len(sounds) if samples is None else samples.tolist()
        with torch.autocast(sounds.device.type, enabled=False):
            rows = []
            for sound, count in zip(sounds, counts, strict=True):
                bands = fbank(sound[None, :count] * 2**15, num_mel_bins=80, window_type="povey")
                bands = (bands - bands.mean(0)) * (bands.var(0) + 1e-7).rsqrt()
                rows.append(bands[: len(bands) // 2 * 2].reshape(-1, 160))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _before(lengths: Tensor, total: int) -> Tensor:
    """Mark each length's steps, bool `(b, total)`."""
    return torch.arange(total, device=lengths.device) < lengths[:, None]
