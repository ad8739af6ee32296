"""Describe a bundle, run, checkpoint or container: signals, codes, rates and sizes; the subcommand `info`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varitok import UserError

from ..bitstream import container
from ..runtime.bundle import Bundle, product_of, read_json
from ..runtime.load import BUNDLES, load

__all__ = ["describe", "main"]


def main(words: Sequence[str]) -> None:
    """Run `varitok info`."""
    parser = argparse.ArgumentParser(
        "varitok info",
        description="Describe a bundle, a run, a checkpoint or a container of codes.",
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
    """Describe a bundle, run, checkpoint or container as JSON-serializable values.

    Raises:
        UserError: The path is none of these, or is damaged.

    Example:
        >>> describe(Path("image_tokenizer"))["signals"]
        'images of 16 x 16 pixels, 3 channels'
    """
    if path.is_dir() and (path / "export.json").is_file():
        return _of_bundle(path)
    if path.is_file() and path.suffix == container.SUFFIX:
        return _of_container(path)
    if path.suffix == ".ckpt" or (path / "checkpoints").is_dir():
        return _of_run(path)
    raise UserError(
        f"{path}: neither a bundle (has export.json), a run (has checkpoints/), a checkpoint (.ckpt) nor codes (.vtk)"
    )


def _of_bundle(path: Path) -> dict[str, Any]:
    bundle = load(path)
    files = {name: file["bytes"] for name, file in read_json(path / "export.json")["files"].items()}
    about = {"bundle": str(path), "modality": bundle.modality} | bundle.describe(files)
    return about | {"file_bytes": files, "versions": read_json(path / "export.json").get("versions", {})}


def _of_run(path: Path) -> dict[str, Any]:
    try:
        from varitok.codecs.build import load_run  # noqa: PLC0415 (bundles don't need torch)
        from varitok.codecs.modalities.registry import modality_of  # noqa: PLC0415
        from varitok.codecs.streaming import ChunkedCodec  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: a run needs the package {error.name}; pip install 'varitok[train]'") from error
    codec, config = load_run(path)
    size = sum(weight.numel() for weight in codec.parameters())
    return {
        "run": str(path),
        "name": config.name,
        "updates": config.updates,
        "signals": modality_of(codec).plural,
        "hop": list(codec.downsample),
        "tokens": codec.layout.tokens or "one for each step of the grid",
        "codebook_sizes": list(codec.bottleneck.codebook_sizes),
        "bits_of_a_token": round(codec.bottleneck.bits, 4),
        "weights": size,
        "streams": ChunkedCodec(codec).obstacle or "yes",
    }


def _of_container(path: Path) -> dict[str, Any]:
    found = list(container.read_all(path))
    header = found[0].header
    kind = BUNDLES[header.modality]
    assert issubclass(kind, Bundle)
    return {
        "container": str(path),
        "modality": header.modality,
        "bundle": header.bundle.hex(),
        "codebook_sizes": [codebook.size for codebook in header.codebooks],
        "signals": len(found),
        "coding": header.coding,
        "codes": [[len(header.codebooks), one.steps, *header.inner] for one in found],
        kind.counted: sum(one.units for one in found),
        "whole": all(one.complete for one in found),
        "bytes": {name: sum(one.sizes[name] for one in found) for name in found[0].sizes}
        | {"file": path.stat().st_size},
    }


def _lines(value: Any) -> list[str]:
    """Format a value as lines."""
    if isinstance(value, dict):
        width = max(map(len, value), default=0) + 2
        return [f"{name:<{width}}{part}" for name, part in value.items()] or ["none"]
    if isinstance(value, list):
        return [product_of(value)]
    return [str(value)]
