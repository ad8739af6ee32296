"""Adapter from the quantizers of vector-quantize-pytorch to `Bottleneck`.

`library` builds a class of the package and wraps each of its residual stacks in a `LibraryStack`, and groups of stacks
in a `Product`. Padding, codebook dropout and export are then handled here.

- Training with gradients runs the package's layers (search, gradient estimators, entropies) on kept tokens only.
- Evaluation and export use tables or grids read from the layers.
- `update()` updates EMA codebooks from all batches and ranks (`MovingCodebook`); forward doesn't. After one forward and
  one update they equal the package's own, except for k-means and the replacement of dead entries.
- Commitment is averaged per sample, then over samples. Other losses (entropy, orthogonality, diversity) are the
  package's: averages over the kept tokens of a rank and all codebooks of a layer.
"""

import copy
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError

from ..distributed import differentiable_mean_over_ranks
from ..masking import masked_mean, prefix_mask
from ..result import Quantized
from .binary import SignGrid
from .composite import AddedCodebooks, MeasuredParts
from .contract import Bottleneck, straight_through
from .fsq import EvenGrid, RoundingGrid
from .grid import FramedGrid
from .nearest import FrozenTable, LiveTable
from .product import Product
from .statistics import Gathering, MovingCodebook

__all__ = ["LibraryStack", "library"]

PACKAGE = "vector_quantize_pytorch"  # imported on use, because it takes seconds
# Each class passes arguments that are not its own to the next.
CHAINS = (
    ("GroupedResidualVQ", "ResidualVQ", "VectorQuantize"),
    ("GroupedResidualFSQ", "ResidualFSQ", "FSQ"),
    ("GroupedResidualLFQ", "ResidualLFQ", "LFQ"),
    ("ResidualSimVQ", "SimVQ"),
    ("RandomProjectionQuantizer", "VectorQuantize"),
)
QUANTIZERS = {name: chain[index:] for chain in CHAINS for index, name in enumerate(chain)}
OTHERS = {
    "BinaryMapper": "gives one-hot vectors of its codes, no latents",
    "EvoLFQ": "has an encoder and a decoder of its own",
    "FSP": "has a penalty of the whole batch's moments; bottleneck=fsq_dithered is near",
    "HierarchicalVQ": "has codebooks for a fixed number of tokens; bottleneck=hierarchy is near",
    "LatentQuantize": "has indices that don't decode to its latents once its values have learnt",
}
# Arguments that `Bottleneck` doesn't support unless they have their default.
REFUSED = {
    "latents are tokens (b, n, d)": "accept_3d_fmap accept_image_fmap channel_first channel_last is_channel_first",
    "codebooks learn from all processes in any case": "sync_affine_param sync_codebook sync_kmeans",
    "k-means goes 10 rounds": "kmeans_iters",
    "the nearest entry of each level is its code": "beam_size eval_beam_size",
    "the run's optimizer is the only one": "in_place_codebook_optimizer vq_bridge",
    "it learns in evaluation too": "affine_param",
    "its noise is on the sum of the levels; directional_reparam has it on each": "diveq",
    "its entries depend on the levels before, so that no table decodes them": "implicit_neural_codebook",
    "give length=quantizer_dropout, which draws for each sample": "quantize_dropout",
    "codes are always returned": "return_indices",
}


def _prepare_vq(layer: Any) -> None:
    by_distance = not layer.commitment_use_cross_entropy_loss
    weight = layer.commitment_weight if layer.has_commitment_loss and by_distance else 0.0
    layer.pulls = (weight, weight if layer.learnable_codebook and not layer.freeze_codebook else 0.0)
    layer.has_commitment_loss = layer.has_commitment_loss and not by_distance
    own = (layer.has_commitment_loss, layer.has_codebook_diversity_loss, layer.has_codebook_orthogonal_loss)
    layer.asks = "regularization" if any(own) else ""
    layer.moves, layer.freeze_codebook = not layer.freeze_codebook, True  # updated by `_Codebook` instead


