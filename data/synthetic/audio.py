"""Synthetic audio: speech-like voices, tones and noise; needs no download."""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from varitok import UserError

from ..batch import Key, Splits
from .base import SyntheticDataset

__all__ = ["Voices", "voices"]

Floats = npt.NDArray[np.float32]

FRAME = 0.04  # minimum length in seconds of a frame of the time-varying filters
FORMANTS = 5
# First three formants of vowels in Hz, means over men (Peterson and Barney, 1952, "Control methods used in a study of
# the vowels", table II); the last row is a nasal murmur.
VOWELS = np.array([
    [270, 2290, 3010], [390, 1990, 2550], [530, 1840, 2480], [660, 1720, 2410], [730, 1090, 2440],
    [570, 840, 2410], [440, 1020, 2240], [300, 870, 2240], [640, 1190, 2390], [490, 1350, 1690],
    [250, 1100, 2300],
], np.float32)  # fmt: skip
NASAL = len(VOWELS) - 1
BANDWIDTHS = np.array([70, 90, 130, 200, 280], np.float32)  # Hz
KINDS = ("vowel", "nasal", "fricative", "voiced fricative", "stop", "pause")
CHANCES = (0.45, 0.13, 0.14, 0.07, 0.13, 0.08)
LEAST_LEVEL, MOST_LEVEL = -32.0, -14.0  # RMS in dB, relative to 1
PEAK = 0.95


@dataclass(eq=False, repr=False)
class Voices(SyntheticDataset):
    """A dataset of speech-like voices, tones and bursts of noise: an endless stand-in for recordings.

    A voice is a train of glottal pulses of varying pitch, plus noise, filtered by formants that glide between phonemes
    (source-filter model; Fant, 1960, "Acoustic theory of speech production"; formants of vowels from Peterson and
    Barney, 1952). Of the waveforms, 60 % are voices, 15 % tones with decaying partials, 10 % bursts of colored noise,
    and 15 % a voice plus tones or bursts.

    Args:
        sample_rate: Sample rate in Hz.
        samples: Samples of each waveform.
        channels: 1 or 2; with 2, one channel is the other with a short delay and another gain.
        length, seed, train: See `SyntheticDataset`.
    """

    sample_rate: int = 24_000
    samples: int = 24_000
    channels: int = 1

    def __getitem__(self, key: Key) -> Tensor:
        """Generate the waveform of `(epoch, index)`: float32 `(channels, samples)` in [-1, 1]."""
        return torch.from_numpy(_sound(self.chance(key), self.sample_rate, self.samples, self.channels))


def voices(
    sample_rate: Annotated[int, "[4000, inf)"] = 24_000,
    crop_tokens: int = 75,
    downsample: int = 320,
    val_seconds: Annotated[float, "(0, inf)"] = 2.0,
    length: int = 10_000,
    val_length: int = 64,
    channels: Annotated[int, "[1, 2]"] = 1,
    seed: Annotated[int, "[0, inf)"] = 0,
) -> Splits:
    """Build both splits of `Voices`, of `length` and `val_length` waveforms.

    Training waveforms have `crop_tokens * downsample` samples, validation waveforms `val_seconds` seconds.

    Raises:
        UserError: Validation waveforms are shorter than a sample.
    """
    if not val_seconds * sample_rate >= 1:
        raise UserError(f"data.val_seconds={val_seconds}: must be at least one sample long")
    protocol = f"made at {sample_rate} Hz, {val_seconds:g} s each; nothing else"
    form = {"sample_rate": sample_rate, "samples": crop_tokens * downsample, "channels": channels}
    val = {"samples": round(val_seconds * sample_rate)}
    what = "voices, {} synthetic sounds"
    return Voices.splits(what, protocol, val_length, val, length=length, seed=seed, **form)


