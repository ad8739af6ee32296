"""The command `varitok` and its subcommands.

A subcommand's module is imported when it is called, so that `varitok info` and others run without torch.
"""

import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NamedTuple

from varitok import UserError, __version__, exit_on_closed_output

__all__ = ["SUBCOMMANDS", "Subcommand", "main"]


class Subcommand(NamedTuple):
    """A subcommand.

    Attributes:
        call: Its function as `module:function`; the argument is the list of words after the subcommand's name.
        about: One-line description.
        example: Example arguments.
        extra: The extra of the package that it needs.
    """

    call: str
    about: str
    example: str
    extra: str = ""


SUBCOMMANDS = {
    "train": Subcommand("train:main", "train a tokenizer, as train.py does", "experiment=image/demo", "train"),
    "sweep": Subcommand(
        "codecs.training.sweep.cli:main",
        "search a configuration's best values, on this machine",
        "configs/sweep/image_rate.yaml --trials 20",
        "sweep",
    ),
    "shards": Subcommand("data.cli.shards:main", "pack training files into shards", "PHOTOS --out SHARDS", "train"),
    "features": Subcommand(
        "data.cli.features:main",
        "write a teacher's features of audio files as shards",
        "SOUNDS --teacher WAVLM --rate 24000 --out SHARDS",
        "train",
    ),
    "evaluate": Subcommand(
        "codecs.evaluation.cli:main", "measure quality at each length of the codes", "RUN --data PHOTOS", "train"
    ),
    "import": Subcommand(
        "export.cli.importing:main", "make a run of published weights", "encodec_24khz.th --out runs/encodec", "train"
    ),
    "export": Subcommand("export.cli.export:main", "export a run as a bundle", "RUN --out tokenizer", "train"),
    "report": Subcommand(
        "export.report.cli:main", "show runs and bundles on one page", "RUN --out report.html", "train"
    ),
    "compare": Subcommand(
        "export.compare.cli:main", "measure a bundle beside classical codecs", "tokenizer --data PHOTOS", "train"
    ),
    "probe": Subcommand(
        "export.probe.cli:main",
        "measure what codes reveal of classes, phones or words",
        "tokenizer --data SOUNDS",
        "probe",
    ),
    "encode": Subcommand("export.cli.encode_decode:encode", "files to codes (.vtk)", "tokenizer PHOTOS --out CODES"),
    "decode": Subcommand("export.cli.encode_decode:decode", "codes (.vtk) to files", "tokenizer CODES --out PHOTOS"),
    "tokenize": Subcommand(
        "export.cli.tokenize:main",
        "write a corpus's codes as shards",
        "PHOTOS --bundle tokenizer --out CODES",
        "train",
    ),
    "info": Subcommand("export.cli.info:main", "describe a bundle, a run, a checkpoint or a .vtk file", "tokenizer"),
    "push": Subcommand(
        "export.runtime.hub:push", "upload a bundle to the Hugging Face hub", "tokenizer OWNER/NAME", "hub"
    ),
    "pull": Subcommand("export.runtime.hub:pull", "download a bundle from there", "OWNER/NAME --out tokenizer", "hub"),
    "doctor": Subcommand(
        "export.cli.doctor:main", "check this machine for problems that would stop a run", "--runs runs"
    ),
    "completion": Subcommand("export.cli.completion:main", "print shell completions", "bash >> ~/.bashrc"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `varitok SUBCOMMAND ...`.

    The exit status is 0 on success, 1 if an exported file fails the parity check or some of several files can't be
    read, encoded or decoded, 2 after a `UserError`, which prints one line, 130 after an interrupt, and 141 if the
    reader of the output has ended, such as `head`.

    Args:
        arguments: The words after `varitok`; those of `sys.argv` if None.

    Example:
        >>> main(["--version"])
        varitok 0.1.0
    """
    name, *words = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    try:
        with exit_on_closed_output():
            _run(name, words)
    except UserError as error:
        print(f"varitok {name}: {error}" if name in SUBCOMMANDS else f"varitok: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _run(name: str, words: list[str]) -> None:
    if name in ("-h", "--help"):
        print(_help())
        return
    if name == "--version":
        print(f"varitok {__version__}")
        return
    if name not in SUBCOMMANDS:
        near = difflib.get_close_matches(name, SUBCOMMANDS, 1)
        meant = f"did you mean {near[0]}?" if near else f"there are {', '.join(SUBCOMMANDS)}"
        raise UserError(f"{name!r} is no subcommand; {meant}")
    for number, (before, word) in enumerate(zip(["", *words], words, strict=False), start=1):
        # As a path it would be the current folder.
        if not word or (word.startswith("--") and word.endswith("=")):
            what = word[:-1] or (before if before.startswith("--") else f"argument {number}")
            raise UserError(f"{what}: is empty; give a value (is a variable of the shell unset?)")
    chosen = SUBCOMMANDS[name]
    module, _, function = chosen.call.partition(":")
    try:
        call = getattr(importlib.import_module(f"varitok.{module}"), function)
    except ModuleNotFoundError as error:
        if not chosen.extra or (error.name or "varitok").startswith("varitok"):
            raise
        raise UserError(f"needs the package {error.name}; pip install 'varitok[{chosen.extra}]'") from error
    call(words)


def _help() -> str:
    lines = [
        "usage: varitok SUBCOMMAND ...",
        "",
        "Variable-length tokenizers for images, video and audio.",
        "",
        *(f"  {name:<12}{one.about}" for name, one in SUBCOMMANDS.items()),
        "",
        "for example",
        *(f"  varitok {name} {one.example}" for name, one in SUBCOMMANDS.items()),
        "",
        "`varitok SUBCOMMAND --help` explains each, `varitok --version` prints the version.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
