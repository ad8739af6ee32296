"""The subcommand `tokenize`: write the codes of a corpus as shards, for `varitok.codes`.

Shard k has the files k S to (k + 1) S - 1 of the sorted corpus, whatever the part or machine. A shard is put in place
whole. So a killed run continues with the shards that are missing, any number of machines share a folder, and the
result is always the same.
"""

import argparse
import hashlib
import io
import math
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from varitok import UserError, progress
from varitok.codecs.conversion import RANGES, convert
from varitok.data.storage.captions import caption_of
from varitok.data.storage.folders import printable
from varitok.data.storage.listing import list_splits, name_in, names_in, split_folders
from varitok.data.storage.members import File, is_url
from varitok.data.storage.shard_index import SUFFIX
from varitok.data.storage.shard_writer import ShardFile, member_names

from ..adapters.corpus import FileCodes, encode_files
from ..adapters.dataset import noun_of
from ..bitstream.container import identity
from ..runtime.bundle import Bundle
from ..runtime.codes import ABOUT, FILE, read_head
from ..runtime.load import load
from ..runtime.memory import MEMORY, require_memory

__all__ = ["main"]

OURS = re.compile(r"\d{6,}\.(tar|index\.jsonl)")
CPU_BATCH, GPU_BATCH = 8, 64  # files that a worker reads at once
DIFFERENT = {  # entries of the description in an index, by what another value means
    "modality": "another bundle",
    "bundle": "another bundle",
    "codebook_sizes": "another number of codebooks (--codebooks)",
    "tokens": "another number of tokens (--tokens)",
    "files": "other files",
    "names": "other files",
    "shard_files": "another size of shards (--shard-files)",
    "memory": "another memory (--memory)",
}


class _Corpus(NamedTuple):
    """The files of one folder, and where their codes go.

    Attributes:
        root: Folder of the files, or of their shards.
        files: The files, sorted.
        out: Folder of the codes.
        about: Description of the codes, for each index.
    """

    root: str | Path
    files: Sequence[File]
    out: Path
    about: Mapping[str, Any]

    def shard(self, number: int) -> Path:
        return self.out / f"{number:06}{SUFFIX}"

    def indices(self, number: int) -> range:
        """Return the indices of a shard's files."""
        size = self.about["shard_files"]
        return range(number * size, min((number + 1) * size, len(self.files)))


class _Done(NamedTuple):
    """A finished shard: its number of files, bytes, and "path: reason" of each unreadable file."""

    files: int
    bytes: int
    bad: list[str]


def main(words: Sequence[str]) -> None:
    """Run `varitok tokenize`; the exit status is 1 if a file can't be read.

    Raises:
        UserError: An option is wrong, the folder has other codes, or it can't be written.
    """
    options = _parser().parse_args(words)
    part, parts = _parse_part(options.part)
    convert(options.shard_files, int, "--shard-files", RANGES)
    convert(options.workers, Annotated[int, "[0, 1000]", "0 reads in the main process"], "--workers")
    if options.batch is None:
        options.batch = CPU_BATCH if options.device == "cpu" else GPU_BATCH
    convert(options.batch, int, "--batch", RANGES)
    require_memory(options.memory)
    bundle = load(options.bundle)
    if not isinstance(bundle, Bundle) or not bundle.suffixes:
        raise UserError(f"{options.bundle}: no media file stores its signals; use varitok.load in Python")
    bundle.check_kept(options.tokens, options.codebooks)
    done: list[_Done] = []
    for corpus in _corpora(bundle, options):
        mine = range(part - 1, math.ceil(len(corpus.files) / options.shard_files), parts)
        done += _tokenize(bundle, corpus, mine, options)
    bad = [reason for shard in done for reason in shard.bad]
    for reason in bad:
        print(f"can't be read: {printable(reason)}", file=sys.stderr)
    files, size = sum(shard.files for shard in done), sum(shard.bytes for shard in done)
    print(f"{printable(options.out)}: codes of {files:,} files in {len(done):,} shards of {size / 1e6:.1f} MB in all")
    if bad:
        print(f"{len(bad):,} of {len(bad) + files:,} files can't be read", file=sys.stderr)
        sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok tokenize",
        description="Write the codes of all files of a corpus as shards, which varitok.codes reads. The same command"
        " continues after an interruption.",
        epilog="for example: varitok tokenize PHOTOS --bundle tokenizer --out CODES --device cuda --part 1/8",
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("data", metavar="DATA", help="folder of files, or of shards; its train/ and val/ stay apart")
    parser.add_argument("--bundle", type=Path, required=True, metavar="BUNDLE", help="the bundle's folder")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="output folder")
    parser.add_argument("--tokens", type=int, metavar="K", help="keep the first K tokens, if they are ordered")
    parser.add_argument("--codebooks", type=int, metavar="Q", help="keep the first Q codebooks")
    parser.add_argument(
        "--part", default="1/1", metavar="I/N", help="write the I-th of N parts, for N machines; default: %(default)s"
    )
    parser.add_argument("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help=f"signals that a GPU encodes at once; each worker holds two batches of them; default: {GPU_BATCH}",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=_cores(),
        help="processes that read files, and encode them unless a GPU does; default: one for each core, %(default)s",
    )
    parser.add_argument(
        "--shard-files",
        type=int,
        default=4096,
        metavar="S",
        help="files of a shard; an interrupted run repeats at most these; default: %(default)s",
    )
    parser.add_argument(
        "--memory",
        type=float,
        default=MEMORY,
        metavar="GB",
        help=f"most memory of each process unless a GPU encodes, as for varitok encode; default: {MEMORY:g}",
    )
    return parser


