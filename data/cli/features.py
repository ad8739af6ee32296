"""The subcommand `features`: precompute a teacher's features of the files of a folder, and write them as shards.

Those of audio are `NAME.npy`, float16 `(n, c)`, with the stride in the index. Those of an image are `NAME.npz`, float16
`values` `(rows, columns, c)` and, if the teacher has a pooled output, `pooled` `(d,)`.
"""

import argparse
import io
import json
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from varitok import UserError, progress

from ..batch import normalize
from ..datasets.cached_features import IMAGE, SOUND
from ..decoding.audio import decode_audio
from ..decoding.errors import BadSample
from ..decoding.images import decode_image
from ..decoding.suffixes import AUDIO, IMAGES
from ..storage.listing import list_splits, name_in, split_folders
from ..storage.members import File
from ..storage.shard_writer import ShardWriter
from ..teachers.audio import AudioTransformer
from ..teachers.vision import VisionTransformer

__all__ = ["main"]

WINDOW = 30  # seconds of audio per forward pass
MOST_LONGER = 4  # maximum aspect ratio; longer images are squeezed to it


_Member: TypeAlias = tuple[str, bytes, dict[str, Any]]
"""A member of a shard: suffix, content, entries of the index."""


def write_features(
    files: Sequence[File],
    names: Iterable[str],
    teacher: AudioTransformer | VisionTransformer,
    out: Path,
    *,
    side: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Write a teacher's features of whole files as shards in a new folder; return counts, and the unreadable files.

    Audio is processed in windows of 30 s. Images are processed whole, resized to a shorter side of `side` pixels.
    """
    teacher.to(device)
    if isinstance(teacher, VisionTransformer):
        if side is None or side < teacher.patch or side % teacher.patch:
            raise UserError(f"--side {side}: must be a multiple of the teacher's patch, {teacher.patch}")
        see = partial(_extract_images, teacher, side, device)
    else:
        see = partial(_extract_audio, teacher, device)
    bad: list[str] = []
    with ShardWriter(out) as shards, torch.no_grad():
        for file, name in progress(zip(files, names, strict=True), len(files), "files"):
            try:
                suffix, content, facts = see(file)
            except BadSample as error:
                bad.append(str(error))
                continue
            shards.write(name + suffix, content, facts | {"teacher": teacher.name, "layer": teacher.layer})
    return {"out": str(out), "files": shards.members, "bytes": shards.bytes, "bad": bad}


def _extract_audio(teacher: AudioTransformer, device: str, file: File) -> _Member:
    """Compute the features of an audio file, `(n, c)`."""
    sound = torch.from_numpy(decode_audio(file, sample_rate=teacher.sample_rate, channels=1))
    windows = torch.split(sound[None].to(device), WINDOW * teacher.sample_rate, dim=2)
    seen = [teacher(window) for window in windows]
    content = io.BytesIO()
    np.save(content, _to_half(torch.cat([one.values[0].T for one in seen])), allow_pickle=False)
    facts = {"step": seen[0].steps[0], "sample_rate": teacher.sample_rate, "channels": teacher.channels}
    return SOUND, content.getvalue(), facts


def _extract_images(teacher: VisionTransformer, side: int, device: str, file: File) -> _Member:
    """Compute the features of an image file, `(rows, columns, c)`."""
    image = torch.from_numpy(decode_image(file)).permute(2, 0, 1)  # (h, w, 3) -> (3, h, w)
    longer = max(image.shape[1:]) / min(image.shape[1:])
    long = round(min(longer, MOST_LONGER) * side / teacher.patch) * teacher.patch
    size = (side, long) if image.shape[1] < image.shape[2] else (long, side)
    values, pooled = teacher.encode_frames(teacher.resize(normalize(image)[None].to(device), size))
    arrays = {"values": _to_half(values[0].permute(1, 2, 0))}  # (c, rows, columns) -> (rows, columns, c)
    if pooled is not None:
        arrays["pooled"] = _to_half(pooled[0])
    content = io.BytesIO()
    np.savez(content, **arrays)
    facts = {"side": side // teacher.patch, "channels": teacher.channels, "pooled_channels": teacher.pooled_channels}
    return IMAGE, content.getvalue(), facts


def _to_half(values: Tensor) -> Any:
    return values.cpu().half().numpy()


def main(words: Sequence[str]) -> None:
    """Run `varitok features`."""
    options = _parser().parse_args(words)
    layer = int(options.layer) if options.layer.isdigit() else options.layer
    teacher: AudioTransformer | VisionTransformer
    kind: tuple[Collection[str], str]
    if options.rate is None:
        teacher, kind = VisionTransformer(options.teacher, layer=layer), (IMAGES, "image")
    else:
        teacher, kind = AudioTransformer(options.teacher, options.rate, layer), (AUDIO, "audio file")
    folder = Path(options.folder)
    parts = split_folders(folder) if folder.is_dir() else None
    folder = folder / parts[0] if parts else folder
    found = {str(file): file for files in list_splits(folder, 0.05, *kind) for file in files}
    files = [found[name] for name in sorted(found)]
    names = [name_in(folder, file) for file in files]
    print(json.dumps(write_features(files, names, teacher, options.out, side=options.side, device=options.device)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "varitok features",
        description="Write a teacher's features of audio files or images as shards, which training reads instead.",
        epilog="for example: varitok features AUDIO --teacher microsoft/wavlm-large --rate 24000 --out FEATURES",
    )
    parser.add_argument("folder", help="folder of audio files or images, or of their shards, like data.root")
    parser.add_argument("--teacher", required=True, metavar="FOLDER", help="folder of its weights and .json files")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--rate", type=int, metavar="HZ", help="for audio: the codec's sample rate")
    kind.add_argument("--side", type=int, metavar="PIXELS", help="for images: shorter side of the teacher's input")
    parser.add_argument("--layer", default="last", help="last, mean, or a layer's number; default: %(default)s")
    parser.add_argument("--device", default="cpu", help="device of the teacher; default: %(default)s")
    parser.add_argument("--out", type=Path, required=True, metavar="SHARDS", help="output folder, new or empty")
    return parser
