"""The subcommand `shards`: pack the files of a folder into shards, or index existing shards."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from varitok import UserError, progress

from ..decoding.headers import probe
from ..decoding.suffixes import ALL
from ..storage.captions import SUFFIX, caption_of
from ..storage.folders import describe_skipped, find_files
from ..storage.listing import split_folders
from ..storage.members import Member
from ..storage.shard_index import index_shard
from ..storage.shard_reader import index_shards, shards_in, subfolders
from ..storage.shard_writer import ShardWriter, member_names
from ..storage.split_names import require_undivided

__all__ = ["main"]

NAMES = ("images", "sounds", "clips", "others", "captions")
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


def main(words: Sequence[str]) -> None:
    """Run `varitok shards`."""
    options = _parser().parse_args(words)
    if not options.folder.is_dir():
        raise UserError(f"{options.folder}: no such folder")
    about = _index(options.folder) if options.out is None else _pack(options)
    if options.json:
        print(json.dumps(about, indent=2))
        return
    for bad in about["bad"]:
        print(f"can't be read: {bad}")
    counts = ", ".join(f"{about[name]:,} {name}" for name in NAMES if about[name])
    packed = f"{counts or 'nothing'} in {about['shards']} shards of {about['bytes'] / 1e6:.1f} MB in all"
    print(f"{about['out']}: {packed}{describe_skipped(about['skipped'])}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok shards",
        description="Pack a folder of images, audio or video files into tar shards, each with an index; data.root="
        "SHARDS is then equivalent to data.root=FOLDER. Without --out: index the shards that are in the folder.",
        epilog="for example: varitok shards PHOTOS --out SHARDS --size 256MB",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of files, optionally in train/ and val/")
    parser.add_argument("--out", type=Path, metavar="SHARDS", help="output folder, new or empty")
    parser.add_argument("--size", default="256MB", help="approximate size of a shard; default: %(default)s")
    parser.add_argument("--drop-bad", action="store_true", help="leave out files whose headers can't be read")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _pack(options: argparse.Namespace) -> dict[str, Any]:
    """Pack the files of a folder into shards, and return a summary."""
    size, folder = _bytes(options.size), options.folder
    parts = split_folders(folder)
    listed = [(part, find_files(folder / part, ALL)) for part in parts or [""]]
    files = [(part, path, path.relative_to(folder / part).as_posix()) for part, found in listed for path in found.files]
    names = [name for part, _ in listed for name in member_names(source for own, _, source in files if own == part)]
    skipped = sum((found.skipped for _, found in listed), Counter[str]())
    if not files:
        raise UserError(f"{folder}: no image, audio or video file in this folder{describe_skipped(skipped)}")
    if not parts:
        require_undivided(folder, (source.rpartition("/")[0] for _, _, source in files))
    packed = []
    with ShardWriter(options.out, size) as shards:
        for (part, path, source), name in progress(zip(files, names, strict=True), len(files), "files"):
            caption = caption_of(path)
            renamed = {"source": source} if source != name else {}
            facts = {**probe(path), **renamed, **({"caption": caption} if caption else {})}
            packed.append((str(path), facts))
            if "bad" in facts and options.drop_bad:
                continue
            shards.write(name, path, facts, part)
            if caption:
                shards.write(str(PurePosixPath(name).with_suffix(SUFFIX)), caption.encode(), part=part)
    del skipped[SUFFIX]  # captions
    return _about(options.out, shards.shards, shards.bytes, packed, skipped)


def _index(folder: Path) -> dict[str, Any]:
    """Index the shards in a folder and in its subfolders, and return a summary."""
    shards = [shard for part in ("", *subfolders(str(folder))) for shard in shards_in(str(folder / part))]
    if not shards:
        raise UserError(f"{folder}: no shards (*.tar) in this folder; give --out SHARDS to pack its files")
    found = []

    def look(member: Member) -> Mapping[str, Any]:
        facts = probe(member) if member.suffix.lower() in ALL else {}
        if member.suffix != SUFFIX:
            found.append((str(member), {**member.facts, **facts}))
        return facts

    for shard, _ in progress(shards, len(shards), "shards"):
        index_shard(shard, look)
    for part in {str(Path(shard).parent) for shard, _ in shards}:
        with suppress(OSError):  # index_shard has warned
            index_shards(part)
    return _about(folder, len(shards), sum(size for _, size in shards), found, {})


def _about(
    out: Path, shards: int, size: int, found: Iterable[tuple[str, Mapping[str, Any]]], skipped: Mapping[str, int]
) -> dict[str, Any]:
    """Summarize the packed or indexed files: counts, durations in seconds, skipped and unreadable files."""
    counts = Counter[str]()
    bad: list[str] = []
    for name, facts in found:
        counts["captions"] += "caption" in facts
        if "bad" in facts:
            bad.append(f"{name}: {facts['bad']}")
        elif "frames" in facts:
            counts["clips"] += 1
            counts["clip_seconds"] += facts["seconds"]
        elif "samples" in facts:
            counts["sounds"] += 1
            counts["sound_seconds"] += facts["samples"] / facts["sample_rate"]
        else:
            counts["images" if "width" in facts else "others"] += 1
    names = (*NAMES, "sound_seconds", "clip_seconds")
    numbers = {name: counts[name] for name in names}
    return {"out": str(out), "shards": shards, "bytes": size, **numbers, "skipped": skipped, "bad": bad}


def _bytes(text: str) -> int:
    """Parse a number of bytes, such as 256MB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    size = round(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        raise UserError(f"--size {text}: give a number of bytes, such as 256MB")
    return size
