"""PSNR gain of allocating a token budget to blocks of clips by need instead of equally (AdapTok), in dB.

    python train.py experiment=video/adaptok_small data.root=CLIPS
    python benchmarks/allocation.py RUN [--tokens 2 4 8 16 32] [--out benchmarks/results/video/allocation.csv]

On the run's validation clips, in whole batches: "signal" allocates over the blocks of each clip, "batch" over the
blocks of all clips of a batch. PSNR is computed from the mean squared error over all clips, which allocation minimizes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / ".pkg"))

import torch

from varitok.codecs.allocation import allocate
from varitok.codecs.build import build, load_run
from varitok.data.batch import normalize
from varitok.data.datamodule import validation_loader

BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a finished run of a codec with ordered tokens for each block")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2, 4, 8, 16, 32], help="mean tokens per block")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    codec, config = load_run(options.run)
    batches = [normalize(batch.signal) for batch in validation_loader(build(config.data).val, BATCH, 0)]
    lines = ["tokens,equal dB,signal dB,batch dB,least,most"]
    for tokens in options.tokens:
        errors, lengths = torch.zeros(3, dtype=torch.float64), torch.zeros(0)
        with torch.inference_mode():
            for clips in batches:
                codes = codec.encode(clips)
                equal = torch.full((len(clips),), tokens)
                shared = [allocate(codec, clips, tokens, over) for over in ("signal", "batch")]
                for way, lengths in enumerate([equal, *shared]):
                    back = codec.decode(codes, clips.shape[2:], lengths).clamp(-1, 1)
                    errors[way] += float((back - clips).square().sum())
        mean = errors / sum(clips.numel() for clips in batches)
        values = [f"{value:.3f}" for value in (10 * torch.log10(4 / mean)).tolist()]
        lines.append(",".join([str(tokens), *values, str(int(lengths.min())), str(int(lengths.max()))]))
    text = "\n".join(lines) + "\n"
    print(text)
    if options.out:
        options.out.write_text(f"# python benchmarks/allocation.py {options.run} (of {config.name})\n{text}")


if __name__ == "__main__":
    main()
