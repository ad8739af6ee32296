"""The folder that a trained tokenizer is handed over in."""

import argparse
import copy
import hashlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor

import varitok
from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.codec import Codec
from varitok.codecs.lengths import MaskToken, ladder

from .frozen import FrozenCodec
from .onnx import export_onnx
from .parity import ParityError, check_parity, codes_of, probes
from .runtime import FORMAT_VERSION
from .torchscript import export_torchscript

__all__ = ["FORMATS", "describe", "export_bundle", "main"]

FORMATS = ("onnx", "torchscript")


def describe(codec: Codec) -> dict[str, Any]:
    """Describe a codec as plain data; nothing in it can be executed."""
    decoder: Any = codec.decoder
    bits = codec.bits(1)
    return {
        "format_version": FORMAT_VERSION,
        "modality": "image",
        "channels": decoder.out.out_channels,
        "image_size": decoder.side * codec.patch,
        "patch": codec.patch,
        "tokens": codec.tokens,
        "book_sizes": list(codec.bottleneck.book_sizes),
        "bits_per_token": bits,
        "bottleneck": {"type": type(codec.bottleneck).__name__, "dim": codec.bottleneck.dim},
        "dropped_tokens": "mask_token" if isinstance(codec.length.mechanism, MaskToken) else "truncate",
        "token_layout": "b q k",
        "input_layout": "b c h w",
        "value_range": [-1.0, 1.0],
        "dtype": "float32",
    }


def export_bundle(codec: Codec, folder: str | Path, formats: Sequence[str] = FORMATS) -> dict[str, Any]:
    """Write a bundle, and prove it against the codec before it takes its place.

    Args:
        codec: What is exported; it stays as it is.
        folder: The bundle; one that is there already is replaced once the new one is proved.
        formats: Out of "onnx" and "torchscript"; the weights (safetensors) are always there.

    Returns:
        What `export.json` holds: parity, checksums, sizes and versions.

    Raises:
        UserError: A format is unknown, or the folder can't be written.
        ParityError: A file doesn't do what the codec does; nothing is left behind.
    """
    unknown = set(formats) - set(FORMATS)
    if unknown:
        raise UserError(f"export.formats: {', '.join(sorted(unknown))} is not one of {', '.join(FORMATS)}")
    folder = Path(folder)
    draft = folder.with_name(folder.name + ".draft")
    try:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        report = _write(codec, draft, formats)
        shutil.rmtree(folder, ignore_errors=True)
        draft.rename(folder)
    except OSError as error:
        raise UserError(f"{folder}: can't write the bundle there ({error.strerror or error})") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return report


