"""Residual quantization: each level quantizes the residual of the previous ones."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Annotated

import torch
from torch import Tensor, nn

from varitok import UserError

from ..result import Quantized
from .composite import Composite, FrozenComposite, MeasuredParts
from .contract import Bottleneck, straight_through
from .product import Product

__all__ = ["Residual", "Split", "masked_channels", "residual"]


class _FrozenResidual(FrozenComposite):
    def encode(self, latents: Tensor) -> Tensor:
        remaining = latents
        codes: list[Tensor] = []
        for part in self.parts:
            found = part.encode(remaining)  # type: ignore[operator]
            remaining = remaining - part.decode(found)  # type: ignore[operator]
            codes.append(found)
        return torch.cat(codes, 1)


class _Recall:
    """Saved-tensor hooks that recompute each level's input in backward, from the latents and the codes.

    Without them every level saves its own tensor of the latents' size. Backward goes from the last level to the first,
    so that the input of a level is that of the next one plus the level's entries.
    """

    def __init__(self, latents: Tensor, levels: Sequence[Bottleneck]) -> None:
        self.latents, self.levels = latents.detach(), levels
        self.codes: list[Tensor] = []
        self.given = self.latents  # input of the current level in forward, of level `at` in backward
        self.at = -1

    def pack(self, saved: Tensor) -> Tensor | tuple[int, torch.Size]:
        """Return the level's index and the shape in place of the level's input; other tensors unchanged."""
        if not self.codes or saved.data_ptr() != self.given.data_ptr() or saved.numel() != self.given.numel():
            return saved
        return len(self.codes), saved.shape

    def unpack(self, kept: Tensor | tuple[int, torch.Size]) -> Tensor:
        """Return the saved tensor, recomputed if it is a level's input."""
        if isinstance(kept, Tensor):
            return kept
        level, shape = kept
        with torch.no_grad():
            if not 0 <= level <= self.at:
                self.at, self.given = level, self.latents.clone()
                for index in range(level):
                    self.given -= self.levels[index].decode(self.codes[index])
            while self.at > level:
                self.at -= 1
                # Add into the entries' tensor, since a level's backward may still use its input.
                entries: Tensor = self.levels[self.at].decode(self.codes[self.at])
                self.given = entries.add_(self.given)
        return self.given.view(shape)


class Residual(Composite):
    """Residual vector quantization (RVQ; SoundStream, arXiv 2107.03312, section III.C).

    `r_1 = z`, `r_(i+1) = r_i - sg(q_i)`, `z_q = z + sg(sum_i q_i - z)`. Without the stop-gradient, and with one
    straight-through estimator per level, penalties after the first level have no gradient (EnCodec's issue 25). Here
    every level's penalty reaches the latents. Penalties are summed over levels.

    Args:
        levels: Bottlenecks of equal width.

    Raises:
        UserError: The widths differ.
    """

    def __init__(self, levels: Sequence[Bottleneck]) -> None:
        super().__init__(levels[0].dim if levels else 0, levels, interleave=False)
        if any(level.dim != self.dim for level in levels):
            raise UserError(f"bottleneck: levels of one width, got {[level.dim for level in levels]}")

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            remaining = latents.float()
            total = torch.zeros_like(remaining)
            measured = MeasuredParts()
            recall = _Recall(remaining, list(self.parts))  # type: ignore[arg-type]
            exact = all(level.exact for level in recall.levels)
            hooks = torch.autograd.graph.saved_tensors_hooks(recall.pack, recall.unpack) if exact else nullcontext()
            for index in range(len(self.parts)):
                recall.given = remaining
                with hooks:
                    part, kept = self.run_part(index, remaining, lengths, n_codebooks)
                recall.codes.append(part.codes)
                total += kept.detach()
                del kept
                # Dropped codebooks are quantized too, so that the codes equal those of `encode`. A level of several
                # codebooks, whose latents may lack some of them, is therefore decoded from its codes.
                level = self.parts[index]
                whole = part.latents if len(level.codebook_sizes) == 1 else level.decode(part.codes)  # type: ignore[arg-type, operator]
                remaining = remaining - whole.detach()
                measured.add(part)
            recall.given, recall.at = remaining.detach(), len(recall.codes)
            quantized = straight_through(latents.float(), total)
        return Quantized(quantized, self.arrange(recall.codes), measured.penalties, measured.means())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize level by level; see `Bottleneck.encode`."""
        remaining, codes = latents.float(), []
        for part in self.parts:
            codes.append(part.encode(remaining))  # type: ignore[operator]
            remaining = remaining - part.decode(codes[-1])  # type: ignore[operator]
        return self.arrange(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Sum the decoded levels; see `Bottleneck.decode`."""
        total = torch.zeros(codes.shape[0], codes.shape[2], self.dim, device=codes.device)
        for index in range(len(self.parts)):
            part = self.decode_part(index, codes)
            total = total if part is None else total + part
        return total

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenResidual(self)


