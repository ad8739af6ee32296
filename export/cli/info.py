"""What a bundle, a run, a checkpoint or a container is: signals, codes, rates and sizes; the subcommand `info`."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varitok import UserError

from ..bitstream import container
from ..runtime.audio import SoundBundle
from ..runtime.bundle import Bundle, read_json
from ..runtime.images import ImageBundle
from ..runtime.load import ClipBundle, VideoBundle, load

__all__ = ["describe", "main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok info`.

    Raises:
        UserError: There is nothing of varitok's, or it is damaged.
    """
    parser = argparse.ArgumentParser(
        "varitok info",
        description="Tell what a bundle, a run, a checkpoint or a container of codes is.",
        epilog="for example: varitok info tokenizer --json",
    )
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a bundle's or a run's folder, a checkpoint, a .vtk file"
    )
    parser.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    options = parser.parse_args(words)
    found = describe(options.path)
    if options.json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found)) + 2
    for name, value in found.items():
        head, *more = _lines(value)
        print(f"{name.replace('_', ' '):<{width}}{head}")
        for line in more:
            print(f"{'':<{width}}{line}")


def describe(path: Path) -> dict[str, Any]:
    """Describe a bundle or a run by plain values, for JSON or to be printed.

    Raises:
        UserError: There is nothing of varitok's, or it is damaged.
    """
    if path.is_dir() and (path / "export.json").is_file():
        return _of_bundle(path)
    if path.is_file() and path.suffix == container.SUFFIX:
        return _of_container(path)
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        return _of_run(path)
    raise UserError(
        f"{path}: neither a bundle (export.json is in it), a run (checkpoints/), a checkpoint (.ckpt) nor codes (.vtk)"
    )


def _of_bundle(path: Path) -> dict[str, Any]:
    bundle = load(path)
    files = {name: file["bytes"] for name, file in read_json(path / "export.json")["files"].items()}
    about: dict[str, Any] = {"bundle": str(path), "modality": bundle.config["modality"]}
    if isinstance(bundle, Bundle):
        about |= {
            "signals": _signals(bundle),
            "bottleneck": bundle.config["quantizer"],
            "book_sizes": list(bundle.book_sizes) or f"none: {bundle.rows} floats a token",
            "bits_of_a_token": round(bundle.bits(1), 4),
            **_rates(bundle),
            "streams": "onnx" if bundle.config.get("streaming") else "no",
        }
        if bundle.latency_ms is not None:
            about["latency_ms"] = bundle.latency_ms
    elif isinstance(bundle, ClipBundle):
        about |= {"signals": f"one clip of {bundle.frames} frames", "rates": {"file": f"{files['weights.bin']} bytes"}}
    return about | {"file_bytes": files, "versions": read_json(path / "export.json").get("versions", {})}


def _signals(bundle: Bundle) -> str:
    """Tell what it takes."""
    if isinstance(bundle, ImageBundle):
        return f"images of {bundle.image_size} x {bundle.image_size} pixels, {bundle.channels} channels"
    if isinstance(bundle, SoundBundle):
        return f"sounds at {bundle.sample_rate} Hz, {bundle.channels} channels"
    assert isinstance(bundle, VideoBundle)
    size = " x ".join(map(str, reversed(bundle.frame_size))) if bundle.frame_size else "any number of"
    rate = "" if bundle.frame_rate is None else f", trained at {bundle.frame_rate:g} a second"
    return f"clips of any number of frames of {size} {bundle.unit}, {bundle.channels} channels{rate}"


def _rates(bundle: Bundle) -> dict[str, Any]:
    """Tell what codes cost, by what may be kept of them."""
    if isinstance(bundle, SoundBundle):
        rate, whole = bundle.sample_rate / bundle.hop, math.lcm(*bundle.book_strides)
        kept = range(1, len(bundle.book_sizes) + 1) or [None]
        bits = {f"{books or 'all'} books": rate * bundle.bits(whole, books) / whole for books in kept}
        kilobits = {name: f"{each / 1000:.3f} kbit/s" for name, each in bits.items()}
        return {"tokens": f"{rate:g} a second", "rates": kilobits}
    if isinstance(bundle, VideoBundle):
        hop = " x ".join(map(str, bundle.hop))
        if not bundle.tokens:
            rate = bundle.bits(1) / math.prod(bundle.hop)
            return {
                "tokens": f"one for {hop} frames, rows, columns",
                "rates": {"all books": f"{rate:.4g} bits a pixel"},
            }
        return {"tokens": f"1 to {bundle.tokens} for {bundle.hop[0]} frames"} | _lengths(bundle, "a block")
    return {"tokens": f"1 to {bundle.tokens} for an image"} | _lengths(bundle, "an image")


def _lengths(bundle: Bundle, noun: str) -> dict[str, Any]:
    kept = [1 << power for power in range(bundle.tokens.bit_length()) if 1 << power < bundle.tokens]
    return {"rates": {f"{k} tokens": f"{bundle.bits(k) / 8:g} bytes for {noun}" for k in [*kept, bundle.tokens]}}


def _of_run(path: Path) -> dict[str, Any]:
    try:
        from varitok.codecs.build import load_run  # noqa: PLC0415 (a bundle is told of without torch)
        from varitok.codecs.modalities.registry import modality_of  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: a run needs the package {error.name}; pip install 'varitok[train]'") from error
    codec, config = load_run(path)
    size = sum(weight.numel() for weight in codec.parameters())
    return {
        "run": str(path),
        "name": config.name,
        "updates": config.updates,
        "signals": f"{modality_of(codec).noun}s",
        "hop": list(codec.hop),
        "tokens": codec.tokens if codec.ordered else "one for each step of the grid",
        "book_sizes": list(codec.bottleneck.book_sizes),
        "bits_of_a_token": round(codec.bottleneck.bits, 4),
        "weights": size,
        "streams": codec.obstacle or "yes",
    }


def _of_container(path: Path) -> dict[str, Any]:
    found = list(container.read_all(path))
    header = found[0].header
    units = {"image": "images", "audio": "samples"}.get(header.modality, "frames")
    return {
        "container": str(path),
        "modality": header.modality,
        "bundle": header.bundle.hex(),
        "book_sizes": [book.size for book in header.books],
        "signals": len(found),
        "coding": header.coding,
        "codes": [[len(header.books), one.steps, *header.inner] for one in found],
        units: sum(one.units for one in found),
        "whole": all(one.complete for one in found),
        "bytes": {name: sum(one.sizes[name] for one in found) for name in found[0].sizes}
        | {"file": path.stat().st_size},
    }


def _lines(value: Any) -> list[str]:
    """Write a value as lines."""
    if isinstance(value, dict):
        width = max(map(len, value), default=0) + 2
        return [f"{name:<{width}}{part}" for name, part in value.items()] or ["none"]
    if isinstance(value, list):
        return [" x ".join(map(str, value))]
    return [str(value)]
