"""A data set of files, and how published ones are downloaded."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from varitok import UserError

from ..batch import BadSample, SignalDataset
from ..storage.members import File
from .crops import random_box

__all__ = ["FileDataset", "download_or_raise", "takes"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(eq=False, repr=False)
class FileDataset(SignalDataset):
    """A data set of files, each a signal that has a length.

    Args:
        files: Paths, or members of shards, which stay packed.
        steps: Samples or frames of a stretch, less where a file is shorter; None for whole files.
        train: Stretches come from anywhere in a file, varied by chance; otherwise they are its beginning.
        flip: Mirror, or change the sign of, every other training signal.
        seed: Seed of all chance.
    """

    files: Sequence[File] = field()
    steps: int | None
    _: KW_ONLY
    train: bool = True
    flip: bool = True
    seed: int = 0

    def __len__(self) -> int:
        return len(self.files)

    @abstractmethod
    def length(self, file: File) -> int:
        """Count the samples or frames of a file, from its header, or from the index of its shard.

        Raises:
            BadSample: It can't be read.
        """

    def sizes(self) -> list[int]:
        """Count the samples or frames of each file's stretches; 0 if it can't be read."""
        lengths = self.of_each(self.length)
        return lengths if self.steps is None else [min(length, self.steps) for length in lengths]

    def draw_stretch(self, length: int, steps: int | None, generator: torch.Generator) -> tuple[int, int]:
        """Return the first step of a crop and its largest length; random in training."""
        steps = length if steps is None else steps
        return random_box((length,), (steps,), generator)[0] if self.train else (0, steps)

    def of_each(self, number: Callable[[File], int]) -> list[int]:
        """Return a number of each file; 0 if it can't be read."""
        found = []
        for file in self.files:
            try:
                found.append(number(file))
            except BadSample:
                found.append(0)
        return found


def takes(other: Callable[..., Any], *but: str) -> Callable[[Function], Function]:
    """Return a decorator: a function's `**form` becomes the keywords of another, to which it hands them.

    So a configuration's names and types are checked before any file is looked for. `but` names the keywords that the
    function chooses itself.
    """

    def decorate(function: Function) -> Function:
        mine = inspect.signature(function).parameters
        own = {name: one for name, one in mine.items() if one.kind is not one.VAR_KEYWORD}
        passed = inspect.signature(other).parameters.values()
        more = [one for one in passed if one.kind is one.KEYWORD_ONLY and one.name not in (*own, *but)]
        function.__signature__ = inspect.Signature([*own.values(), *more])  # type: ignore[attr-defined]
        hints = get_type_hints(other)
        function.__annotations__ |= {one.name: hints[one.name] for one in more}
        return function

    return decorate


def download_or_raise(make: Callable[[], Any], root: str, archive: str) -> Any:
    """Make one of torchvision's or torchaudio's datasets; say in one line what to do where it can't be had.

    Args:
        make: Makes it, below `root`.
        root: The folder; it is created if missing.
        archive: Name of the file that it is fetched as.

    Raises:
        UserError: The files are not in `root` and can't be fetched.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        return make()
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root={root}: {archive} is not there and could not be fetched ({reason}); place it in that folder"
        ) from error
