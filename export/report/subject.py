"""Runs and bundles, opened as subjects of a report."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from omegaconf import OmegaConf
from torch import Tensor

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.cli import validation_splits
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.ladder import Ladder
from varitok.codecs.evaluation.table import Table, read_csv
from varitok.codecs.modalities.registry import modality_of
from varitok.codecs.training.callbacks.samples import spread
from varitok.codecs.training.logging.scalars import read_scalars
from varitok.data.batch import Sample, collate

from ..adapters.codec import BundleCodec, as_codec
from ..adapters.dataset import dataset_of, files_of, noun_of
from ..runtime.bundle import read_json
from ..runtime.load import load

__all__ = ["Source", "Subject", "open_subject"]


class Source(NamedTuple):
    """The source of the signals to show.

    Attributes:
        data: Folder of validation signals for a run; None for its own.
        files: Files and folders for a bundle, which uses those of its modality.
        most: Largest number of signals.
        seconds: Longest duration of audio and clips.
    """

    data: Path | None = None
    files: Sequence[Path] = ()
    most: int = 6
    seconds: float = 4.0


class Subject(NamedTuple):
    """A run or a bundle.

    Attributes:
        name: Name in the report.
        kind: "run" or "bundle".
        codec: The codec, in evaluation mode.
        ladder: The ladder, with the rungs of the table.
        signals: Signals to show: the name of each, and `(c, *grid)` as a dataset returns it.
        table: The evaluation.
        progress: The run's log: for each name its values, by update.
        about: Further facts, by name.
        config: The configuration, as plain data.
        folder: Path of the folder, whose `evaluation/` has the results of an evaluation.
    """

    name: str
    kind: str
    codec: Codec | BundleCodec
    ladder: Ladder
    signals: Sequence[tuple[str, Tensor]]
    table: Table
    progress: Mapping[str, Mapping[int, float]]
    about: Mapping[str, str]
    config: Mapping[str, Any]
    folder: Path


def open_subject(path: Path, source: Source) -> Subject:
    """Open a run, by its folder or a checkpoint, or a bundle, by its folder.

    Raises:
        UserError: The path is neither, a part of it is missing, or there is no file for a bundle.
    """
    if (path / "config.json").exists() or (path / "export.json").exists():
        return _bundle(path, source)
    if path.is_file() or (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        return _run(path, source)
    what = "neither a run's folder nor a bundle's" if path.exists() else "no such folder"
    raise UserError(f"{path}: {what}; name a folder that train.py or varitok export wrote")


def _run(path: Path, source: Source) -> Subject:
    codec, config = load_run(path)
    folder = path if path.is_dir() else path.absolute().parent.parent
    evaluation = folder / "evaluation" / "evaluation.csv"
    if not evaluation.is_file():
        raise UserError(f"{evaluation}: no evaluation of this run; run varitok evaluate {path} first")
    table = read_csv(evaluation)
    modality = modality_of(codec)
    splits = validation_splits(modality, config.data, source.data)
    files = splits.val.files
    signals = [
        (
            PurePath(files[index].name).name if files else f"validation signal {index}",
            modality.cut(signal, source.seconds),
        )
        for index, signal in spread(splits.val, source.most).items()
    ]
    own, last = str(config.get("name") or "run"), folder.resolve().name
    about = {
        "parameters": f"{sum(part.numel() for part in codec.parameters()):,}",
        "updates": f"{config.get('updates'):,}" if isinstance(config.get("updates"), int) else "",
        "commit": _commit(folder / "provenance.json"),
    }
    named = OmegaConf.to_container(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))
    assert isinstance(named, dict)
    return Subject(
        name=own if own == last else f"{own} · {last}",
        kind="run",
        codec=codec,
        ladder=_ladder(codec, table, evaluation),
        signals=signals,
        table=table,
        progress=read_scalars(folder / "metrics.csv"),
        about={key: value for key, value in about.items() if value},
        config={str(key): value for key, value in named.items()},
        folder=folder,
    )


def _ladder(codec: Codec, table: Table, path: Path) -> Ladder:
    """Return a ladder with the table's rungs.

    Raises:
        UserError: The table isn't an evaluation of this codec.
    """
    ladder = Ladder(codec)
    needed = {ladder.axis, "bytes", modality_of(codec).rate.name}
    if needed <= table.rows[0].keys():
        keeps = table.column(ladder.axis)
        ladder = Ladder(codec, [int(keep) for keep in keeps])
        if ladder.keeps == keeps:
            return ladder
    raise UserError(f"{path}: not an evaluation of this run's codec; evaluate it again with varitok evaluate")


def _commit(path: Path) -> str:
    """Return the commit that a run was made with, if known."""
    try:
        git = json.loads(path.read_text(encoding="utf-8"))["git"]
        return str(git["commit"]) + (", changed" if git["dirty"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _bundle(path: Path, source: Source) -> Subject:
    bundle = load(path)
    codec = as_codec(bundle)
    bundle = codec.bundle
    if not bundle.suffixes:
        raise UserError(f"{path}: no file format holds {bundle.modality} signals; name the run that wrote this bundle")
    mine, what = files_of(bundle, source.files, "--files"), noun_of(bundle)
    data, protocol = dataset_of(bundle, mine, source.seconds)
    shown = [(mine[index].name, signal) for index, signal in spread(data, source.most).items()]
    header = {"dataset": f"{len(shown)} of {len(mine)} {what}s of --files", "protocol": protocol}
    if bad := min(source.most, len(mine)) - len(shown):
        header["unreadable files left out"] = str(bad)
    table = evaluate(codec, (collate([Sample(signal)]) for _, signal in shown), header=header)
    export = read_json(path / "export.json")
    sizes = {name: f"{file['bytes']:,} bytes" for name, file in export["files"].items()}
    resolved = path.resolve()
    return Subject(
        name="/".join(resolved.parts[-2:]) if resolved.name == "bundle" else resolved.name,
        kind="bundle",
        codec=codec,
        ladder=Ladder(codec),
        signals=shown,
        table=table,
        progress={},
        about={"format": str(bundle.config["format_version"]), **sizes},
        config=bundle.config,
        folder=path,
    )
