"""Audio metrics: one value per waveform, on 16-bit samples.

Waveforms are `(b, c, t)` with `lengths` valid samples. Each is compared alone, without its padding, so values don't
depend on the batch; the spectral distances zero-pad the waveform. Undefined values, such as the SI-SDR of silence, are
NaN; the caller averages the others. Channels are compared separately and averaged.
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

__all__ = ["METRICS", "each_sound", "round_to_16_bits", "speech_metric"]

Measure: TypeAlias = Callable[[Tensor, Tensor], float]
"""(decoded, original), both float32 `(c, t)` without padding, to a value."""

CAP = 80.0  # dB, the bound that `SISDR`'s floor implies
SILENCE = 1e-10  # variance; that of half a 16-bit step is 2.3e-10
STFT_WINDOWS = (2048, 512)
STOI_RATE, PESQ_RATE = 10_000, 16_000  # Hz
PESQ_SECONDS = 20.0  # see `_pesq`
PESQ_LEAST = 0.999  # lower limit of P.862.2, equation 1; noise scores closer to it than a raw score of -0.5 does


def round_to_16_bits(signal: Tensor) -> Tensor:
    """Clamp samples to [-1, 1) and round them to multiples of 2^-15, as in a 16-bit file; float32.

    Raises:
        UserError: A sample isn't finite.
    """
    signal = signal.float()
    if not bool(signal.isfinite().all()):
        raise UserError("audio to compare or write has NaN or infinite samples")
    return signal.mul(32768).round().clamp(-32768, 32767).div(32768)


def each_sound(measure: Measure, fake: Tensor, real: Tensor, lengths: Tensor) -> Tensor:
    """Compute a measure of each waveform, `(b,)`.

    Raises:
        UserError: The shapes differ, a length is 0 or too large, or a valid sample isn't finite.
    """
    if fake.shape != real.shape or fake.ndim != 3:
        raise UserError(f"audio to compare has shapes {tuple(fake.shape)} and {tuple(real.shape)}, not one (b, c, t)")
    values = []
    for decoded, original, length in zip(fake, real, lengths.tolist(), strict=True):
        if not 1 <= length <= fake.shape[2]:
            raise UserError(f"audio to compare has {length} samples: it should have from 1 to {fake.shape[2]}")
        values.append(measure(round_to_16_bits(decoded[:, :length]), round_to_16_bits(original[:, :length])))
    return torch.tensor(values)


def _distance(loss: nn.Module, fake: Tensor, real: Tensor) -> float:
    """Compute a loss of one waveform `(c, t)`."""
    return float(loss(fake[None], real[None], torch.tensor([fake.shape[1]], device=fake.device)))


def _silent(channel: Tensor) -> bool:
    """Return whether a channel `(t,)` is constant at 16 bits."""
    return bool((channel - channel.mean()).square().mean() <= SILENCE)


def _si_sdr(loss: nn.Module, fake: Tensor, real: Tensor) -> float:
    """Compute the mean SI-SDR, in dB, of the channels whose original isn't silent; NaN if all are silent."""
    values = []
    for decoded, original in zip(fake, real, strict=True):
        if not _silent(original):
            # The loss has a floor that keeps it finite for silence; the metric's value is the worst possible.
            ratio = -CAP if _silent(decoded) else -_distance(loss, decoded[None], original[None])
            values.append(min(max(ratio, -CAP), CAP))
    return _mean(values)


def _stoi(pystoi: Any, fake: Tensor, real: Tensor, rate: int, *, extended: bool) -> float:
    """Compute STOI of a channel `(t,)`; NaN if fewer than 30 frames (0.4 s) aren't silent."""
    # Extended STOI adds noise from NumPy's global generator, which decides the value of an empty band: fix the seed.
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
    """Compute wideband PESQ of a channel `(t,)`, averaged over equal parts of at most 20 s; NaN if it is undefined.

    The package has a buffer for 50 utterances and crashes the process if there are more. Utterances and the pauses
    between them last at least 0.2 s, so 20 s can't have more than 50.
    """
    decoded, original = (resample(side, rate, PESQ_RATE) for side in (fake, real))
    parts = math.ceil(len(original) / (PESQ_SECONDS * PESQ_RATE))
    sides = zip(decoded.tensor_split(parts), original.tensor_split(parts), strict=True)
    values = [_pesq_part(pesq, *(side.numpy() for side in pair)) for pair in sides if not _silent(pair[1])]
    return _mean([value for value in values if not math.isnan(value)])


def _pesq_part(pesq: Any, decoded: npt.NDArray[np.float32], original: npt.NDArray[np.float32]) -> float:
    """Compute wideband PESQ at 16 kHz; NaN if the original is shorter than 0.25 s or has no speech."""
    try:
        return float(pesq.pesq(PESQ_RATE, original, decoded, "wb"))
    except (pesq.NoUtterancesError, ValueError):  # ValueError after a division by zero
        # If the original has speech, its loss in the reconstruction gets the lowest score rather than NaN.
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
    return partial(each_sound, partial(_distance, MultiScaleMel(sample_rate).to(device)))


