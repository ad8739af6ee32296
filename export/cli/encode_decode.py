"""Encode image, audio and video files into containers, and decode them; the subcommands `encode` and `decode`."""

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
        raise UserError(f"{options.bundle}: no media file stores its signals; use varitok.load in Python")
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
    """Pair each file with its destination, which keeps its path below the given folder."""
    if out == STREAM and len(found) > 1:
        raise UserError(f"--out -: standard output takes one file, not {len(found)}; give a folder")
    pairs, taken = [], set[Path]()
    for path, inside in found:
        to_stream = out == STREAM or (out is None and path == STREAM)
        goes = STREAM if to_stream else (out / inside if out else path).with_suffix(suffix)
        if goes in taken or (goes == path and path != STREAM):
            raise UserError(f"{path}: its output {goes} would replace another file; give --out, or rename it")
        taken.add(goes)
        pairs.append((path, goes))
    return pairs


def _choose_suffix(bundle: Bundle, asked: str | None) -> str:
    """Return the suffix of decoded files: `asked`, or the bundle's default."""
    known = bundle.written
    if asked is not None and asked not in known:
        raise UserError(f"--to {asked}: this bundle writes {', '.join(known)}")
    return asked or known[0]


def _quality(bundle: Bundle, options: argparse.Namespace) -> Quality | None:
    """Return the requested quality; metrics other than PSNR are those of the evaluation."""
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
        description="Encode image, audio or video files into containers (.vtk)."
        if encodes
        else "Decode containers (.vtk) into image, audio or video files.",
        epilog=f"for example: varitok {name} tokenizer {'PHOTOS --tokens 32' if encodes else 'CODES'} --out FOLDER",
    )
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument(
        "files", type=Path, nargs="+", metavar="FILE", help="files, or folders of them; - for standard input"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: beside each file; - for standard output, of one file"
    )
    parser.add_argument("--json", action="store_true", help="for scripts: a JSON list of the results")
    if encodes:
        parser.add_argument("--tokens", type=int, metavar="K", help="keep the first K tokens, if they are ordered")
        parser.add_argument("--codebooks", type=int, metavar="Q", help="keep the first Q codebooks")
        parser.add_argument(
            "--coding",
            choices=CODINGS,
            help="entropy coding; default: learned if the bundle has a prior, else the smaller of packed and adaptive",
        )
        target = parser.add_mutually_exclusive_group()
        target.add_argument("--bytes", type=int, metavar="N", help="keep as much as fits in a file of N bytes")
        target.add_argument("--kbps", type=float, metavar="R", help="keep as much as fits in R kbit/s")
        target.add_argument("--psnr", type=float, metavar="DB", help="keep as little as reaches a PSNR of DB")
        target.add_argument(
            "--metric", metavar="NAME=VALUE", help="the same for any metric of the evaluation, such as ssim=0.8"
        )
    else:
        parser.add_argument(
            "--int8", action="store_true", help="use the decoder with 8-bit weights, if the bundle has one"
        )
        writers = {name: kind.written for name, kind in BUNDLES.items() if kind.written}
        written = "; ".join(f"{', '.join(known)} for {what}" for what, known in writers.items())
        parser.add_argument("--to", metavar="SUFFIX", help=f"output format: {written}; the first by default")
        parser.add_argument("--force", action="store_true", help="decode another bundle's containers too")
    return parser


def _find(paths: Sequence[Path], kinds: Sequence[str]) -> Iterator[tuple[Path, Path]]:
    """Find files with a suffix of `kinds` and their paths below the given folders; given files may have any suffix."""
    for path in paths:
        if path == STREAM:
            yield path, Path("stdin")
        elif path.is_dir():
            inside = sorted(one for one in path.rglob("*") if one.suffix.lower() in kinds)
            if not inside:
                raise UserError(f"{path}: holds no file named {', '.join('*' + kind for kind in kinds)}")
            yield from ((one, one.relative_to(path)) for one in inside)
        elif path.is_file():
            yield path, Path(path.name)
        else:
            raise UserError(f"{path}: no such file")