def _write(codec: Codec, folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """Fill the folder."""
    codec = copy.deepcopy(codec).eval().float().cpu()
    frozen, config = FrozenCodec(codec), describe(codec)
    channels, size = config["channels"], config["image_size"]
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    weights = {name: value.contiguous().clone() for name, value in frozen.state_dict().items()}
    metadata = {
        "codec.format_version": str(FORMAT_VERSION),
        "codec.role": "codec",
        "codec.config": json.dumps(config, sort_keys=True),
        "codec.weights_sha256": _digest(weights),
        "codec.torch": torch.__version__,
        "codec.library_version": varitok.__version__,
    }
    save_file(weights, folder / "model.safetensors", metadata)
    *_, examples = probes(channels, size)
    if "torchscript" in formats:
        export_torchscript(frozen, folder / "codec.ts", metadata)
    if "onnx" in formats:
        export_onnx(frozen, folder / "onnx", examples[:2].clone(), metadata)
    _write_golden(codec, examples, folder / "golden.safetensors")
    (folder / "README.md").write_text(_card(codec, config))
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "parity": check_parity(codec, folder, channels, size),
        "versions": {"varitok": varitok.__version__, "torch": torch.__version__},
    }
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    report["bytes"] = {name: len(content) for name, content in names.items()}
    report["sha256"] = {name: hashlib.sha256(content).hexdigest() for name, content in names.items()}
    (folder / "export.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _digest(weights: dict[str, Tensor]) -> str:
    """Give one checksum for all weights."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode())
        total.update(weights[name].numpy().tobytes())
    return total.hexdigest()


def _write_golden(codec: Codec, signal: Tensor, path: Path) -> None:
    """Write what the codec itself makes of a few images, for other implementations to be tested with."""
    with torch.inference_mode():
        codes = codec.encode(signal)
        golden = {"signal": signal.contiguous(), "codes": codes}
        for k in codes_of(codec.tokens):
            golden[f"reconstruction_{k}"] = codec.decode(codes[..., :k]).clamp(-1, 1).contiguous()
    save_file({name: value.clone() for name, value in golden.items()}, path)


def _card(codec: Codec, config: dict[str, Any]) -> str:
    """Write the bundle's own README."""
    half = max(1, codec.tokens // 2)
    side, books = config["image_size"], " x ".join(map(str, config["book_sizes"]))
    rates = "\n".join(f"| {k} | {codec.bits(k):.1f} | {codec.bits(k) / 8:.1f} |" for k in ladder(codec.tokens))
    return f"""# An image tokenizer, {side} x {side} pixels, 1 to {codec.tokens} tokens

Made with varitok {varitok.__version__}. An image becomes up to {codec.tokens} tokens of {books} codes. The first tokens
say most: keep any prefix of them, and it decodes.

| tokens kept | bits | bytes |
|---|---|---|
{rates}

With varitok (needs numpy and onnxruntime, not torch):

```python
import varitok

tokenizer = varitok.load(".")                    # this folder
codes = tokenizer.encode(pixels, tokens={half})  # uint8 (h, w, 3) -> int64 (1, books, {half})
image = tokenizer.pixels(tokenizer.decode(codes))
```

With onnxruntime alone; `signal` is float32 `(batch, {config["channels"]}, {side}, {side})` in [-1, 1]:

```python
import onnxruntime

encoder = onnxruntime.InferenceSession("onnx/encoder_model.onnx")
decoder = onnxruntime.InferenceSession("onnx/decoder_model.onnx")
(codes,) = encoder.run(None, {{"pixel_values": signal}})              # int64 (batch, books, {codec.tokens})
(image,) = decoder.run(None, {{"image_codes": codes[:, :, :1]}})      # any number of tokens from 1 on
```

With TorchScript (which is code: load it only from those you trust):

```python
import torch

codec = torch.jit.load("codec.ts")
image = codec.decode(codec.encode(signal)[:, :, :{half}])
```

`config.json` describes the codec, `export.json` holds the parity report and checksums, `golden.safetensors` holds
signals, codes and reconstructions to test another implementation with, `model.safetensors` the weights.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command `varitok-export`; a user's mistake ends in one line and exit code 2."""
    parser = argparse.ArgumentParser("varitok-export", description="Export a run's codec to a folder anyone can load.")
    parser.add_argument("run", type=Path, metavar="RUN_OR_CKPT", help="a run's folder or a checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the bundle; the run's bundle/ by default")
    parser.add_argument("--formats", default=",".join(FORMATS), help="default: %(default)s")
    options = parser.parse_args(arguments)
    try:
        codec, _ = load_run(options.run)
        run = options.run if options.run.is_dir() else options.run.absolute().parent.parent
        folder = options.out or run / "bundle"
        report = export_bundle(codec, folder, [name for name in options.formats.split(",") if name])
    except (UserError, ParityError) as error:
        print(f"varitok-export: {error}", file=sys.stderr)
        sys.exit(2)
    console = Console()
    for name, size in report["bytes"].items():
        console.print(f"{size:>12,}  {name}", highlight=False)
    for name, figures in report["parity"].items():
        equal, difference = figures["equal_codes"], figures["signal_difference"]
        console.print(f"{name}: {equal:.2%} of codes equal, signals within {difference:.1e} of the peak")
    console.print(f"written to {folder}")


if __name__ == "__main__":
    main()
