"""Ordinary files to containers and back: pictures, sounds and clips; the subcommands `encode` and `decode`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from varitok import UserError, progress

from ..bitstream.container import SUFFIX
from ..bitstream.entropy_coding import CODINGS
from ..bitstream.media_files import decode_file, encode_file
from ..bitstream.rate_control import Quality, Target, psnr
from ..runtime.bundle import Bundle
from ..runtime.files import STREAM
from ..runtime.load import BUNDLES, load

__all__ = ["decode", "encode"]


def _run(words: Sequence[str], encodes: bool) -> None:
    """Run `varitok encode` or `varitok decode`; see `--help`."""
    options = _parser(encodes).parse_args(words)
    bundle = load(options.bundle, int8=not encodes and options.int8)
    if not isinstance(bundle, Bundle) or not bundle.written:
        raise UserError(f"{options.bundle}: there are no files of what it codes; use varitok.load")
    kinds = bundle.suffixes if encodes else (SUFFIX,)
    to = SUFFIX[1:] if encodes else _choose_suffix(bundle, options.to)
    target = Target(options.bytes, options.kbps, _quality(bundle, options)) if encodes else Target()
    pairs = _destinations([*_find(options.files, kinds)], options.out, f".{to}")
    console = sys.stderr if any(out == STREAM for _, out in pairs) else sys.stdout
    lines = []
    for path, out in progress(pairs, len(pairs), "files"):
        if encodes:
            kept = {"tokens": options.tokens, "num_codebooks": options.codebooks}
            about = encode_file(bundle, path, out, target=target, coding=options.coding, **kept)
        else:
            about = decode_file(bundle, path, out, to=to, force=options.force)
        lines.append({"file": str(path), "out": str(out), **about})
        if not options.json:
            told = ", ".join(f"{value} {name}" for name, value in about.items() if name != "whole")
            missing = "" if about.get("whole", True) else "; the rest is missing"
            print(f"{path} -> {out}: {told}{missing}", file=console, flush=True)
    if options.json:
        print(json.dumps(lines, indent=2), file=console)


encode, decode = partial(_run, encodes=True), partial(_run, encodes=False)


def _destinations(found: Sequence[tuple[Path, Path]], out: Path | None, suffix: str) -> list[tuple[Path, Path]]:
    """Return each file's destination, by its path below the named folder."""
    if out == STREAM and len(found) > 1:
        raise UserError(f"--out -: there are {len(found)} files, and standard output takes one; give a folder")
    pairs, taken = [], set[Path]()
    for path, inside in found:
        to_stream = out == STREAM or (out is None and path == STREAM)
        goes = STREAM if to_stream else (out / inside if out else path).with_suffix(suffix)
        if goes in taken or (goes == path and path != STREAM):
            raise UserError(f"{path}: would be written to {goes}, which is another file; give --out, or rename it")
        taken.add(goes)
        pairs.append((path, goes))
    return pairs


def _choose_suffix(bundle: Bundle, asked: str | None) -> str:
    """Choose the suffix of the output."""
    known = bundle.written
    if asked is not None and asked not in known:
        raise UserError(f"--to {asked}: of this bundle's signals there can be {', '.join(known)}")
    return asked or known[0]


def _quality(bundle: Bundle, options: argparse.Namespace) -> Quality | None:
    """Return the requested quality; all but PSNR is measured by the evaluation's metrics."""
    if options.psnr is not None:
        return psnr(options.psnr)
    if options.metric is None:
        return None
    name, _, text = options.metric.partition("=")
    try:
        wanted = float(text)
    except ValueError:
        raise UserError(f"--metric {options.metric}: give a name and a value, such as ssim=0.8") from None
    try:
        from ..adapters.codec import quality  # noqa: PLC0415 (with torch)
    except ModuleNotFoundError as error:
        if (error.name or "varitok").startswith("varitok"):
            raise
        raise UserError(f"--metric needs the package {error.name}; pip install 'varitok[train]'") from error
    return quality(bundle, name, wanted)


def _parser(encodes: bool) -> argparse.ArgumentParser:
    name = "encode" if encodes else "decode"
    parser = argparse.ArgumentParser(
        f"varitok {name}",
        description="Turn pictures, sounds or clips into containers (.vtk)."
        if encodes
        else "Turn containers (.vtk) into pictures, sounds or clips.",
        epilog=f"for example: varitok {name} tokenizer {'PHOTOS --tokens 32' if encodes else 'CODES'} --out FOLDER",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="files, or folders of them; - for standard input"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="beside each file by default; - for standard output, of one file"
    )
    parser.add_argument("--json", action="store_true", help="for scripts: a JSON list of the results")
    if encodes:
        parser.add_argument("--tokens", type=int, metavar="K", help="keep K tokens, if the codec orders them")
        parser.add_argument("--codebooks", type=int, metavar="Q", help="keep Q codebooks")
        parser.add_argument(
            "--coding",
            choices=CODINGS,
            help="how codes are written; default: learned, where the bundle has a prior, else as is smaller",
        )
        target = parser.add_mutually_exclusive_group()
        target.add_argument("--bytes", type=int, metavar="N", help="keep what a file of N bytes has room for")
        target.add_argument("--kbps", type=float, metavar="R", help="keep what R kbit/s have room for")
        target.add_argument("--psnr", type=float, metavar="DB", help="keep as much as a PSNR of DB takes")
        target.add_argument(
            "--metric", metavar="NAME=VALUE", help="the same, by any metric of the evaluation, such as ssim=0.8"
        )
    else:
        parser.add_argument(
            "--int8", action="store_true", help="by the decoder of 8-bit weights, where the bundle has one"
        )
        writers = {name: kind.written for name, kind in BUNDLES.items() if kind.written}
        written = "; ".join(f"{', '.join(known)} of {what}" for what, known in writers.items())
        parser.add_argument("--to", metavar="SUFFIX", help=f"output format: {written}; the first by default")
        parser.add_argument("--force", action="store_true", help="decode what another bundle wrote, come what may")
    return parser


def _find(paths: Sequence[Path], kinds: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Find files and their paths below the named folder; named files are taken whatever their suffix."""
    for path in paths:
        if path == STREAM:
            yield path, Path("stdin")
        elif path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in kinds)
            if not inside:
                raise UserError(f"{path}: no file in it is called {', '.join('*' + kind for kind in kinds)}")
            yield from ((one, one.relative_to(path)) for one in inside)
        elif path.is_file():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file")
