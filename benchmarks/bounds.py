"""Gaussian rate-distortion bounds of photos, of spectrograms of speech and of clips: data in, a table out.

    python benchmarks/bounds.py --photos PHOTOS/train PHOTOS/val --speech SPEECH/train SPEECH/val \
        --clips CLIPS/train CLIPS/val --out benchmarks/results/bounds.csv

The model of a signal is a DCT over its whole grid, of decorrelated colors, with independent Gaussian coefficients.
Reverse water-filling (Cover and Thomas, "Elements of Information Theory", section 10.3.3) allots R bits by the
variances v of training signals. The error D is that of validation signals, with mean squares u around the same mean:

    R = sum_i r_i,   r_i = max(0, log2(v_i / level) / 2),   D = sum_i u_i 2^(-2 r_i)

No code of Gaussian signals with these variances has a smaller error (if u = v). Real signals aren't Gaussian, and can
be coded better: this is what a learned codec should exceed, and not its limit.
"""

import argparse
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import hydra  # noqa: E402
import numpy as np  # noqa: E402
import numpy.typing as npt  # noqa: E402
import scipy  # noqa: E402
import torch  # noqa: E402
from scipy.fft import dctn  # noqa: E402

from varitok import UserError, __version__  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.codecs.modalities.registry import MODALITIES  # noqa: E402
from varitok.codecs.networks.layers.stft import Spectrum, mel_bank  # noqa: E402
from varitok.data.batch import SignalDataset, normalize  # noqa: E402
from varitok.data.decoding.errors import BadSample  # noqa: E402

__all__ = ["KINDS", "Kind", "allot", "bound", "main"]

Values: TypeAlias = npt.NDArray[np.float64]

FRAMES, BANDS, WINDOW, HOP, FLOOR = 50, 80, 1024, 320, 1e-5  # of a second of speech at 16 kHz


class Kind(NamedTuple):
    """A kind of signal.

    Attributes:
        experiment: Preset with the data's settings.
        draws: Random crops of each training signal.
        blocks: Function of a signal `(c, *grid)` in [-1, 1] and the sample rate to blocks `(n, c, *grid)` to code.
        column: Column of the error.
        value: Function of the mean squared error of a value to what the column has.
        bits: Bits of a block.
    """

    experiment: str
    draws: int
    blocks: Callable[[torch.Tensor, int], torch.Tensor]
    column: str
    value: Callable[[float], float]
    bits: tuple[int, ...]


def spectrogram_blocks(sound: torch.Tensor, rate: int) -> torch.Tensor:
    """Return the log mel magnitudes of a waveform `(1, t)`, in dB, by the second: `(n, 1, 50, 80)`."""
    spectrum, _ = Spectrum(WINDOW, HOP)(sound[None])
    mel = spectrum.abs() @ mel_bank(rate, BANDS, WINDOW, 0.0, None)  # (1, 1, n, f) -> (1, 1, n, 80)
    decibels = 20 * mel.clamp(min=FLOOR).log10()[0, 0]
    count = len(decibels) // FRAMES
    return decibels[: count * FRAMES].reshape(count, 1, FRAMES, BANDS)


def _whole(signal: torch.Tensor, _: int) -> torch.Tensor:
    return signal[None]


def _psnr(error: float) -> float:
    return 10 * math.log10(4 / error)  # signals in [-1, 1]


KINDS = {
    "photos": Kind("image/vit_vqgan_64", 1, _whole, "psnr", _psnr, (96, 192, 384, 768)),
    "speech": Kind("audio/dac_small", 1, spectrogram_blocks, "spectral_error", math.sqrt, (400, 800, 1600, 3200)),
    "clips": Kind("video/vidtok_small", 8, _whole, "psnr", _psnr, (800, 1600, 2400, 2880, 3456)),
}


def allot(variances: Values, bits: float) -> Values:
    """Return the rate of each coefficient in bits, by reverse water-filling over all.

    Args:
        variances: Variances, of any shape.
        bits: Sum of the rates, above 0.

    Raises:
        UserError: No variance is above 0.
    """
    ordered = np.sort(variances[variances > 0])[::-1]
    if not len(ordered):
        raise UserError("the training signals are all the same: there is nothing to code")
    logs = np.log2(ordered)
    # The log2 of the level if the largest 1, 2, ... variances have all the bits; some of them are below it if too many.
    levels = (np.cumsum(logs) - 2 * bits) / np.arange(1, len(logs) + 1)
    level = levels[np.flatnonzero(logs > levels)[-1]]
    with np.errstate(divide="ignore"):
        rates: Values = np.maximum(0, (np.log2(variances) - level) / 2)
    return rates