def _sound(rng: np.random.Generator, rate: int, samples: int, channels: int) -> Floats:
    """Generate one waveform: `(channels, samples)`."""
    kind = rng.choice(4, p=(0.6, 0.15, 0.1, 0.15))
    if kind == 1:
        mono = _tones(rng, rate, samples)
    elif kind == 2:
        mono = _bursts(rng, rate, samples)
    else:
        mono = _voice(rng, rate, samples)
        if kind == 3:
            other = (_tones if rng.random() < 0.5 else _bursts)(rng, rate, samples)
            mono = _normalize_level(mono) + _normalize_level(other) * np.float32(10 ** (rng.uniform(-25, -5) / 20))
    # Recordings aren't silent between words: add room noise.
    mono = _normalize_level(mono) + _room(rng, samples) * np.float32(10 ** (rng.uniform(-60, -35) / 20))
    sound = mono[None]
    if channels == 2:
        late = min(samples - 1, int(rng.integers(0, max(1, rate // 1500))))
        other = np.concatenate([np.zeros(late, np.float32), mono[: samples - late]])
        sound = np.stack([mono, other * np.float32(rng.uniform(0.5, 1.5))])[:: rng.choice((-1, 1))]
    sound = _normalize_level(sound) * np.float32(10 ** (rng.uniform(LEAST_LEVEL, MOST_LEVEL) / 20))
    peak = np.abs(sound).max()
    result: Floats = np.ascontiguousarray(sound * np.float32(min(1.0, PEAK / max(peak, 1e-9))), np.float32)
    return result


def _room(rng: np.random.Generator, samples: int) -> Floats:
    """Generate stationary low-pass noise: `(samples,)`, with an RMS of 1."""
    white = rng.standard_normal(samples, np.float32)
    # A short FIR low-pass suffices, and is much faster than a recursive filter.
    width = min(samples, int(rng.integers(1, 9)))
    return _normalize_level(np.convolve(white, np.hanning(width + 2)[1:-1].astype(np.float32), "same"))


def _normalize_level(sound: Floats) -> Floats:
    """Scale to an RMS of 1; silence is unchanged."""
    level = float(np.sqrt(np.mean(np.square(sound))))
    return sound / np.float32(max(level, 1e-6))


class _Score(NamedTuple):
    """Synthesis parameters of a voice, for each of n frames."""

    formants: Floats  # (n, FORMANTS), Hz
    voiced: Floats  # (n,), amplitude of the pulses
    breath: Floats  # (n,), amplitude of the noise
    hiss: Floats  # (n, 2), center and bandwidth of the noise, Hz
    through: Floats  # (n,), share of the noise that is filtered by the formants, in [0, 1]


def _voice(rng: np.random.Generator, rate: int, samples: int) -> Floats:
    """Generate a voice `(samples,)`: pulses and noise through time-varying filters in the STFT domain."""
    size = _frame_size(rate)
    hop = size // 4
    frames = samples // hop + 1
    score = _score(rng, frames, hop / rate)
    pulses = torch.from_numpy(_pulses(rng, rate, samples))
    window = torch.hann_window(size)
    # Zeros are padded, as the signal begins with silence; `center` puts frame i around sample i * hop.
    spectrum = torch.stft(pulses, 2 * size, hop, size, window, pad_mode="constant", return_complex=True).numpy().T
    frequency = np.fft.rfftfreq(2 * size, 1 / rate).astype(np.float32)
    throat = _resonances(frequency, score.formants)
    center, width = score.hiss.T[..., None]
    lips = np.exp(-np.square((frequency - center) / width)).astype(np.complex64)
    lips += score.through[:, None] * (throat - lips)
    noise = _noise(rng, spectrum.shape) * np.float32(0.02 * np.sqrt(size))
    spectrum = spectrum * throat * score.voiced[:, None] + noise * lips * score.breath[:, None]
    return _inverse(spectrum, hop, samples, window)


def _score(rng: np.random.Generator, frames: int, step: float) -> _Score:
    """Draw phonemes for `frames` frames of `step` seconds, and smooth the transitions."""
    tract = rng.uniform(0.95, 1.35)  # a shorter vocal tract raises all formants: men, women, children
    pace = rng.uniform(0.7, 1.4)
    # Enough if all phonemes are short; the surplus is dropped.
    n = 2 + int(frames * step / 0.045 * 1.5)
    kinds = rng.choice(len(KINDS), n, p=CHANCES)
    kind = np.array(KINDS)[kinds]
    seconds = rng.uniform(0.06, 0.2, n) * pace * np.where(kind == "pause", 2.5, np.where(kind == "stop", 0.6, 1.0))
    ends = np.cumsum(seconds) - rng.uniform(0, 0.2)
    which = np.searchsorted(ends, np.arange(frames) * step).clip(max=n - 1)
    vowel = np.where(kind == "nasal", NASAL, rng.integers(0, NASAL, n))
    formants = np.concatenate([VOWELS[vowel], np.broadcast_to(np.array([3500, 4500], np.float32), (n, 2))], 1)
    formants = formants * np.float32(tract) * rng.uniform(0.94, 1.06, (n, FORMANTS)).astype(np.float32)

    def table(*values: float) -> Floats:
        """Return the value of each phoneme's kind, `(n,)`."""
        return np.array(values, np.float32)[kinds]

    loud = rng.uniform(0.5, 1.0, n).astype(np.float32)
    voiced = table(1.0, 0.45, 0.0, 0.25, 0.03, 0.0) * loud
    breath = table(0.04, 0.02, 0.7, 0.45, 0.0, 0.0) * loud
    hiss = np.stack([rng.uniform(1500, 7500, n), rng.uniform(700, 3500, n)], 1).astype(np.float32)
    through = table(1.0, 1.0, 0.1, 0.1, 0.4, 1.0)
    # A stop is a silence, with a burst in its last 15 ms.
    burst = (kind[which] == "stop") & (ends[which] - np.arange(frames) * step < 0.015)
    quick, slow = max(1, round(0.02 / step)), max(1, round(0.07 / step))
    return _Score(
        formants=_smooth(formants[which], slow),
        voiced=_smooth(voiced[which], quick),
        breath=np.where(burst, np.float32(0.8), _smooth(breath[which], quick)),
        hiss=_smooth(hiss[which], quick),
        through=_smooth(through[which], quick),
    )


def _smooth(track: Floats, width: int) -> Floats:
    """Smooth along the first axis by a moving average over `width` frames, with edge padding."""
    pad = [(width // 2 + 1, width - width // 2 - 1)] + [(0, 0)] * (track.ndim - 1)
    total = np.cumsum(np.pad(track, pad, mode="edge"), 0, dtype=np.float64)
    return ((total[width:] - total[:-width]) / width).astype(np.float32)


def _pulses(rng: np.random.Generator, rate: int, samples: int) -> Floats:
    """Generate a train of glottal pulses of varying pitch: `(samples,)`, with a spectral slope of -6 dB per octave.

    The derivative of the glottal flow, a sawtooth, with steps smoothed over two samples against aliasing (PolyBLEP).
    """
    seconds = samples / rate
    knots = np.arange(0, seconds + 0.6, 0.15)
    base = 85 * 2 ** rng.uniform(0, 1.6)  # 85 to 258 Hz
    declination = -1.5 * (knots / 2.5 % 1)  # semitones; reset at each phrase of 2.5 s
    tune = rng.normal(0, 2.0, len(knots)) + declination + 3 * np.sin(2 * np.pi * (knots / 1.3 + rng.random()))
    time = np.arange(samples, dtype=np.float32) / rate
    instants = np.arange(0, seconds + 0.02, 0.01)
    jitter = np.interp(time, instants, rng.normal(0, 0.005, len(instants)))  # 0.5 %
    pitch = base * 2 ** (np.interp(time, knots, tune) / 12) * (1 + jitter)
    step = np.minimum(pitch / rate, 0.25)
    phase = (rng.random() + np.cumsum(step)) % 1
    saw = 1 - 2 * phase
    after, before = phase < step, phase > 1 - step
    u = phase[after] / step[after]
    saw[after] += u * (2 - u) - 1  # PolyBLEP at the steep edge
    u = (phase[before] - 1) / step[before]
    saw[before] += u * (u + 2) + 1
    pulses: Floats = saw.astype(np.float32)
    return pulses


def _resonances(frequency: Floats, formants: Floats) -> npt.NDArray[np.complex64]:
    """Return the response of resonators, prod_k 1 / (1 - (f/F_k)^2 + i f B_k/F_k^2): `(frames, frequencies)`."""
    response = np.ones((len(formants), len(frequency)), np.complex64)
    for center, width in zip(formants.T[..., None], BANDWIDTHS, strict=True):
        square = np.square(center)
        below = np.empty_like(response)
        below.real = (square - np.square(frequency)) / square
        below.imag = frequency * width / square
        response /= below
    return response


def _tones(rng: np.random.Generator, rate: int, samples: int) -> Floats:
    """Generate one to three voices of notes `(samples,)`; higher partials of a note decay faster."""
    time = np.arange(samples, dtype=np.float32) / rate
    sound = np.zeros(samples, np.float32)
    for _ in range(int(rng.integers(1, 4))):
        period = rng.uniform(0.15, 0.8)
        offset = rng.uniform(0, period)
        note = ((time + np.float32(offset)) / np.float32(period)).astype(np.int32)
        age = time + np.float32(offset) - note * np.float32(period)
        pitches = 110 * 2 ** (rng.integers(0, 37, note[-1] + 1) / 12)
        vibrato = 1 + 0.006 * np.sin(2 * np.pi * rng.uniform(4, 7) * time) * (rng.random() < 0.5)
        turn = np.exp(2j * np.pi * (np.cumsum(pitches[note] * vibrato / rate) % 1)).astype(np.complex64)
        attack, decay, tilt = rng.uniform(0.003, 0.06), rng.uniform(0.1, 1.0), rng.uniform(0.6, 2.0)
        # Fade both ends of a note, to avoid clicks.
        edges = np.minimum(1, np.minimum(age / attack, (period - age) / 0.01)).clip(0)
        partial = np.ones_like(turn)
        fall = np.exp(-age / np.float32(decay)).astype(np.float32)
        envelope = edges.astype(np.float32)
        for number in range(1, 1 + int(rng.integers(1, 13))):
            partial *= turn
            envelope = envelope * fall ** np.float32(0.3)
            heard = envelope * (number * pitches < 0.45 * rate)[note]
            sound += partial.imag * heard * np.float32(number**-tilt)
    return sound


def _bursts(rng: np.random.Generator, rate: int, samples: int) -> Floats:
    """Generate bursts of colored noise `(samples,)`, with abrupt onset and exponential decay, over soft noise."""
    size = _frame_size(rate)
    hop = size // 4
    shape = (samples // hop + 1, size + 1)
    time = np.arange(shape[0], dtype=np.float32)[:, None] * hop / rate
    frequency = np.fft.rfftfreq(2 * size, 1 / rate).astype(np.float32)
    color = (1 + frequency / 200) ** -np.float32(rng.uniform(0, 1.5))
    gain = np.float32(rng.uniform(0.0, 0.1)) * color + np.zeros(shape, np.float32)
    for _ in range(1 + rng.poisson(3 * samples / rate)):
        start, decay = rng.uniform(-0.1, samples / rate), rng.uniform(0.02, 0.4)
        center, octaves = 200 * 2 ** rng.uniform(0, np.log2(rate / 500)), rng.uniform(0.3, 2)
        band = np.exp(-np.square(np.log2((frequency + 20) / center) / octaves)).astype(np.float32)
        gain += np.where(time >= start, np.exp(-(time - start).clip(0) / decay), 0).astype(np.float32) * band
    return _inverse(_noise(rng, shape) * gain, hop, samples, torch.hann_window(size))


def _frame_size(rate: int) -> int:
    """Return the samples of a frame: the smallest power of two that lasts at least `FRAME`."""
    return 1 << int(np.ceil(np.log2(FRAME * rate)))


def _noise(rng: np.random.Generator, shape: tuple[int, ...]) -> npt.NDArray[np.complex64]:
    """Draw spectra of white noise: complex Gaussian, with a variance of 2."""
    return rng.standard_normal((*shape, 2), np.float32).view(np.complex64)[..., 0]


def _inverse(spectrum: npt.NDArray[np.complex64], downsample: int, samples: int, window: Tensor) -> Floats:
    """Return the inverse STFT `(samples,)` of a spectrum `(frames, frequencies)`."""
    size = len(window)
    short = torch.from_numpy(np.ascontiguousarray(spectrum.T, np.complex64))
    # `length` drops the end of the last frame: `torch.istft` rejects samples that no window covers.
    sound: Floats = torch.istft(short, 2 * size, downsample, size, window, length=samples).numpy()
    return sound
