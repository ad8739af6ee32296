"""Encode the files of a corpus with a bundle, in worker processes or on a GPU."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from varitok import UserError
from varitok.codecs.precision import exact_float32
from varitok.data.datamodule import loader
from varitok.data.storage.members import File
from varitok.data.workers import WorkerProgress

from ..exporters.rebuild import rebuild
from ..runtime.bundle import Array, Bundle
from ..runtime.files import SignalFile
from ..runtime.memory import MEMORY, Coded, encode_within, plan
from ..runtime.tiling import encode_tiled

__all__ = ["FileCodes", "encode_files"]

_EncodeFile: TypeAlias = Callable[[SignalFile], Coded]
_EncodeBatch: TypeAlias = Callable[[Tensor], Array]
"""Function (signals `(b, c, *grid)`) -> codes `(b, codebooks, *grid)`."""


class FileCodes(NamedTuple):
    """The codes of a file.

    Attributes:
        codes: `(codebooks, *grid)`; None if the file can't be read, or isn't encoded yet.
        size: Shape of its signal, without channels.
        seconds: Duration; None for an image, or if no rate is known.
        bad: "path: reason" if it can't be read; otherwise empty.
    """

    codes: Array | None = None
    size: tuple[int, ...] = ()
    seconds: float | None = None
    bad: str = ""


def encode_files(
    bundle: Bundle,
    files: Sequence[File],
    batches: Iterable[Sequence[int]],
    *,
    tokens: int | None = None,
    num_codebooks: int | None = None,
    device: str = "cpu",
    workers: int = 0,
    memory: float = MEMORY,
) -> Iterator[FileCodes]:
    """Yield the codes of files, in the order of `batches`; signals are prepared as in evaluation.

    On the CPU each worker encodes the files that it reads one by one, by ONNX Runtime in one thread. That is as fast as
    torch in batches, and gives exactly the codes of `varitok encode`. On another device torch encodes the equally
    shaped, whole signals of a batch at once, images in the tiles of `varitok encode`, in float32; there a code may
    differ if two entries of a codebook are equally near.

    Args:
        bundle: A bundle of a modality with media files; it hasn't encoded anything yet.
        files: Files of its modality.
        batches: Indices of the files of each batch.
        tokens: Number of ordered tokens to keep; all if None.
        num_codebooks: Number of codebooks to keep; all if None.
        device: "cpu", or a device of torch.
        workers: Number of processes that read files; 0 reads in this one.
        memory: On the CPU, peak memory of each process in GB; see `encode_within`. It also gives the tiles of images.

    Raises:
        UserError: The device isn't available, its memory is too small, or a worker ended.
    """
    kept = bundle.count_kept(num_codebooks)
    encode_here = None if device == "cpu" else _torch_encoder(bundle, device, memory)
    bundle.threads = 1  # more would spin while they wait for each other; processes don't
    encode = partial(encode_within, bundle, memory=memory, tokens=tokens, num_codebooks=num_codebooks)
    for read in loader(_Signals(bundle, files, None if encode_here else encode), batches, workers, lambda read: read):
        found = list(read.coded)
        for positions, values in read.stacks:
            assert encode_here is not None
            codes = encode_here(values)[:, :kept]
            for position, one in zip(positions, codes if tokens is None else codes[..., :tokens], strict=True):
                found[position] = found[position]._replace(codes=one)
        yield from found


class _Read(NamedTuple):
    """The files of a batch.

    Attributes:
        coded: One for each file.
        stacks: Signals to encode, `(b, c, *grid)` of each shape, and their positions in `coded`.
    """

    coded: list[FileCodes]
    stacks: list[tuple[list[int], Tensor]]


@dataclass(eq=False, repr=False)
class _Signals(Dataset[Any]):
    """A dataset of batches of a bundle's signals, encoded by `encode` unless it is None."""

    bundle: Bundle
    files: Sequence[File]
    encode: _EncodeFile | None
    workplaces: WorkerProgress = field(default_factory=WorkerProgress)

    def name(self, index: int) -> str:
        """Return the name of a file."""
        return str(self.files[index])

    def __getitems__(self, indices: Sequence[int]) -> _Read:
        """Read the files of a batch."""
        coded: list[FileCodes] = []
        alike = defaultdict[tuple[int, ...], dict[int, npt.NDArray[np.float32]]](dict)
        for position, index in enumerate(indices):
            self.workplaces.read(index)
            try:
                one, values = self._read(self.files[index])
            except UserError as error:
                name = self.name(index)
                coded.append(FileCodes(bad=str(error) if name in str(error) else f"{name}: {error}"))
                continue
            coded.append(one)
            if values is not None:
                alike[values.shape][position] = values
        stacks = [(list(same), torch.from_numpy(np.concatenate(list(same.values())))) for same in alike.values()]
        return _Read(coded, stacks)

    def _read(self, file: File) -> tuple[FileCodes, npt.NDArray[np.float32] | None]:
        """Encode a file; or read its signal, `(1, c, *grid)`."""
        values, codes = None, None
        with self.bundle.open_file(file) as opened:
            if self.encode:
                found, size, _ = self.encode(opened)
                codes = found[0]
            else:
                values = opened.read()
                size = values.shape[2:]
            rate = self.bundle.sample_rate or opened.frame_rate
        if not math.prod(size):
            raise UserError("holds no signal")
        return FileCodes(codes, size, round(size[0] / rate, 6) if rate else None), values


def _torch_encoder(bundle: Bundle, device: str, memory: float) -> _EncodeBatch:
    """Return the encoder on a device of torch; images are encoded in the tiles of `memory` GB.

    Raises:
        UserError: The device isn't available, or the bundle lacks its weights.
    """
    codec = rebuild(bundle.folder)
    try:
        codec.to(device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, or a build of torch without that device
        raise UserError(f"--device {device}: this device isn't available") from error

    @torch.inference_mode()
    def encode(values: Array) -> Array:
        try:
            with exact_float32():
                codes: Array = codec.encode(torch.from_numpy(values).to(device, non_blocking=True)).cpu().numpy()
        except torch.OutOfMemoryError as error:
            raise UserError(f"--batch: {len(values)} signals don't fit in the device's memory; give less") from error
        return codes

    def encode_batch(values: Tensor) -> Array:
        if bundle.splits or bundle.tokens:
            return encode(values.numpy())
        tile = plan(bundle, "encoder", values.shape[2:], memory).tile
        assert tile is not None, "an image has one"
        return encode_tiled(encode, values.numpy(), bundle.hops, tile)

    return encode_batch
