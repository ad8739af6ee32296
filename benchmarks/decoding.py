"""Speed of a bundle's encoder, decoder and entropy coder in the runtime, on one thread, at each kept length.

    python benchmarks/decoding.py BUNDLE FILES --out benchmarks/results/decoding/NAME.csv

The table has images per second, or for audio and video seconds of signal per second (the inverse of the real-time
factor). Times are the best of a few repeats, and figures are medians over files. ONNX Runtime has one thread, so they
are for one core of this machine.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

from varitok import UserError, __version__  # noqa: E402
from varitok.codecs.evaluation.ladder import Ladder  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.data.batch import normalize  # noqa: E402
from varitok.data.decoding.errors import BadSample  # noqa: E402
from varitok.export.adapters.codec import as_codec  # noqa: E402
from varitok.export.adapters.dataset import dataset_of, files_of, noun_of  # noqa: E402
from varitok.export.bitstream.entropy_coding import codebooks_of, coding_of, prior_identity  # noqa: E402
from varitok.export.runtime.bundle import DECODER, ENCODER, Bundle  # noqa: E402
from varitok.export.runtime.load import load  # noqa: E402

__all__ = ["main"]

REPEATS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument("files", type=Path, nargs="+", metavar="PATH", help="files, or folders of them")
    parser.add_argument("--limit", type=int, default=16, help="maximum number of files; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of audio and video; default: %(default)s")
    parser.add_argument("--side", type=int, default=64, help="side of video frames, in pixels; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        _measure(options, shlex.join(["python", "benchmarks/decoding.py", *words]))
    except UserError as error:
        print(f"decoding: {error}", file=sys.stderr)
        sys.exit(2)


def _measure(options: argparse.Namespace, command: str) -> None:
    bundle: Any = load(options.bundle)
    if not isinstance(bundle, Bundle):
        raise UserError(f"{options.bundle}: not a bundle of an image, audio or video codec")
    _one_thread(bundle)
    codec = as_codec(bundle)
    files = files_of(bundle, options.files, "PATH")
    data, protocol = dataset_of(
        bundle, files[:: max(1, len(files) // options.limit)][: options.limit], options.seconds, options.side
    )
    signals: list[np.ndarray] = []
    for index in range(len(data)):  # type: ignore[arg-type]
        try:
            signals.append(normalize(data[0, index][None]).numpy())
        except BadSample as error:
            print(f"left out: {error}", file=sys.stderr)
    rate = bundle.sample_rate or bundle.frame_rate
    amounts = [signal.shape[2] / rate if rate else 1 for signal in signals]
    names = ["packed", "adaptive", *(["static", "learned"] if prior_identity(bundle.folder) else [])]
    rows: list[dict[str, object]] = []
    for kept in Ladder(codec).keeps:
        found: dict[str, list[float]] = {}
        for signal, amount in zip(signals, amounts, strict=True):
            codes = bundle.encode_values(signal)
            part = codes[..., :kept] if bundle.tokens else codes[:, :kept]
            found.setdefault("encode", []).append(amount / _best(lambda x=signal: bundle.run_encoder(x)))
            found.setdefault("decode", []).append(amount / _best(lambda x=part: bundle.run_decoder(x)))
            for name in names:
                coding = coding_of(name, codebooks_of(bundle)[: part.shape[1]], bundle)
                written = coding.encode(part[0])
                shape = part.shape[2], part.shape[3:], True
                found.setdefault(f"{name}_write", []).append(amount / _best(lambda c=coding, x=part[0]: c.encode(x)))
                found.setdefault(f"{name}_read", []).append(
                    amount / _best(lambda c=coding, x=written, s=shape: c.decode(x, *s))
                )
        rows.append({codec_axis(codec): kept, **{name: statistics.median(values) for name, values in found.items()}})
        print(", ".join(f"{name} {value:.4g}" for name, value in rows[-1].items()))
    unit = "pictures a second" if rate is None else "seconds of signal a second (the real-time factor)"
    header = {
        "bundle": str(options.bundle),
        "dataset": f"{' '.join(map(str, options.files))}, {len(signals)} {noun_of(bundle)}s",
        "protocol": protocol,
        "columns": f"{unit}; encode, decode: the graphs; _write, _read: codes to bytes and back",
        "machine": "one thread of ONNX Runtime on one of two shared cores of a virtual machine",
        "command": command,
        "versions": f"varitok {__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
    }
    write_rows(options.out, header, rows)


def codec_axis(codec: Any) -> str:
    """Return the name of the axis of variable length."""
    return str(codec.layout.unit)


def _one_thread(bundle: Any) -> None:
    """Replace the bundle's sessions by ones with a single thread."""
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    for name, path in (("_encoder", ENCODER), ("_decoder", DECODER)):
        bundle.__dict__[name] = onnxruntime.InferenceSession(
            str(bundle.folder / path), settings, providers=["CPUExecutionProvider"]
        )


def _best(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of `REPEATS` calls, after an untimed one."""
    call()
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return min(times)


if __name__ == "__main__":
    main()
