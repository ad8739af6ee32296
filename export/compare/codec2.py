"""Codec 2, a vocoder of speech without learned weights, by the commands of Debian's package codec2."""

import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torchaudio.functional import resample

from varitok import UserError
from varitok.codecs.metrics.audio import round_to_16_bits

from .classic import ClassicalCodec, Coded

__all__ = ["Codec2"]

RATE = 8_000  # Hz
FRAME = 320  # samples, a whole number of frames in all modes
HEADER = 7  # bytes of a .c2 file
MODES = {700: "700C"}  # names of modes that aren't their bit rates
DELAY, DELAYS = 160, {700: 240}  # samples, where STOI of real speech is highest


@dataclass(frozen=True)
class Codec2(ClassicalCodec):
    """Codec 2 (D. Rowe, "Techniques for harmonic sinusoidal coding", 1997). Settings are modes, by their bit/s."""

    def obstacle(self, rate: float, channels: int) -> str:
        """Return why sounds can't be coded: the commands are missing, or they aren't mono of at least 8 kHz."""
        if not all(map(shutil.which, ("c2enc", "c2dec"))):
            return "needs the commands c2enc and c2dec, Debian's package codec2"
        return "" if channels == 1 and rate >= RATE else f"codes one channel of at least {RATE} Hz"

    def code(self, signal: Tensor, setting: int, rate: float = 0) -> Coded:
        """Encode a waveform `(1, t)` in its band up to 4 kHz, and decode it.

        Raises:
            UserError: A command failed.
        """
        mode, delay = MODES.get(setting, str(setting)), DELAYS.get(setting, DELAY)
        narrow = resample(signal, int(rate), RATE)
        padding = -(narrow.shape[1] + delay) % FRAME + delay
        raw = round_to_16_bits(functional.pad(narrow, (0, padding))).mul(32768).numpy().astype("<i2").tobytes()
        bits = _run("c2enc", mode, raw)
        decoded = np.frombuffer(_run("c2dec", mode, bits), "<i2").astype(np.float32) / 32768
        back = torch.from_numpy(decoded)[None, delay : delay + narrow.shape[1]]
        wide = resample(back, RATE, int(rate))[:, : signal.shape[1]]
        wide = functional.pad(wide, (0, signal.shape[1] - wide.shape[1]))
        return Coded(len(bits) + HEADER, len(bits), round_to_16_bits(wide))


def _run(command: str, mode: str, given: bytes) -> bytes:
    """Return what a command writes."""
    done = subprocess.run([command, mode, "-", "-"], input=given, capture_output=True, check=False)
    if done.returncode or not done.stdout:
        told = (done.stderr.decode(errors="replace").splitlines() or ["no output"])[0]
        raise UserError(f"{command} {mode}: failed ({told})")
    return done.stdout