def _build_stft(device: torch.device, _: int) -> Comparison:
    # The loss has natural logarithms; the factor converts the sum over windows to log10.
    spectra = MultiResolutionSTFT(STFT_WINDOWS, None, None, convergence=0.0, scale=1 / math.log(10))
    return partial(each_sound, partial(_distance, spectra.to(device)))


def _build_si_sdr(_device: torch.device, _sample_rate: int) -> Comparison:
    return partial(each_sound, partial(_si_sdr, SISDR()))


def speech_metric(
    name: str,
    title: str,
    form: str,
    definition: str,
    package: str,
    least: int,
    compare: Callable[[Any, Tensor, Tensor, int], float],
    *,
    load: Callable[[str], Any] = importlib.import_module,
    extra: str = "audio-metrics",
) -> Metric:
    """Return a metric that an optional package computes on audio of at least `least` Hz.

    Args:
        name: Name of the column.
        title: Heading in a printed table.
        form: Format string of a printed value.
        definition: Definition for the header of a CSV file.
        package: Name of the package, for pip and for import.
        least: Lowest sample rate, in Hz.
        compare: (loaded package, decoded, original, sample rate) to the value of a channel `(t,)`.
        load: Loads the package, or the network in it, by its name; raises ImportError if it isn't installed.
        extra: Extra of this project that installs it.
    """

    def build(_: torch.device, sample_rate: int) -> Comparison:
        if sample_rate < least:
            raise UserError(f"metric {name!r} needs at least {least} Hz, and the audio has {sample_rate} Hz")
        try:
            loaded = load(package)
        except ImportError as error:
            raise UserError(f"metric {name!r} needs the package {package}: pip install 'varitok[{extra}]'") from error

        def measure(fake: Tensor, real: Tensor) -> float:
            sides = zip(fake.cpu(), real.cpu(), strict=True)
            values = [compare(loaded, a, b, sample_rate) for a, b in sides if not _silent(b)]
            return _mean([value for value in values if not math.isnan(value)])

        return partial(each_sound, measure)

    def available(sample_rate: int) -> bool:
        return find_spec(package) is not None and sample_rate >= least

    return Metric(name, title, form, definition=definition, build=build, available=available)


METRICS = (
    Metric(
        "mel",
        "mel",
        "{:.3f}",
        label="mel distance",
        definition="mean over sounds; sum over windows of 32, 64, ... 2048 samples, hop a quarter, periodic Hann, of"
        " the mean absolute difference of log10 mel magnitudes in 5, 10, ... 320 bands (Slaney, 0 Hz to half the sample"
        " rate), clamped to at least 1e-5 (DAC, arXiv 2306.06546, section 3.5); at {rate} Hz; lower is better",
        higher_is_better=False,
        build=_build_mel,
    ),
    Metric(
        "stft",
        "STFT",
        "{:.3f}",
        label="STFT distance",
        definition="mean over sounds; sum over windows of 2048 and 512 samples, hop a quarter, periodic Hann, of the"
        " mean absolute difference of log10 magnitudes, clamped to at least 1e-5; at {rate} Hz; lower is better",
        higher_is_better=False,
        build=_build_stft,
    ),
    Metric(
        "si_sdr",
        "SI-SDR",
        "{:.2f}",
        label="SI-SDR (dB)",
        definition=f"dB, mean over sounds that aren't silent, each clamped to [-{CAP:g}, {CAP:g}] (-{CAP:g} if the"
        " reconstruction is silent); both sides made zero-mean (arXiv 1811.02508); at {rate} Hz",
        build=_build_si_sdr,
    ),
    speech_metric(
        "stoi",
        "STOI",
        "{:.3f}",
        "mean over sounds with a value; short-time objective intelligibility (Taal et al. 2011, doi"
        " 10.1109/TASL.2011.2114881) by pystoi, at 10 kHz, from {rate} Hz; silent frames of the original are left out",
        "pystoi",
        STOI_RATE,
        partial(_stoi, extended=False),
    ),
    speech_metric(
        "estoi",
        "ESTOI",
        "{:.3f}",
        "mean over sounds with a value; extended STOI (Jensen and Taal 2016, doi 10.1109/TASLP.2016.2585878) by"
        " pystoi, at 10 kHz, from {rate} Hz; silent frames of the original are left out",
        "pystoi",
        STOI_RATE,
        partial(_stoi, extended=True),
    ),
    speech_metric(
        "pesq",
        "PESQ",
        "{:.2f}",
        "MOS-LQO, mean over sounds with a value; wideband PESQ (ITU-T P.862.2) by the package pesq, at 16 kHz,"
        " resampled from {rate} Hz (torchaudio, sinc); above 20 s, the mean over equal parts; 0.999, its lower"
        " limit, if no speech is found in the reconstruction",
        "pesq",
        PESQ_RATE,
        _pesq,
    ),
)
