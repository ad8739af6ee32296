"""Copy of published tensors into our modules, by the kind of module."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from varitok import UserError
from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.statistics import MovingCodebook
from varitok.codecs.codec import Codec
from varitok.codecs.networks.layers.recurrent import Recurrent

from .source import Source, shorten

__all__ = ["transfer"]

CODEBOOK = ("embed", "cluster_size", "embed_avg")  # tensors of a moving codebook
PAIRS = (("weight_g", "weight_v"), ("parametrizations.weight.original0", "parametrizations.weight.original1"))


@torch.no_grad()
def transfer(source: Source, codec: Codec, names: Iterable[tuple[str, str]]) -> list[str]:
    """Copy tensors into a codec.

    Weight norm is folded or split where only one of both has it. A convolution of one step and a linear map are the
    same.

    Args:
        source: The published tensors.
        codec: Codec to fill.
        names: Modules of the source and of the codec.

    Returns:
        Names of the codec's tensors that were filled.

    Raises:
        UserError: Tensors are missing, or a shape differs.
    """
    copier = _Copier(source)
    for theirs, ours in names:
        copier.fill(theirs, codec.get_submodule(ours), ours)
    if copier.missing:
        raise UserError(f"{source.path}: lacks {shorten(copier.missing)}")
    return copier.filled


class _Copier:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.missing: list[str] = []
        self.filled: list[str] = []

    def fill(self, theirs: str, module: nn.Module, ours: str) -> None:
        """Fill one module."""
        if isinstance(module, Recurrent):
            for level, layer in enumerate(module.onward):
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                    self._copy(f"{theirs}.{name}_l{level}", layer.lstm, f"{name}_l0", f"{ours}.onward.{level}.lstm")  # type: ignore[arg-type]
        elif isinstance(module, MovingCodebook):
            self._fill_codebook(theirs, module, ours)
        elif isinstance(module, FactorizedResidualQuantizer):
            self._fill_factorized(theirs, module, ours)
        else:
            for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
                if f"{ours}.{name}" not in self.filled:
                    self._copy(f"{theirs}.{name}", module, name, ours)
            if parametrize.is_parametrized(module, "weight"):
                self._fill_normed(theirs, module, ours)

    def _copy(self, theirs: str, module: nn.Module, name: str, ours: str) -> None:
        value = self._weight(theirs)
        if value is None:
            self.missing.append(theirs)
            return
        target: Tensor = getattr(module, name)
        self._put(target, value, theirs)
        self.filled.append(f"{ours}.{name}")

    def _weight(self, theirs: str) -> Tensor | None:
        """Return a tensor, or the product of weight norm's two; None if the source lacks it."""
        if theirs in self.source.shapes:
            return self.source.take(theirs)
        owner, _, name = theirs.rpartition(".")
        pair = self._pair(owner) if name == "weight" else None
        return None if pair is None else torch._weight_norm(pair[1], pair[0], 0)

    def _pair(self, theirs: str) -> tuple[Tensor, Tensor] | None:
        """Return the length and the direction of a weight that has weight norm."""
        for length, direction in PAIRS:
            if f"{theirs}.{length}" in self.source.shapes and f"{theirs}.{direction}" in self.source.shapes:
                return self.source.take(f"{theirs}.{length}"), self.source.take(f"{theirs}.{direction}")
        return None

    def _fill_normed(self, theirs: str, module: nn.Module, ours: str) -> None:
        """Fill a weight that has weight norm here."""
        parts = module.parametrizations["weight"]  # type: ignore[index]
        pair = self._pair(theirs)
        if pair is None:
            whole = self._weight(f"{theirs}.weight")
            if whole is None:
                self.missing.append(f"{theirs}.weight")
                return
            pair = torch.linalg.vector_norm(whole, dim=tuple(range(1, whole.dim())), keepdim=True), whole
        for index, value in enumerate(pair):
            self._put(getattr(parts, f"original{index}"), value, f"{theirs}.weight")
            self.filled.append(f"{ours}.parametrizations.weight.original{index}")

    def _fill_codebook(self, theirs: str, module: MovingCodebook, ours: str) -> None:
        """Fill a moving codebook: entries, or the sums and counts whose ratio they are."""
        has = self.source.shapes
        if f"{theirs}.embed" in has:
            entries, counts, sums = (self.source.take(f"{theirs}.{name}") for name in CODEBOOK)
        elif f"{theirs}.embed_sum" in has:
            sums, counts = (self.source.take(f"{theirs}.{name}") for name in ("embed_sum", "cluster_usage"))
            entries = sums / counts.clamp(min=1e-5)[:, None]
        else:
            self.missing.append(f"{theirs}.embed")
            return
        self._put(module.entries, entries, f"{theirs}.embed")
        module.start_from(module.entries.clone())
        # Counts of 0 are those of a file that was saved without them.
        if bool((counts > 0).any()):
            self._put(module.counts, counts, f"{theirs}.cluster_size")
            self._put(module.sums, sums, f"{theirs}.embed_avg")
        self.filled += [f"{ours}.{name}" for name in ("entries", "counts", "sums", "initialised", "age")]

    def _fill_factorized(self, theirs: str, module: FactorizedResidualQuantizer, ours: str) -> None:
        """Fill a quantizer whose levels' projections are one matrix."""
        for level in range(module.num_codebooks):
            rows = slice(level * module.width, (level + 1) * module.width)
            for name, target in {
                "in_proj.weight": module.into.weight[rows],
                "in_proj.bias": module.into.bias[rows],
                "out_proj.weight": module.out.weight[:, rows],
                "out_proj.bias": module.out_bias[level],
                "codebook.weight": module.codebooks[level],
            }.items():
                value = self._weight(f"{theirs}.{level}.{name}")
                if value is None:
                    self.missing.append(f"{theirs}.{level}.{name}")
                else:
                    self._put(target, value, f"{theirs}.{level}.{name}")
        self.filled += [f"{ours}.{name}" for name, _ in module.named_parameters()]

    def _put(self, target: Tensor, value: Tensor, theirs: str) -> None:
        """Copy a value, whose axes of length 1 don't matter."""
        if [side for side in target.shape if side > 1] != [side for side in value.shape if side > 1]:
            raise UserError(
                f"{self.source.path}: {theirs} has the shape {list(value.shape)}, the codec's has {list(target.shape)}"
            )
        target.copy_(value.reshape(target.shape))
