"""Encode image, audio and video files into containers, and decode them; the subcommands `encode` and `decode`."""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from varitok import UserError, progress
from varitok.data.storage.folders import describe_skipped, find_files, printable

from ..bitstream.container import SUFFIX
from ..bitstream.entropy_coding import CODINGS, codebooks_of, coding_of
from ..bitstream.media_files import decode_files, encode_file
from ..bitstream.rate_control import Quality, Target, codings_of, psnr
from ..runtime.bundle import Bundle
from ..runtime.files import STREAM
from ..runtime.load import BUNDLES, load
from ..runtime.memory import MEMORY, require_memory

__all__ = ["decode", "destinations", "encode"]

_Pairs: TypeAlias = Sequence[tuple[Path, Path]]
_Convert: TypeAlias = Callable[[_Pairs], Iterator[dict[str, Any] | UserError]]
"""Function [(file, output), ...] -> the summary or the error of each."""


def _run(words: Sequence[str], encodes: bool) -> None:
    """Run `varitok encode` or `varitok decode`; see `--help`.

    Of several files, those that fail are reported and counted, and the exit status is 1.

    Raises:
        UserError: The only file fails, an option is wrong, or there is no such file.
    """
    options = _parser(encodes).parse_args(words)
    require_memory(options.memory)
    bundle = load(options.bundle, int8=not encodes and options.int8)
    if not isinstance(bundle, Bundle) or not bundle.written:
        raise UserError(f"{options.bundle}: no media file stores its signals; use varitok.load in Python")
    kinds = bundle.suffixes if encodes else (SUFFIX,)
    convert, to = _encoder(bundle, options) if encodes else _decoder(bundle, options)
    pairs = destinations(_find(options.files, kinds), options.out, f".{to}")
    console = sys.stderr if any(out == STREAM for _, out in pairs) else sys.stdout
    lines, failed, changes = [], 0, set[str]()
    for (path, out), about in zip(pairs, progress(convert(pairs), len(pairs), "files"), strict=True):
        if isinstance(about, UserError):
            if len(pairs) == 1:
                raise about
            failed += 1
            reason = str(about) if str(path) in str(about) else f"{path}: {about}"
            print(f"varitok {'encode' if encodes else 'decode'}: {printable(reason)}", file=sys.stderr, flush=True)
            lines.append({"file": str(path), "error": reason})
            continue
        lines.append({"file": str(path), "out": str(out), **about})
        if (changed := about.pop("changes", "")) and changed not in changes:
            changes.add(changed)  # told once, not for each file
            print(f"{printable(path)}: {changed}", file=sys.stderr, flush=True)
        if not options.json:
            told = ", ".join(f"{value} {name}" for name, value in about.items() if name != "whole")
            missing = "" if about.get("whole", True) else "; the rest is missing"
            print(f"{printable(path)} -> {printable(out)}: {told}{missing}", file=console, flush=True)
    if options.json:
        print(json.dumps(lines, indent=2), file=console)
    if failed:
        print(f"{failed} of {len(pairs)} files failed", file=sys.stderr)
        sys.exit(1)


encode, decode = partial(_run, encodes=True), partial(_run, encodes=False)


def _encoder(bundle: Bundle, options: argparse.Namespace) -> tuple[_Convert, str]:
    """Return the function that encodes a file, and the suffix of its output.

    Raises:
        UserError: An option is wrong whatever the file.
    """
    kept = {"tokens": options.tokens, "num_codebooks": options.codebooks}
    bundle.check_kept(**kept)
    for name in codings_of(bundle, options.coding):
        coding_of(name, codebooks_of(bundle), bundle)
    target = Target(options.bytes, options.kbps, _quality(bundle, options))

    def convert(pairs: _Pairs) -> Iterator[dict[str, Any] | UserError]:
        for path, out in pairs:
            try:
                yield encode_file(
                    bundle, path, out, target=target, coding=options.coding, memory=options.memory, **kept
                )
            except UserError as error:
                yield error

    return convert, SUFFIX[1:]


def _decoder(bundle: Bundle, options: argparse.Namespace) -> tuple[_Convert, str]:
    """Return the function that decodes a container, and the suffix of its output."""
    to = _choose_suffix(bundle, options.to)
    if options.seed is not None:
        if bundle.seed is None:
            raise UserError(f"--seed {options.seed}: {options.bundle} decodes without noise; leave it out")
        if not 0 <= options.seed < 1 << 32:
            raise UserError(f"--seed {options.seed}: must be from 0 to {(1 << 32) - 1}")
        bundle.seed = options.seed
    return partial(decode_files, bundle, to=to, force=options.force, memory=options.memory), to


