"""How far a sound is from its original: one value for each sound, on 16-bit values.

Signals are `(b, c, t)` with `lengths` valid samples. Each is cut out of its batch and compared alone,
so neither padding nor its neighbors change it: the spectral distances have zeros outside the signal. Undefined
values, such as the signal-to-distortion ratio of silence, are NaN; the caller averages the others.
Channels are compared one by one and averaged.
"""

import importlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchaudio.functional import resample

from varitok import UserError

from ..losses.spectral import SISDR, MultiResolutionSTFT, MultiScaleMel
from .metric import Comparison, Metric

__all__ = ["METRICS", "round_to_16_bits"]

Measure: TypeAlias = Callable[[Tensor, Tensor], float]
"""(decoded, original), both float32 `(c, t)` and whole, to a value."""

CAP = 80.0  # dB, what the floor of `SISDR` bounds it to
SILENCE = 1e-10  # mean square about the mean; half a step of 16 bits has 2.3e-10
STFT_WINDOWS = (2048, 512)
STOI_RATE, PESQ_RATE = 10_000, 16_000  # Hz
PESQ_SECONDS = 20.0  # see `_pesq`
PESQ_LEAST = 0.999  # of P.862.2, equation 1; noise comes nearer to it than a raw score of -0.5 does


def round_to_16_bits(signal: Tensor) -> Tensor:
    """Round samples as a 16-bit file would, float32: clamped to [-1, 1), to the nearest 2^-15.

    Raises:
        UserError: A sample isn't finite.
    """
    signal = signal.float()
    if not bool(signal.isfinite().all()):
        raise UserError("a sound to be compared or written has samples that are NaN or infinite")
    return signal.mul(32768).round().clamp(-32768, 32767).div(32768)