def _cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _parse_part(text: str) -> tuple[int, int]:
    """Parse a part such as 2/8."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part {text}: give a part such as 2/8, from 1/8 to 8/8")
    return part, parts


def _corpora(bundle: Bundle, options: argparse.Namespace) -> list[_Corpus]:
    """List the files of the folder, or of its subfolders for training and validation."""
    data = options.data
    if not is_url(data) and not Path(data).is_dir():
        raise UserError(f"{data}: no such folder")
    splits = list_splits(data, 1.0, bundle.suffixes, noun_of(bundle))
    parts = split_folders(data)
    found = [(f"{data}/{name}", name, files) for name, files in zip(parts, splits, strict=True)] if parts else []
    kept = bundle.count_kept(options.codebooks)
    return [
        _Corpus(
            root,
            files,
            options.out / name,
            {
                "modality": bundle.modality,
                "bundle": identity(bundle.folder).hex(),
                "codebook_sizes": list(bundle.codebook_sizes[:kept]),
                "tokens": options.tokens or bundle.tokens or None,
                "files": len(files),
                "names": _digest(root, files),
                "shard_files": options.shard_files,
                "memory": options.memory,
            },
        )
        for root, name, files in found or [(data, "", splits.train)]
    ]


def _digest(root: str | Path, files: Sequence[File]) -> str:
    """Return a hash of the names of a corpus's files."""
    digest = hashlib.sha256()
    for name in names_in(root, files):
        digest.update(name.encode(errors="surrogateescape") + b"\0")
    return digest.hexdigest()[:16]


def _tokenize(bundle: Bundle, corpus: _Corpus, mine: Sequence[int], options: argparse.Namespace) -> list[_Done]:
    """Write those of the shards `mine` that are missing; return all of them."""
    try:
        corpus.out.mkdir(parents=True, exist_ok=True)
        found = _finished(corpus)
        done, missing = [found[number] for number in mine if number in found], [one for one in mine if one not in found]
        coded = encode_files(
            bundle,
            corpus.files,
            [
                indices[at : at + options.batch]
                for indices in map(corpus.indices, missing)
                for at in range(0, len(indices), options.batch)
            ],
            tokens=options.tokens,
            num_codebooks=options.codebooks,
            device=options.device,
            workers=options.workers,
            memory=options.memory,
        )
        shown = progress(coded, sum(len(corpus.indices(number)) for number in missing), "files")
        done += [_write(corpus, number, shown) for number in missing]
        next(shown, None)  # ends the workers, and the line of the progress
        return done
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{corpus.out}: can't be written ({reason}); make room or name another folder, then run this again"
        ) from error


def _finished(corpus: _Corpus) -> dict[int, _Done]:
    """Find the finished shards.

    Raises:
        UserError: The folder has anything but codes of this corpus, by this bundle.
    """
    found = {}
    for name in sorted(entry for entry in os.listdir(corpus.out) if not entry.startswith(".")):
        if not OURS.fullmatch(name):
            raise UserError(f"{corpus.out}: has other files, such as {printable(name)}; name a new folder with --out")
        stem = name.partition(".")[0]
        path = corpus.out / (stem + SUFFIX)
        head = read_head(str(path))
        if head is None:
            raise UserError(f"{corpus.out / name}: isn't a shard of codes; name a new folder with --out")
        for key, meaning in DIFFERENT.items():
            if head[ABOUT].get(key) != corpus.about[key]:
                raise UserError(f"{corpus.out}: has codes of {meaning}; name a new folder with --out")
        if path.exists() and path.stat().st_size == head["bytes"]:
            found[int(stem)] = _Done(head["members"], head["bytes"], head["bad"])
    return found


def _write(corpus: _Corpus, number: int, coded: Iterator[FileCodes]) -> _Done:
    """Write a shard with the next codes."""
    indices, path, bad = corpus.indices(number), corpus.shard(number), []
    sources = [name_in(corpus.root, corpus.files[index]) for index in indices]
    names = member_names(str(PurePosixPath(source).with_suffix(".npy")) for source in sources)
    with ShardFile(path) as shard:
        for index, source, name, one in zip(indices, sources, names, islice(coded, len(indices)), strict=True):
            if one.codes is None:
                bad.append(one.bad)
                continue
            content = io.BytesIO()
            np.save(content, _smallest(one.codes, corpus.about["codebook_sizes"]), allow_pickle=False)
            caption = caption_of(corpus.files[index])
            facts: dict[str, Any] = {FILE: source, "signal_size": one.size, "shape": one.codes.shape}
            facts |= {} if one.seconds is None else {"seconds": one.seconds}
            facts |= {"caption": caption} if caption else {}
            shard.add(name, content, content.tell(), facts)
        if not shard.members:
            raise UserError(f"{path}: none of its {len(bad):,} files can be read ({printable(bad[0])})")
        shard.finish(**{ABOUT: corpus.about}, bad=bad)
    for stale in corpus.out.glob(f".{path.stem}.*.partial"):  # of runs that were killed
        stale.unlink(missing_ok=True)
    return _Done(shard.members, shard.length, bad)


def _smallest(codes: Any, sizes: Sequence[int]) -> Any:
    """Convert codes to the smallest unsigned type that has all entries of the codebooks; continuous codes stay."""
    return codes.astype(np.min_scalar_type(max(sizes) - 1)) if sizes else codes