def destinations(found: Mapping[Path, Path], out: Path | None, suffix: str) -> list[tuple[Path, Path]]:
    """Pair each file with its output: `x.jpg` with `x.vtk`, beside it or in the folder `out`.

    Files that would share an output, such as `x.jpg` and `x.png`, have `x.jpg.vtk` and `x.png.vtk`. So has a file
    whose output would replace a given file, and a container beside a file that would be decoded over: `x.vtk.png`.
    Outputs that are equal even so are numbered, `x.jpg_2.vtk`.

    Args:
        found: Paths of the files, and their paths below the given folders, which `out` keeps.
        out: The folder; None: beside each file. `STREAM`: standard output, as for standard input by default.
        suffix: Suffix of the outputs, with its dot.

    Raises:
        UserError: Several files are to be written to standard output.

    Example:
        >>> found = {Path("in/x.jpg"): Path("x.jpg"), Path("in/a/x.png"): Path("a/x.png")}
        >>> [str(path) for _, path in destinations(found, Path("out"), ".vtk")]
        ['out/x.vtk', 'out/a/x.vtk']
    """
    if out == STREAM and len(found) > 1:
        raise UserError(f"--out -: standard output takes one file, not {len(found)}; give a folder")
    streams = {path: STREAM for path in found if out == STREAM or (out is None and path == STREAM)}
    places = {path: out / inside if out else path for path, inside in found.items() if path not in streams}
    whole = {path: place.with_name(place.name + suffix) for path, place in places.items()}
    chosen, before = {path: place.with_suffix(suffix) for path, place in places.items()}, dict[Path, Path]()
    if out is None and suffix != SUFFIX:
        chosen = {path: whole[path] if goes.exists() else goes for path, goes in chosen.items()}
    given = [_identity(path) for path in places]
    while chosen != before:
        before, uses = chosen, Counter([*given, *map(_identity, chosen.values())])
        chosen = {path: whole[path] if uses[_identity(goes)] > 1 else goes for path, goes in chosen.items()}
    taken = set(given)
    for path, place in places.items():
        number = 1
        while _identity(chosen[path]) in taken:
            number += 1
            chosen[path] = place.with_name(f"{place.name}_{number}{suffix}")
        taken.add(_identity(chosen[path]))
    chosen |= streams
    return [(path, chosen[path]) for path in found]


def _identity(path: Path) -> str:
    """Return a key that is equal for paths of one file; some file systems ignore case."""
    return os.path.abspath(path).casefold()


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
        description="Encode image, audio or video files into containers (.vtk); x.jpg beside x.png into x.jpg.vtk."
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
    parser.add_argument(
        "--memory",
        type=float,
        default=MEMORY,
        metavar="GB",
        help=f"most memory to use; default: {MEMORY:g}. A signal that needs more is coded in parts: with the same"
        " result if the codec streams, else with slightly other codes near the parts' borders",
    )
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
        parser.add_argument(
            "--seed", type=int, metavar="N", help="seed of a decoder that samples; default: the bundle's"
        )
        writers = {name: kind.written for name, kind in BUNDLES.items() if kind.written}
        written = "; ".join(f"{', '.join(known)} for {what}" for what, known in writers.items())
        parser.add_argument("--to", metavar="SUFFIX", help=f"output format: {written}; the first by default")
        parser.add_argument("--force", action="store_true", help="decode another bundle's containers too")
    return parser


def _find(paths: Sequence[Path], kinds: Sequence[str]) -> dict[Path, Path]:
    """Find files with a suffix of `kinds` and their paths below the given folders; given files may have any suffix."""
    found: dict[Path, Path] = {}
    for path in paths:
        if path == STREAM:
            found[path] = Path("stdin")
        elif path.is_dir():
            files, skipped = find_files(path, kinds)[:2]
            if not files:
                named = ", ".join(f"*{kind}" for kind in kinds)
                raise UserError(f"{path}: holds no file named {named}{describe_skipped(skipped)}")
            found |= {one: one.relative_to(path) for one in files}
        elif path.is_file():
            found[path] = Path(path.name)
        else:
            raise UserError(f"{path}: {'neither a file nor a folder' if path.exists() else 'no such file'}")
    return found