def residual(
    level: Callable[[], Bottleneck], num_codebooks: Annotated[int, "[1, 1000]"], shared: bool = False
) -> Residual:
    """Build a residual quantizer of equal levels.

    Args:
        level: Factory of a level.
        num_codebooks: Number of levels.
        shared: Use one module for all levels (shared codebooks; RQ-VAE, arXiv 2203.01941, section 3.1).
    """
    first = level()
    return Residual([first] * num_codebooks if shared else [first, *(level() for _ in range(num_codebooks - 1))])


def masked_channels(
    level: Callable[..., Bottleneck], dim: int, masked: int, num_codebooks: Annotated[int, "[1, 1000]"]
) -> Residual:
    """Build a residual quantizer whose first codebooks quantize disjoint channels (arXiv 2402.12208, section 3.2).

    Plain RVQ puts most of the information into codebook 1, which a language model has to predict in one step. Here the
    first `masked` codebooks quantize disjoint channels, the others the residual of all channels. The published code
    omits the masks when it encodes, so that its codes differ from those in training; here they are the same.

    Args:
        level: Factory of a level, given `dim`.
        dim: Width of the latents.
        masked: Codebooks that quantize about `dim / masked` channels each.
        num_codebooks: Number of all codebooks.
    """
    if not 1 <= masked <= min(num_codebooks, dim):
        raise UserError(
            f"bottleneck.masked={masked}: must be from 1 to num_codebooks={num_codebooks}, and at most dim={dim}"
        )
    widths = [dim // masked + (codebook < dim % masked) for codebook in range(masked)]
    first = Product([level(dim=width) for width in widths])
    return Residual([first, *(level(dim=dim) for _ in range(num_codebooks - masked))])


class _FrozenSplit(FrozenComposite):
    def __init__(self, split: "Split") -> None:
        super().__init__(split)
        self.project_in = copy.deepcopy(split.project_in)
        self.project_out = copy.deepcopy(split.project_out)

    def encode(self, latents: Tensor) -> Tensor:
        codes: list[Tensor] = []
        for part, project in zip(self.parts, self.project_in):  # noqa: B905 (TorchScript's zip is never strict)
            codes.append(part.encode(project(latents)))  # type: ignore[operator]
        return torch.cat(codes, 1)

    def decode_kept(self, codes: Tensor, kept: Tensor) -> Tensor:
        total = torch.zeros(1, device=codes.device)
        for part, project in zip(self.parts, self.project_out):  # noqa: B905
            total = total + project(part.decode_kept(codes, kept))  # type: ignore[operator]
        return total


class Split(Composite):
    """Split RVQ: a semantic quantizer in parallel to the acoustic ones (Mimi, arXiv 2410.00037, section 3.3.3).

    `z_q = O_s q_s(I_s z) + O_a q_a(I_a z)`, with linear maps I and O. Distillation into the semantic codebook therefore
    doesn't change the input of the acoustic ones.

    Args:
        semantic: Quantizer of the first codebooks, most often one.
        acoustic: Quantizer of the other codebooks, most often residual.
        dim: Width of the latents.
    """

    def __init__(self, semantic: Bottleneck, acoustic: Bottleneck, dim: int) -> None:
        super().__init__(dim, [semantic, acoustic], interleave=False)
        sides = (semantic, acoustic)
        self.project_in = nn.ModuleList(nn.Linear(dim, side.dim, bias=False) for side in sides)
        self.project_out = nn.ModuleList(nn.Linear(side.dim, dim, bias=False) for side in sides)

    def forward(self, latents: Tensor, lengths: Tensor, n_codebooks: Tensor) -> Quantized:
        """Quantize; see `Bottleneck.forward`."""
        with torch.autocast(latents.device.type, enabled=False):
            total, codes, measured = torch.zeros_like(latents, dtype=torch.float32), [], MeasuredParts()
            for index, (into, out) in enumerate(zip(self.project_in, self.project_out, strict=True)):
                part, kept = self.run_part(index, into(latents.float()), lengths, n_codebooks)
                total = total + out(kept)
                codes.append(part.codes)
                measured.add(part)
        return Quantized(total, self.arrange(codes), measured.penalties, measured.means())

    def encode(self, latents: Tensor) -> Tensor:
        """Quantize both projections; see `Bottleneck.encode`."""
        with torch.autocast(latents.device.type, enabled=False):
            pairs = zip(self.parts, self.project_in, strict=True)
            return self.arrange([part.encode(into(latents.float())) for part, into in pairs])  # type: ignore[operator]

    def decode(self, codes: Tensor) -> Tensor:
        """Sum both sides' projected latents; see `Bottleneck.decode`."""
        total = torch.zeros(codes.shape[0], codes.shape[2], self.dim, device=codes.device)
        with torch.autocast(codes.device.type, enabled=False):
            for index, out in enumerate(self.project_out):
                part = self.decode_part(index, codes)
                total = total if part is None else total + out(part)
        return total

    def thaw(self, frozen: nn.Module) -> None:
        """Take over the weights of parts and projections; see `Bottleneck.thaw`."""
        super().thaw(frozen)
        for name in ("project_in", "project_out"):
            self.get_submodule(name).load_state_dict(frozen.get_submodule(name).state_dict())

    def frozen(self) -> nn.Module:
        """Return the export form; see `Bottleneck.frozen`."""
        return _FrozenSplit(self)
