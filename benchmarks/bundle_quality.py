"""Check that a bundle's PSNR equals that of the run's evaluation.

    python benchmarks/bundle_quality.py BUNDLE DATA_FOLDER --table RUN/evaluation/evaluation.csv [--out FILE.csv]

The evaluation loop runs the bundle's ONNX graphs and its TorchScript, at three numbers of tokens and batch sizes 1 and
5. The table must be an evaluation on the same images.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

_checkout = Path(__file__).resolve().parents[1] / ".pkg"
if __name__ == "__main__" and _checkout.is_dir():
    sys.path[0] = str(_checkout)

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from varitok import UserError, load  # noqa: E402
from varitok.codecs.evaluation.evaluate import evaluate  # noqa: E402
from varitok.codecs.evaluation.table import read_csv, write_rows  # noqa: E402
from varitok.data.datamodule import validation_loader  # noqa: E402
from varitok.data.datasets.images import image_folder  # noqa: E402
from varitok.export.adapters.codec import BundleCodec  # noqa: E402
from varitok.export.exporters.torchscript import load_torchscript  # noqa: E402
from varitok.export.runtime.bundle import Bundle  # noqa: E402

GATE = 0.01  # dB


class Scripted(BundleCodec):
    """A bundle that encodes and decodes by its TorchScript."""

    def __init__(self, bundle: Bundle, script: torch.jit.ScriptModule) -> None:
        super().__init__(bundle)
        self.script = script

    def encode(self, signal: Tensor, lengths: Tensor | None = None) -> Tensor:
        return self.script.encode(signal)

    def decode(self, codes: Tensor, size: Sequence[int] | None = None, lengths: Tensor | None = None) -> Tensor:
        return self.script.decode(codes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--table", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        bundle = load(options.bundle)
        promised = {row["k"]: row["psnr"] for row in read_csv(options.table).rows}
        images = image_folder(options.data, image_size=bundle.image_size).val
    except UserError as error:
        sys.exit(f"error: {error}")
    script, _ = load_torchscript(options.bundle / "codec.ts")
    keeps = [1, bundle.tokens // 4, bundle.tokens]
    rows = []
    for name, codec in (("onnx", BundleCodec(bundle)), ("torchscript", Scripted(bundle, script))):
        for batch in (1, 5):
            table = evaluate(codec, validation_loader(images, batch), keeps, metrics=["psnr"])
            for row in table.rows:
                k, psnr = int(row["k"]), row["psnr"]
                rows.append({"file": name, "batch": batch, "k": k, "psnr": psnr, "off_by_db": abs(psnr - promised[k])})
                print(f"{name:12s} batch {batch}  k {k:3d}  {psnr:.4f} dB  off by {rows[-1]['off_by_db']:.5f}")
    if options.out:
        command = f"python benchmarks/bundle_quality.py BUNDLE DATA --table {options.table.name}"
        write_rows(options.out, {"command": command, "gate": f"{GATE} dB"}, rows)
    if any(row["off_by_db"] > GATE for row in rows):
        sys.exit(f"error: more than {GATE} dB from the evaluation")


if __name__ == "__main__":
    main()