def _prepare_sim_vq(layer: Any) -> None:
    layer.pulls = (layer.commitment_weight * layer.input_to_quantize_commit_loss_weight, layer.commitment_weight)


def _prepare_fsq(layer: Any) -> None:
    levels, even = layer._levels.tolist(), layer.preserve_symmetry
    if layer.bound_hard_clamp and not even:
        raise UserError("bottleneck.arguments.bound_hard_clamp=True: needs preserve_symmetry=true")
    layer.grid = EvenGrid(levels, squash=not layer.bound_hard_clamp) if even else RoundingGrid(levels)


def _prepare_lfq(layer: Any) -> None:
    # The package's own function discards the sum over ranks.
    import_module(f"{PACKAGE}.lookup_free_quantization").maybe_distributed_mean = differentiable_mean_over_ranks  # type: ignore[attr-defined]
    layer.asks = "entropy"
    size = layer.codebook_dim**-0.5 if layer.spherical else 1.0
    layer.grid = SignGrid(layer.codebook_dim, layer.codebook_scale * size)
    # The first dimension is the highest bit in the package, the lowest in the grid.
    layer.register_buffer("order", torch.eye(layer.codebook_dim).flip(0), persistent=False)


class _Kind(NamedTuple):
    """Adapter of a class of layers.

    Attributes:
        prepare: Function that sets attributes of a layer: `pulls`, the weights of commitment and codebook loss; `asks`,
            the name of the layer's own loss; `moves`, whether its codebook is trained; `grid`, if it has no table.
        table: Function that returns the entries `(heads or 1, K, d)`, with gradient if learned by gradient; None for a
            grid.
    """

    prepare: Callable[[Any], None]
    table: Callable[[Any], Tensor] | None = None


KINDS = {
    "VectorQuantize": _Kind(_prepare_vq, lambda layer: layer._codebook.embed),
    "SimVQ": _Kind(_prepare_sim_vq, lambda layer: layer.codebook[None]),
    "FSQ": _Kind(_prepare_fsq),
    "LFQ": _Kind(_prepare_lfq),
}


class _Codebook(MovingCodebook):
    """`MovingCodebook` on the buffers of the package's EMA codebook."""

    def __init__(self, codebook: Any, index: int, kmeans_init: bool) -> None:
        Gathering.__init__(self)  # MovingCodebook's would register buffers of its own
        self.held = (codebook, index)  # in a tuple, so that it isn't a submodule and saved twice
        self.decay, self.revival = codebook.decay, codebook.threshold_ema_dead_code
        self.cosine, self.smoothing = codebook.use_cosine_sim, codebook.eps
        self.register_buffer("initialised", torch.tensor(not kmeans_init))
        self.register_buffer("age", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(()), persistent=False)
        self.start_gathering(not kmeans_init)

    @property
    def entries(self) -> Tensor:  # type: ignore[override]
        codebook, index = self.held
        return codebook.embed.detach()[index]  # type: ignore[no-any-return]

    @property
    def counts(self) -> Tensor:  # type: ignore[override]
        codebook, index = self.held
        return codebook.cluster_size[index]  # type: ignore[no-any-return]

    @property
    def sums(self) -> Tensor:  # type: ignore[override]
        codebook, index = self.held
        return codebook.embed_avg[index]  # type: ignore[no-any-return]

    def _means(self) -> Tensor:
        return super()._means() if self.held[0].ema_update else self.entries

    def _limits(self) -> tuple[Tensor, Tensor]:
        counts = self.counts
        return counts.new_tensor(self.revival), counts.new_tensor(self.held[0].reset_cluster_size)


class _Affine(nn.Module):
    """Affine map `z W + b` without trainable parameters."""

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight.clone())
        self.register_buffer("bias", bias.clone())

    def forward(self, latents: Tensor) -> Tensor:
        return latents @ self.weight + self.bias


