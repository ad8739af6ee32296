"""Base class of datasets of files, and downloads of published datasets."""

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import torch

from varitok import UserError

from ..batch import SignalDataset
from ..permutation import Numbers
from ..storage.members import File
from .crops import random_box
from .file_lengths import measure_files

__all__ = ["FileDataset", "download_or_raise", "takes"]

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(eq=False, repr=False)
class FileDataset(SignalDataset):
    """A dataset of audio or video files, each cropped along its first axis.

    Args:
        files: Paths, or members of shards, whose metadata stays packed.
        steps: Samples or frames of a crop, fewer if a file is shorter; None for whole files.
        train: Crop at random and augment; otherwise take the beginning of each file.
        flip: In training, mirror (video) or negate (audio) with probability 1/2.
        seed: Seed of all randomness.
    """

    files: Sequence[File] = field()
    steps: int | None
    _: KW_ONLY
    train: bool = True
    flip: bool = True
    seed: Annotated[int, "[0, inf)"] = 0

    def __len__(self) -> int:
        return len(self.files)

    @abstractmethod
    def length(self, file: File) -> int:
        """Return the samples or frames of a file, from its header or from the index of its shard.

        Raises:
            BadSample: The file can't be read.
        """

    @property
    @abstractmethod
    def unit(self) -> str:
        """What `length` counts: of files that stay as they are, another unit is another length."""

    def sizes(self) -> Numbers:
        """Return the samples or frames of a crop of each file; 0 if it can't be read."""
        lengths = measure_files(self.files, self.length, f"length {self.unit}")
        return lengths if self.steps is None else lengths.clip(max=self.steps)

    def draw_crop(self, length: int, steps: int | None, generator: torch.Generator) -> tuple[int, int]:
        """Return the first step of a crop, random in training, and its maximum length."""
        steps = length if steps is None else steps
        return random_box((length,), (steps,), generator)[0] if self.train else (0, steps)


def takes(other: Callable[..., Any], *but: str) -> Callable[[Function], Function]:
    """Return a decorator that replaces `**form` in a function's signature by the keyword-only arguments of `other`.

    The function passes `form` to `other`. So the names and types in a configuration are checked before any file is
    read. `but` lists arguments that the function sets itself.
    """

    def decorate(function: Function) -> Function:
        mine = inspect.signature(function).parameters
        own = {name: one for name, one in mine.items() if one.kind is not one.VAR_KEYWORD}
        passed = inspect.signature(other).parameters.values()
        more = [one for one in passed if one.kind is one.KEYWORD_ONLY and one.name not in (*own, *but)]
        function.__signature__ = inspect.Signature([*own.values(), *more])  # type: ignore[attr-defined]
        hints = get_type_hints(other, include_extras=True)
        function.__annotations__ |= {one.name: hints[one.name] for one in more}
        return function

    return decorate


def download_or_raise(make: Callable[[], Any], root: str, archive: str) -> Any:
    """Build a dataset of torchvision or torchaudio; if its download fails, raise a one-line error with the remedy.

    Args:
        make: Function that builds the dataset below `root`.
        root: The folder; it is created if missing.
        archive: File name of the downloaded archive.

    Raises:
        UserError: The files are not in `root` and can't be downloaded.
    """
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        return make()
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root={root}: {archive} is not there and could not be fetched ({reason}); place it in that folder"
        ) from error
