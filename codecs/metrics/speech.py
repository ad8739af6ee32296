"""Metrics of speech by pretrained networks: DNSMOS, and the similarity of speakers.

Waveforms are `(b, c, t)`, as in `audio`. The networks are files of packages (`pip install 'varitok[speech-metrics]'`);
they are read from there without importing the packages, whose own dependencies aren't needed then.
"""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchaudio.functional import resample

from varitok.data.weights import load_weights

from ..networks.layers.stft import Spectrum, mel_bank
from .audio import speech_metric

__all__ = ["METRICS", "SpeakerEncoder"]

RATE = 16_000  # Hz, of both networks
EXTRA = "speech-metrics"
DNSMOS_SECONDS, DNSMOS_WINDOW = 9.01, 144_160  # a window, in seconds and in samples
OVERALL = (-0.06766283, 1.11546468, 0.04602535)  # polynomial from the network's overall score to MOS, of its authors
PART, PART_HOP, PART_LEAST = 160, 77, 0.75  # frames of 10 ms of a part; share of the last part that must be there
LOUDNESS = -30.0  # dB of full scale, to which quieter sounds are amplified


def _file(package: str, name: str) -> Path:
    """Return a file of an installed package.

    Raises:
        ImportError: The package isn't installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(package)
    return Path(next(iter(spec.submodule_search_locations))) / name


def _dnsmos_network(package: str) -> Any:
    import onnxruntime  # noqa: PLC0415 (slow to import)

    return onnxruntime.InferenceSession(str(_file(package, "dnsmos_models/sig_bak_ovr.onnx")))


def _dnsmos(session: Any, fake: Tensor, _: Tensor, rate: int) -> float:
    """Compute DNSMOS' overall score of a channel `(t,)`: the mean over windows that begin every second."""
    sound = resample(fake, rate, RATE).clamp(-1, 1)
    while len(sound) < DNSMOS_WINDOW:
        sound = sound.repeat(2)
    # As its authors count, in floating point: windows whose end is rounded down are left out.
    ends = [int((second + DNSMOS_SECONDS) * RATE) for second in range(int(len(sound) // RATE - DNSMOS_SECONDS) + 1)]
    starts = [second * RATE for second, end in enumerate(ends) if end - second * RATE >= DNSMOS_WINDOW]
    parts = [sound[start : start + DNSMOS_WINDOW] for start in starts]
    scores = [session.run(None, {"input_1": part[None].numpy()})[0][0][2] for part in parts]
    return float(np.mean(np.polyval(OVERALL, np.array(scores, np.float64))))


class SpeakerEncoder(nn.Module):
    """Speaker encoder of the package resemblyzer (Apache-2.0), trained by the GE2E loss (Wan et al., arXiv 1710.10467).

    Three LSTM layers over 40 mel bands; a part of 1.6 s has the embedding of its last step. The package cuts out pauses
    by a voice activity detector; here they stay.

    Args:
        path: The package's file `pretrained.pt`.

    Raises:
        UserError: The file has other weights.
    """

    bank: Tensor

    def __init__(self, path: Path) -> None:
        super().__init__()
        with torch.device("meta"):
            self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
            self.linear = nn.Linear(256, 256)
        load_weights(self, path, "resemblyzer's weights", key="model_state", beside=("similarity_",))
        self.lstm.flatten_parameters()
        self.spectrum = Spectrum(400, 160)
        self.register_buffer("bank", mel_bank(RATE, 40, 400, 0.0, None), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, sound: Tensor) -> Tensor:
        """Return the embedding `(256,)`, of length 1, of a waveform `(t,)` at 16 kHz."""
        level = sound.square().mean().clamp(min=1e-10).log10() * 10
        sound = sound * 10 ** ((LOUDNESS - level).clamp(min=0) / 20)
        frames = len(sound) // 160 + 1
        starts = [*range(0, max(1, frames - PART + PART_HOP + 1), PART_HOP)]
        if len(starts) > 1 and len(sound) / 160 - starts[-1] < PART_LEAST * PART:
            starts.pop()
        total = (starts[-1] + PART) * 160
        spectrum, _ = self.spectrum(functional.pad(sound, (0, max(0, total - len(sound))))[None, None])
        mel = spectrum[0, 0].abs().square() @ self.bank  # (n, f) -> (n, 40)
        _, (hidden, _) = self.lstm(torch.stack([mel[start : start + PART] for start in starts]))
        parts = functional.normalize(self.linear(hidden[-1]).relu(), dim=1)
        return functional.normalize(parts.mean(0), dim=0)


def _similarity(network: SpeakerEncoder, fake: Tensor, real: Tensor, rate: int) -> float:
    """Compute the cosine of the embeddings of two channels `(t,)`; NaN below a fifth of a second."""
    if len(real) < rate / 5:
        return math.nan
    embeddings = [network(resample(side, rate, RATE)) for side in (fake, real)]
    return float(torch.dot(*embeddings))


METRICS = (
    speech_metric(
        "dnsmos",
        "DNSMOS",
        "{:.2f}",
        "overall MOS from 1 to 5 without a reference, mean over sounds; DNSMOS P.835 (Reddy et al., arXiv 2110.01763)"
        " by the network of speechmos, at 16 kHz, resampled from {rate} Hz (torchaudio, sinc)",
        "speechmos",
        RATE,
        _dnsmos,
        load=_dnsmos_network,
        extra=EXTRA,
    ),
    speech_metric(
        "speaker",
        "speaker",
        "{:.3f}",
        "mean over sounds; cosine of the speaker embeddings of original and reconstruction, by resemblyzer's network"
        " (GE2E, arXiv 1710.10467) at 16 kHz, resampled from {rate} Hz (torchaudio, sinc); pauses are kept",
        "resemblyzer",
        RATE,
        _similarity,
        load=lambda package: SpeakerEncoder(_file(package, "pretrained.pt")),
        extra=EXTRA,
    ),
)