def _random_projections(group: Any) -> tuple[nn.Module, nn.Module]:
    """Return the projections of a `RandomProjectionQuantizer`, and their least-squares inverse."""
    weight, quantizer = group.rand_projs.transpose(0, 1).flatten(1), group.vq  # (q, d, width) -> (d, q * width)
    bias = weight.new_zeros(weight.shape[1])
    if quantizer.has_projections:  # if there are several codebooks; not trained either
        weight, bias = weight @ quantizer.project_in.weight.detach().T, quantizer.project_in.bias.detach()
        quantizer.project_in, quantizer.project_out = nn.Identity(), nn.Identity()
    back = torch.linalg.pinv(weight)
    return nn.Sequential(group.norm, _Affine(weight, bias)), _Affine(back, -bias @ back)


class LibraryStack(Bottleneck):
    """Layer of vector-quantize-pytorch, or residual stack of its layers.

    If a layer has several heads, dropped codebooks decode to zeros in their channels. `RandomProjectionQuantizer` is
    never trained and returns codes only. Here it decodes by the pseudoinverse: to the latents of least norm whose
    projections are the entries.

    Args:
        group: The package's module.
        dim: Width of the latents; the codebooks' total width if None.
        kmeans_init: Initialize EMA codebooks by k-means of the first batch of all ranks.
    """

    positions: Tensor
    reach: Tensor
    scales: Tensor

    def __init__(self, group: Any, dim: int | None = None, kmeans_init: bool = False) -> None:
        super().__init__()
        self.learns = not hasattr(group, "rand_projs")
        layers = list(getattr(group, "layers", [group if self.learns else group.vq]))
        self.kind = KINDS[type(layers[0]).__name__]
        self.layers = nn.ModuleList(layers)
        self.heads = int(getattr(layers[0], "heads", getattr(layers[0], "num_codebooks", 1)))
        self.width = int(self.kind.table(layers[0]).shape[-1] if self.kind.table else layers[0].codebook_dim)
        self.dim = dim or self.width * self.heads
        self.codebook_sizes = tuple(int(layer.codebook_size) for layer in layers for _ in range(self.heads))
        self.project_in: nn.Module = getattr(group, "project_in", nn.Identity())
        self.project_out: nn.Module = getattr(group, "project_out", nn.Identity())
        if not self.learns:
            self.project_in, self.project_out = _random_projections(group)
        for layer in layers:
            self.kind.prepare(layer)
            if layer is group:  # `LibraryStack` applies its projections
                layer.project_in, layer.project_out = nn.Identity(), nn.Identity()
                layer.dim = self.width * self.heads
        none = torch.zeros(0)
        reach = None if layers[0] is group else getattr(group, "soft_clamp_input_value", None)
        self.register_buffer("reach", none if reach is None else reach, persistent=False)
        self.register_buffer("scales", getattr(group, "scales", none), persistent=False)
        self.register_buffer("positions", torch.arange(len(self.codebook_sizes)), persistent=False)
        self.passed = float(getattr(group, "quant_grad_frac", 0.0))
        self.codebooks = nn.ModuleList()  # one per codebook; empty if all are updated by gradient
        self._find_codebooks(kmeans_init)

    def _find_codebooks(self, kmeans_init: bool) -> None:
        """Build a `_Codebook` for each EMA codebook; levels and heads may share one."""
        found: dict[tuple[int, int], _Codebook] = {}
        for layer in self.layers:
            codebook: Any = getattr(layer, "_codebook", None)
            if not self.learns or codebook is None or not layer.moves:
                continue
            moving = codebook.ema_update or codebook.threshold_ema_dead_code or kmeans_init
            for index in [head % codebook.num_codebooks for head in range(self.heads if moving else 0)]:
                self.codebooks.append(found.setdefault((id(codebook), index), _Codebook(codebook, index, kmeans_init)))

    def _build_added(self, codebooks: Sequence[nn.Module]) -> AddedCodebooks:
        """Combine codebooks with the stack's projections."""
        starts = [head * self.width for _ in self.layers for head in range(self.heads)]
        return AddedCodebooks(codebooks, starts, self.width, self.project_in, self.project_out, self.reach)

    def _codebooks(self, live: bool) -> list[nn.Module]:
        """Build a module with `encode` and `decode` of each codebook's current state; not exportable if `live`."""
        positions = [(level, head) for level in range(len(self.layers)) for head in range(self.heads)]
        return [self._codebook(self.layers[level], level, head, live) for level, head in positions]

    @torch.no_grad()
    def _codebook(self, layer: Any, level: int, head: int, live: bool) -> nn.Module:
        if self.kind.table:
            table, cosine = self.kind.table(layer), getattr(layer, "use_cosine_sim", False)
            return (LiveTable if live else FrozenTable)(table[head % len(table)], normalize=cosine, inner=cosine)
        turns = [getattr(layer, name) for name in ("orthogonal_rot", "order") if hasattr(layer, name)]
        if not turns and not len(self.scales):
            grid: nn.Module = layer.grid
            return grid
        scale = self.scales[level] if len(self.scales) else turns[0].new_ones(self.width)
        into, out = torch.diag(1 / scale), torch.diag(scale)
        for turn in turns:
            into, out = into @ turn, turn.T @ out
        return FramedGrid(layer.grid, into, out)

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`. In training, dropped codebooks and padding have code 0."""
        kept = self.positions < n_codebooks[:, None]
        with torch.autocast(latents.device.type, enabled=False):
            learns = self.training and self.learns and torch.is_grad_enabled()
            added = self._build_added([] if learns else self._codebooks(live=True))
            inner = added.inner(latents.float())
            if learns:
                valid = prefix_mask(lengths, latents.shape[1])
                quantized = self._learn(inner, valid[..., None] & kept[:, None])
                return quantized._replace(latents=self.project_out(quantized.latents))
            with torch.no_grad():
                codes = added.search(inner)
                total = added.add(codes, kept)
            return Quantized(self.project_out(straight_through(inner, total)), codes, {}, {})

    def _learn(self, inner: Tensor, kept: Tensor) -> Quantized:
        """Run the package's layers level by level; `kept` is bool `(b, n, codebooks)`."""
        remaining, total = inner, torch.zeros_like(inner)
        measured, codes = MeasuredParts(), []
        for level, layer in enumerate(self.layers):
            scale = self.scales[level] if len(self.scales) else 1.0
            part = self._level(layer, level, remaining / scale, kept[..., level * self.heads :][..., : self.heads])
            quantized = part.latents * scale
            remaining = remaining - quantized.detach() - self.passed * (quantized - quantized.detach())
            total = total + quantized
            measured.add(part)
            codes.append(part.codes)
        metrics = measured.means()
        if len(self.codebooks):
            metrics["replaced"] = torch.stack([codebook.replaced for codebook in {*self.codebooks}]).sum()
        return Quantized(total, torch.cat(codes, 1), measured.penalties, metrics)

    def _level(self, layer: Any, level: int, given: Tensor, kept: Tensor) -> Quantized:
        """Run one layer on the residual `(b, n, width)`; `kept` is bool `(b, n, heads)`."""
        pieces, masks = torch.split(given, self.width, -1), kept.unbind(-1)
        if hasattr(layer, "_codebook"):
            pieces = tuple(layer._codebook.transform_input(piece) for piece in pieces)
        codebooks: list[Any] = list(self.codebooks[level * self.heads :][: self.heads])
        for codebook, piece, mask in zip(codebooks, pieces, masks, strict=False):
            codebook.prepare(piece.detach(), mask)
        latents, codes, penalties = self._call(layer, given, masks[0])
        for codebook, piece, code, mask in zip(codebooks, pieces, codes.unbind(1), masks, strict=False):
            codebook.gather(piece.detach(), code, mask)
        latents = latents * kept.repeat_interleave(self.width, -1)
        if self.kind.table is None:
            return Quantized(latents, codes, penalties, {})
        table, distances = self.kind.table(layer), []
        for head, (piece, code, mask) in enumerate(zip(pieces, codes.unbind(1), masks, strict=True)):
            entries = functional.embedding(code, table[head % len(table)])
            ways = (piece - entries.detach(), piece.detach() - entries)
            distances.append(torch.stack([masked_mean(way.square().mean(-1), mask) for way in ways]))
        distance = torch.stack(distances).mean(0)
        pulls = zip(("commitment", "codebook"), layer.pulls, distance, strict=True)
        penalties |= {name: weight * value for name, weight, value in pulls if weight}
        return Quantized(latents, codes, penalties, {"distance": distance[0].detach()})

    def _call(self, layer: Any, given: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Call a layer on the tokens in a mask `(b, n)`; return latents, codes and its own loss by name."""
        tokens = given[mask]
        count = len(tokens)
        if not count:  # a token of zeros, so that all ranks run the same collectives
            tokens = torch.where(mask[..., None], given, 0.0).flatten(0, 1)[:1]  # (b, n, d) -> (1, d)
        out, indices, *loss = layer(tokens[None])
        latents = torch.zeros_like(given).index_put((mask,), out[0, :count])
        codes = torch.zeros(*mask.shape, self.heads, dtype=torch.int64, device=mask.device)
        codes[mask] = indices.reshape(-1, self.heads)[:count].to(torch.int64)
        name = getattr(layer, "asks", "")
        return latents, codes.transpose(1, 2), {name: loss[0].sum() * bool(count)} if name else {}

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize level by level; see `Bottleneck.encode`."""
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
            return self._build_added(self._codebooks(live=True)).encode(latents.float())

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the entries of all codebooks; see `Bottleneck.decode`."""
        with torch.autocast(codes.device.type, enabled=False):
            return self._build_added(self._codebooks(live=True)).decode(codes)

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return copy.deepcopy(self._build_added(self._codebooks(live=False)))


def library(quantizer: str, arguments: Mapping[str, Any]) -> Bottleneck:
    """Build a bottleneck from a quantizer of vector-quantize-pytorch.

    Args:
        quantizer: Name of the class.
        arguments: Arguments of the class, by name.

    Raises:
        UserError: The class is unknown or not supported, or an argument is wrong.
    """
    package = import_module(PACKAGE)
    _check(package, quantizer, arguments)
    sizes = arguments.get("codebook_size")
    given = {**arguments, **({"codebook_size": tuple(sizes)} if isinstance(sizes, list) else {})}
    initialize = bool(given.pop("kmeans_init", False))
    try:
        made = getattr(package, quantizer)(**given)
    except (AssertionError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error) or traceback.extract_tb(error.__traceback__)[-1].line
        raise UserError(f"bottleneck.arguments: {quantizer}: {' '.join(str(reason).split())}") from error
    groups = list(getattr(made, "rvqs", [made]))
    dim = given["dim"] // len(groups) if given.get("dim") else None
    stacks = [LibraryStack(group, dim, initialize) for group in groups]
    return stacks[0] if len(stacks) == 1 else Product(stacks)


def _check(package: Any, quantizer: str, arguments: Mapping[str, Any]) -> None:
    """Check arguments against the signatures of a class and of the classes it passes them to."""
    if quantizer not in QUANTIZERS:
        reason = OTHERS.get(quantizer) or f"not a quantizer of the package; {_near(quantizer, QUANTIZERS)}"
        raise UserError(f"bottleneck.quantizer={quantizer}: {reason}")
    signatures = [inspect.signature(getattr(package, name)).parameters for name in QUANTIZERS[quantizer]]
    known = {name: each for signature in signatures[::-1] for name, each in signature.items()}
    known = {name: each for name, each in known.items() if each.kind is not each.VAR_KEYWORD}
    for name, value in arguments.items():
        if name not in known:
            raise UserError(f"bottleneck.arguments.{name}: not an argument of {quantizer}; {_near(name, known)}")
        for reason, names in REFUSED.items():
            if name in names.split() and value != known[name].default:
                raise UserError(f"bottleneck.arguments.{name}={value}: {reason}")


def _near(name: str, known: Mapping[str, Any]) -> str:
    near = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
