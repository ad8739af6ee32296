"""PSNR loss of discretizing a trained KL codec without training (TokenBridge, arXiv 2503.16430), in dB.

    python train.py experiment=image/one_d_piece_64 bottleneck=kl data=image_folder data.root=PHOTOS length=full ...
    python benchmarks/token_bridge.py RUN PHOTOS [--bins 4 8 16 32 64] [--out benchmarks/results/token_bridge.csv]

The latents' standard deviations are measured on 512 training photos, PSNR on the validation photos with all tokens.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import torch

from varitok.codecs.build import load_run
from varitok.codecs.codec import Codec
from varitok.codecs.discretize import bridge
from varitok.data.batch import normalize
from varitok.data.datamodule import DataModule, validation_loader
from varitok.data.datasets.images import image_folder


def psnr(codec: Codec, splits: object) -> float:
    """Return the mean PSNR of the validation photos in dB, at 8 bits."""
    errors = []
    with torch.inference_mode():
        for batch in validation_loader(splits.val, 32, 0):
            back = codec.decode(codec.encode(normalize(batch.signal)))
            pixels = ((back.clamp(-1, 1) + 1) * 127.5).round()
            errors.append((pixels - batch.signal.float()).square().mean((1, 2, 3)))
    return float((10 * torch.log10(255**2 / torch.cat(errors))).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run with bottleneck=kl")
    parser.add_argument("photos", help="folder with train/ and val/")
    parser.add_argument("--bins", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    codec, config = load_run(options.run)
    splits = image_folder(options.photos, image_size=config.data.image_size)
    loader = DataModule(splits, batch_size=32, workers=0, updates=16).train_dataloader()
    signals = [normalize(batch.signal) for batch in loader]
    whole = psnr(codec, splits)
    rows = [("continuous", codec.bits(1), whole, 0.0)]
    for bins in options.bins:
        discrete = bridge(codec, signals, bins)
        quality = psnr(discrete, splits)
        rows.append((f"{bins} bins", discrete.bits(1), quality, whole - quality))
    lines = [f"{name},{bits:g},{quality:.3f},{loss:.3f}" for name, bits, quality, loss in rows]
    text = "\n".join(["latents,bits a token,psnr,loss in dB", *lines]) + "\n"
    print(text)
    if options.out:
        options.out.write_text(f"# python benchmarks/token_bridge.py {options.run} PHOTOS\n{text}")


if __name__ == "__main__":
    main()
