"""Images through `varitok tokenize`, killed twice and resumed: each once, with the codes of `varitok encode`.

    python benchmarks/corpus.py PHOTOS --bundle BUNDLE --out benchmarks/results/corpus.csv

The corpus consists of random crops of the photos, as PNG in shards, in a temporary folder. The command is killed
(SIGKILL) when a quarter and when 60% of its shards are in place, and run a third time to its end. Then a part of the
images goes through `varitok encode`, and the codes are compared.
"""

import argparse
import io
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    # A checkout needs no install (ARCHITECTURE.md, "Where the package is").
    sys.path[0] = str(_checkout)

import numpy as np  # noqa: E402
import onnxruntime  # noqa: E402

import varitok  # noqa: E402
from varitok import UserError, __version__, progress  # noqa: E402
from varitok.codecs.evaluation.table import write_rows  # noqa: E402
from varitok.data.datasets.images import image_folder  # noqa: E402
from varitok.data.decoding.images import decode_image  # noqa: E402
from varitok.data.storage.shard_reader import open_shards  # noqa: E402
from varitok.data.storage.shard_writer import ShardWriter  # noqa: E402
from varitok.export.bitstream import container  # noqa: E402

__all__ = ["main"]

KILLED_AT = (0.25, 0.6)  # share of the shards in place
SHARD_BYTES = 64 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit status 2."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("photos", type=Path, metavar="PHOTOS", help="folder of images to crop")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--images", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--side", type=int, default=64, help="side of a crop, in pixels; default: %(default)s")
    parser.add_argument("--checked", type=int, default=1000, help="images to encode again; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, help="processes; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="CSV")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        with tempfile.TemporaryDirectory() as temporary:
            row = _measure(options, Path(temporary))
    except UserError as error:
        print(f"corpus: {error}", file=sys.stderr)
        sys.exit(2)
    header = {
        "protocol": (__doc__ or "").partition("\n")[0],
        "columns": "seconds_N: the N-th run by the clock, the first two killed; missing, twice: images with no codes,"
        " or with several; differing_from_encode: of the checked; read_per_second: records through varitok.codes",
        "machine": f"{os.cpu_count()} cores of a virtual machine ({platform.machine()}), on which other processes ran",
        "command": shlex.join(["python", "benchmarks/corpus.py", *words]),
        "versions": f"varitok {__version__}, onnxruntime {onnxruntime.__version__}, numpy {np.__version__}",
    }
    write_rows(options.out, header, [row])
    print(row)


def _measure(options: argparse.Namespace, temporary: Path) -> dict[str, object]:
    shards, codes = temporary / "images", temporary / "codes"
    _write_corpus(options.photos, shards, options.images, options.side)
    command = ["tokenize", str(shards), "--bundle", str(options.bundle), "--workers", str(options.workers)]
    command += ["--device", "cpu", "--out", str(codes)]
    seconds = []
    total = -(-options.images // 4096)
    for share in (*KILLED_AT, None):
        begin = time.perf_counter()
        run = subprocess.Popen([sys.executable, "-m", "varitok.export.cli.main", *command], env=_environment())
        while run.poll() is None and (share is None or len(list(codes.glob("*.tar"))) < share * total):
            time.sleep(0.05)
        if share is not None:
            run.send_signal(signal.SIGKILL)
        if run.wait() != (0 if share is None else -signal.SIGKILL):
            raise UserError(f"{shlex.join(command)}: ended with status {run.returncode}")
        seconds.append(time.perf_counter() - begin)
    found = varitok.codes(codes)
    begin = time.perf_counter()
    counts = Counter(record.name for record in found)
    read = len(found) / (time.perf_counter() - begin)
    whole = {member.source for member in open_shards(shards)}
    differing = _compare(options, shards, codes, temporary)
    return {
        "images": len(counts),
        "shards": total,
        "workers": options.workers,
        **{f"seconds_{number}": round(spent, 1) for number, spent in enumerate(seconds, 1)},
        "images_per_second": len(counts) / sum(seconds),
        "missing": len(whole - set(counts)),
        "twice": sum(count > 1 for count in counts.values()),
        "checked": options.checked,
        "differing_from_encode": differing,
        "read_per_second": read,
        "code_megabytes": sum(path.stat().st_size for path in codes.glob("*.tar")) / 1e6,
    }


def _environment() -> dict[str, str]:
    paths = [str(_checkout), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _write_corpus(photos: Path, out: Path, count: int, side: int) -> None:
    """Write random crops of photos as PNG files in shards."""
    from PIL import Image  # noqa: PLC0415

    files = [file for split in image_folder(str(photos))[:2] for file in split.files]  # type: ignore[union-attr]
    random = np.random.default_rng(0)

    def crops() -> Iterator[tuple[str, bytes]]:
        each = -(-count // len(files))
        for number in range(count):
            if number % each == 0:
                pixels = decode_image(files[number // each])
            top, left = (int(random.integers(max(1, size - side + 1))) for size in pixels.shape[:2])
            content = io.BytesIO()
            Image.fromarray(pixels[top : top + side, left : left + side]).save(content, "PNG", compress_level=1)
            yield f"{number // 1000:04}/{number:08}.png", content.getvalue()

    with ShardWriter(out, SHARD_BYTES) as shards:
        for name, content in progress(crops(), count, "crops"):
            shards.write(name, content, {"width": side, "height": side})


def _compare(options: argparse.Namespace, shards: Path, codes: Path, temporary: Path) -> int:
    """Encode evenly spaced images with `varitok encode`; return how many have other codes."""
    loose, encoded = temporary / "loose", temporary / "encoded"
    chosen = np.linspace(0, options.images - 1, options.checked).astype(int)
    members = open_shards(shards)
    for at in chosen:
        path = loose / members[int(at)].name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(members[int(at)].read())
    command = [sys.executable, "-m", "varitok.export.cli.main", "encode", str(options.bundle), str(loose)]
    subprocess.run(
        [*command, "--out", str(encoded), "--json"], check=True, env=_environment(), stdout=subprocess.DEVNULL
    )
    bundle, found = varitok.load(options.bundle), varitok.codes(codes)
    differing = 0
    for at in chosen:
        name, tokens, _ = found[int(at)]
        (one,) = container.read_all((encoded / name).with_suffix(".vtk"))
        differing += not np.array_equal(tokens, one.codes(bundle)[0])  # type: ignore[arg-type]
    return differing


if __name__ == "__main__":
    main()