def bound(training: Values, validation: Values, bits: Sequence[float]) -> list[float]:
    """Compute the mean squared error of a validation value at each number of bits a block.

    Args:
        training: Blocks `(n, c, *grid)`, by which bits are allotted.
        validation: Blocks of the same grid, whose error is returned.
        bits: Bits of a block.
    """
    mean = training.mean(0)
    # Axes of the colors, in which they are uncorrelated: (c, c).
    colors = np.moveaxis(training - mean, 1, 0).reshape(training.shape[1], -1)
    _, axes = np.linalg.eigh(colors @ colors.T)
    own, others = (_mean_squares(blocks - mean, axes) for blocks in (training, validation))
    return [float(np.mean(others * 2 ** (-2 * allot(own, each)))) for each in bits]


def _mean_squares(blocks: Values, axes: Values) -> Values:
    """Return the mean square of each coefficient `(c, *grid)`."""
    rotated = np.moveaxis(np.tensordot(blocks, axes, (1, 0)), -1, 1)
    coefficients = dctn(rotated, axes=range(2, blocks.ndim), norm="ortho")
    squares: Values = np.square(coefficients, out=coefficients).mean(0)
    return squares


def _blocks(kind: Kind, dataset: SignalDataset, draws: int, rate: int) -> Values:
    """Return the blocks of all signals that can be read, float64 `(n, c, *grid)`."""

    def found() -> Iterator[torch.Tensor]:
        for draw in range(draws):
            for index in range(len(dataset)):
                try:
                    yield kind.blocks(normalize(dataset[draw, index]), rate)
                except BadSample:
                    continue

    every = [*found()]
    shapes = {block.shape[1:] for block in every if len(block)}
    whole = max(shapes, key=math.prod, default=None)
    if whole is None:
        raise UserError("no file is long enough for a block")
    # Clips that are shorter than a block are left out.
    return torch.cat([block for block in every if block.shape[1:] == whole]).double().numpy()


def _measure(name: str, folders: Sequence[Path]) -> list[dict[str, object]]:
    """Return the rows of a kind of signal."""
    kind = KINDS[name]
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        data = hydra.compose("train", [f"experiment={kind.experiment}", f"data.root={folders[0]}"]).data
    rate = int(data.get("sample_rate", 0))
    modality = MODALITIES[kind.experiment.partition("/")[0]](rate)
    training = _blocks(kind, modality.folder_splits(data, folders[0]).train, kind.draws, rate)
    validation = _blocks(kind, modality.folder_splits(data, folders[1]).val, 1, rate)
    rows: list[dict[str, object]] = []
    for bits, error in zip(kind.bits, bound(training, validation, kind.bits), strict=True):
        values = {column: kind.value(error) if column == kind.column else "" for column in ("psnr", "spectral_error")}
        counts = {"training": len(training), "validation": len(validation)}
        grid = " x ".join(map(str, training.shape[1:]))
        rows.append({"signals": name, "block": grid, **counts, "bits": bits, "bytes": bits / 8, **values})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, kind in KINDS.items():
        note = f"folders, of training and validation; settings of {kind.experiment}"
        parser.add_argument(f"--{name}", type=Path, nargs=2, metavar=("TRAIN", "VAL"), help=note)
    parser.add_argument("--out", type=Path, metavar="CSV")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    given = {name: folders for name in KINDS if (folders := getattr(options, name))}
    try:
        if not given:
            raise UserError(f"nothing to measure: give --{', --'.join(KINDS)}, or some of them")
        rows = [row for name, folders in given.items() for row in _measure(name, folders)]
    except UserError as error:
        print(f"bounds: {error}", file=sys.stderr)
        sys.exit(2)
    header = {
        "protocol": "Gaussian bounds by reverse water-filling: bits are allotted by the variances of training blocks,"
        " the error is that of validation blocks",
        "column block": "colors x grid; of speech a second, 50 frames of 80 log mel bands",
        "column training": "training blocks; column validation: blocks whose error is measured",
        "column psnr": "dB, of the mean squared error of all blocks; the mean of the blocks' PSNRs would be higher",
        "column spectral_error": "dB, root mean square of the difference of log mel magnitudes (Slaney, window"
        f" {WINDOW}, hop {HOP}, not below {FLOOR:g})",
        "command": shlex.join(["python", "benchmarks/bounds.py", *words]),
        "versions": f"varitok {__version__}, torch {torch.__version__}, scipy {scipy.__version__}",
    }
    for row in rows:
        print("  ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    if options.out:
        write_rows(options.out, header, rows)


if __name__ == "__main__":
    main()