def _each(measure: Measure, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compare sound by sound.

    Raises:
        UserError: Both sides have different shapes, a length is 0 or too large, or a valid sample isn't finite.
    """
    if fake.shape != real.shape or fake.ndim != 3:
        raise UserError(f"sounds to compare have shapes {tuple(fake.shape)} and {tuple(real.shape)}, not one (b, c, t)")
    values = []
    for decoded, original, length in zip(fake, real, lengths.tolist(), strict=True):
        if not 1 <= length <= fake.shape[2]:
            raise UserError(f"a sound of {length} samples to compare: it should have from 1 to {fake.shape[2]}")
        values.append(measure(round_to_16_bits(decoded[:, :length]), round_to_16_bits(original[:, :length])))
    return torch.tensor(values)


def _distance(loss: nn.Module, fake: Tensor, real: Tensor) -> float:
    """Take a loss' value for one sound."""
    return float(loss(fake[None], real[None], torch.tensor([fake.shape[1]], device=fake.device)))


def _silent(channel: Tensor) -> bool:
    """Return whether a channel `(t,)` is constant."""
    return bool((channel - channel.mean()).square().mean() <= SILENCE)


def _si_sdr(loss: nn.Module, fake: Tensor, real: Tensor) -> float:
    """Compute the ratio in dB of each channel that isn't silent; their mean."""
    values = []
    for decoded, original in zip(fake, real, strict=True):
        if not _silent(original):
            # As a loss, silence must not be infinitely bad; as a result it is the worst that there is.
            ratio = -CAP if _silent(decoded) else -_distance(loss, decoded[None], original[None])
            values.append(min(max(ratio, -CAP), CAP))
    return _mean(values)


def _stoi(pystoi: Any, fake: Tensor, real: Tensor, rate: int, *, extended: bool) -> float:
    """Compute STOI of a channel `(t,)`; NaN where less than 30 frames (0.4 s) aren't silent."""
    # Extended, pystoi draws from NumPy's common generator: what it adds decides the value where nothing else is there.
    state = np.random.get_state()
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        try:
            return float(pystoi.stoi(real.double().numpy(), fake.double().numpy(), rate, extended=extended))
        except (RuntimeWarning, ValueError):  # too few frames, or none at all
            return math.nan
        finally:
            np.random.set_state(state)


def _pesq(pesq: Any, fake: Tensor, real: Tensor, rate: int) -> float:
    """Compute wideband PESQ of a channel `(t,)`, in equal parts of at most 20 s; NaN where none has a value.

    The package has room for 50 utterances, and overflows (the process dies) where it finds more. As each is a fifth of
    a second at least, and so is each pause, 20 s can't hold more.
    """
    decoded, original = (resample(side, rate, PESQ_RATE) for side in (fake, real))
    parts = math.ceil(len(original) / (PESQ_SECONDS * PESQ_RATE))
    sides = zip(decoded.tensor_split(parts), original.tensor_split(parts), strict=True)
    values = [_pesq_part(pesq, *(side.numpy() for side in pair)) for pair in sides if not _silent(pair[1])]
    return _mean([value for value in values if not math.isnan(value)])


def _pesq_part(pesq: Any, decoded: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> float:
    """Compute wideband PESQ at 16 kHz; NaN where the original is shorter than 0.25 s or has no speech in it."""
    try:
        return float(pesq.pesq(PESQ_RATE, original, decoded, "wb"))
    except (pesq.NoUtterancesError, ValueError):  # the latter where it divided by nothing
        # Whose fault is it? A reconstruction in which speech was lost must not drop out of the mean.
        try:
            pesq.pesq(PESQ_RATE, original, original, "wb")
        except (pesq.NoUtterancesError, ValueError):
            return math.nan
        return PESQ_LEAST
    except pesq.BufferTooShortError:
        return math.nan


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _build_mel(device: torch.device, sample_rate: int) -> Comparison:
    return partial(_each, partial(_distance, MultiScaleMel(sample_rate).to(device)))


def _build_stft(device: torch.device, _: int) -> Comparison:
    # The loss is of natural logarithms; the factor makes the sum over windows one of log10.
    spectra = MultiResolutionSTFT(STFT_WINDOWS, None, None, convergence=0.0, scale=1 / math.log(10))
    return partial(_each, partial(_distance, spectra.to(device)))


def _build_si_sdr(_device: torch.device, _sample_rate: int) -> Comparison:
    return partial(_each, partial(_si_sdr, SISDR()))


def _speech_metric(name: str, title: str, form: str, definition: str, package: str, least: int, compare: Any) -> Metric:
    """Return a metric that a package computes, at a sample rate of `least` Hz.

    Args:
        name: The column's.
        title: Its heading.
        form: How a value is printed.
        definition: What it means.
        package: The package's name, for pip and for Python.
        least: The lowest sample rate of signals that have it, in Hz.
        compare: (package, decoded, original, sample rate) to a value for a channel `(t,)`.
    """

    def build(_: torch.device, sample_rate: int) -> Comparison:
        if sample_rate < least:
            raise UserError(f"metric {name!r} works at {least} Hz, and the sounds are sampled at {sample_rate} Hz")
        try:
            module = importlib.import_module(package)
        except ImportError as error:
            raise UserError(
                f"metric {name!r} needs the package {package}: pip install 'varitok[audio-metrics]'"
            ) from error

        def measure(fake: Tensor, real: Tensor) -> float:
            sides = zip(fake.cpu(), real.cpu(), strict=True)
            values = [compare(module, a, b, sample_rate) for a, b in sides if not _silent(b)]
            return _mean([value for value in values if not math.isnan(value)])

        return partial(_each, measure)

    def available(sample_rate: int) -> bool:
        return find_spec(package) is not None and sample_rate >= least

    return Metric(name, title, form, definition=definition, build=build, available=available)


METRICS = (
    Metric(
        "mel",
        "mel",
        "{:.3f}",
        label="mel distance",
        definition="mean over sounds; sum over windows of 32, 64, ... 2048 samples, a quarter apart, periodic Hann, of"
        " the mean absolute difference of log10 mel magnitudes in 5, 10, ... 320 bands (Slaney, 0 Hz to half the sample"
        " rate), not below 1e-5 (DAC, arXiv 2306.06546, section 3.5); at {rate} Hz; lower is better",
        higher_is_better=False,
        build=_build_mel,
    ),
    Metric(
        "stft",
        "STFT",
        "{:.3f}",
        label="STFT distance",
        definition="mean over sounds; sum over windows of 2048 and 512 samples, a quarter apart, periodic Hann, of the"
        " mean absolute difference of log10 magnitudes, not below 1e-5; at {rate} Hz; lower is better",
        higher_is_better=False,
        build=_build_stft,
    ),
    Metric(
        "si_sdr",
        "SI-SDR",
        "{:.2f}",
        label="SI-SDR (dB)",
        definition=f"dB, mean over sounds that aren't silent, each within {CAP:g} of 0 (a silent reconstruction of a"
        f" sound has -{CAP:g}); means of both sides taken away (arXiv 1811.02508); at {{rate}} Hz",
        build=_build_si_sdr,
    ),
    _speech_metric(
        "stoi",
        "STOI",
        "{:.3f}",
        "mean over sounds that have one; short-time objective intelligibility (Taal et al. 2011, doi"
        " 10.1109/TASL.2011.2114881) by pystoi, at 10 kHz, from {rate} Hz; silent frames of the original are left out",
        "pystoi",
        STOI_RATE,
        partial(_stoi, extended=False),
    ),
    _speech_metric(
        "estoi",
        "ESTOI",
        "{:.3f}",
        "mean over sounds that have one; extended STOI (Jensen and Taal 2016, doi 10.1109/TASLP.2016.2585878) by"
        " pystoi, at 10 kHz, from {rate} Hz; silent frames of the original are left out",
        "pystoi",
        STOI_RATE,
        partial(_stoi, extended=True),
    ),
    _speech_metric(
        "pesq",
        "PESQ",
        "{:.2f}",
        "MOS-LQO, mean over sounds that have one; wideband PESQ (ITU-T P.862.2) by the package pesq, at 16 kHz,"
        " from {rate} Hz by torchaudio's sinc; of more than 20 s, the mean over equal parts; 0.999, the limit"
        " downwards, where no speech is found in the reconstruction",
        "pesq",
        PESQ_RATE,
        _pesq,
    ),
)
