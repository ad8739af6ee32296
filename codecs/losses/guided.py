"""Loss terms guided by a teacher: they compare a frozen network's features of the signal with the codec's own."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from varitok import UserError
from varitok.data.feature_map import FeatureMap, resample
from varitok.data.teachers.base import Teacher

from ..codec import Codec
from ..distributed import gather_rows, gather_rows_with_gradient
from ..masking import masked_mean
from .contract import Guidance, LossTerm
from .feature_hooks import Tap, num_features

__all__ = ["Contrast", "Distillation", "TeacherDistance"]


class _Projected(LossTerm):
    """A term of one of the codec's feature maps, projected linearly to the teacher's channels.

    The projection is trained with the codec. Checkpoints include it; bundles don't.

    Args:
        teacher, at, num_codebooks, dim: See `Distillation`.
    """

    def __init__(
        self, teacher: str, at: str = "bottleneck", num_codebooks: int | None = None, dim: int | None = None
    ) -> None:
        super().__init__()
        self.teacher: str = teacher
        self.at: Tap = Tap(at, num_codebooks)
        self.dim = dim

    def bind(self, codec: Codec, teachers: Mapping[str, Teacher]) -> None:
        """Build the projection to the teacher's channels.

        Raises:
            UserError: The codec has no such module, or its width is unknown.
        """
        self.head = nn.Linear(self.dim or num_features(codec, self.at), self.target_channels(teachers[self.teacher]))

    @staticmethod
    def target_channels(teacher: Teacher) -> int:
        """Return the number of output channels of the projection."""
        return teacher.channels

    def read_features(self, guidance: Guidance) -> FeatureMap:
        """Return the features that were captured at the tap.

        Raises:
            UserError: Their number of channels isn't `dim`.
        """
        features = guidance.inside[self.at]
        found, said = features.values.shape[1], self.head.in_features
        if found != said:
            raise UserError(f"objective: at={self.at.path} has {found} channels, not {said}; give the term dim={found}")
        return features


class Distillation(_Projected):
    """Distills a teacher's features into a module of the codec (SpeechTokenizer, Mimi, VA-VAE, GigaTok).

    With p the projected features, and a the teacher's, resampled to their grid, t a valid step and c a channel:

        cosine    mean_t 1 - cos(p[t], a[t])                  (Mimi, arXiv 2410.00037, section 3.3.3)
        squared   mean_t,c (p[t, c] - a[t, c])^2              (X-Codec, arXiv 2408.17175, section 3)
        along     mean_c -log sigmoid(cos(p[:, c], a[:, c]))  (SpeechTokenizer, arXiv 2308.16692, section 3.2)

    Args:
        teacher: Name of the teacher in `objective.teachers`.
        at: Path of a module of the codec, such as "encoder", "bottleneck" or "decoder.transformer.blocks.2".
        num_codebooks: Number of leading codebooks of a residual bottleneck whose sum is distilled into; None for the
            module's output.
        dim: Channels of the module's output; None if the module has a known width.
        distance: "cosine", "squared" or "along".
    """

    def __init__(
        self,
        teacher: str,
        at: str = "bottleneck",
        num_codebooks: int | None = None,
        dim: int | None = None,
        distance: Literal["cosine", "squared", "along"] = "cosine",
    ) -> None:
        super().__init__(teacher, at, num_codebooks, dim)
        self.distance = distance

    def forward(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the distillation loss; see `LossTerm.compare`.

        Raises:
            UserError: The module's output and the teacher's features have grids of different dimensions.
        """
        found, wanted = self.read_features(guidance), guidance.target(self.teacher)
        if len(found.steps) != len(wanted.steps):
            raise UserError(
                f"objective: at={self.at.path}: its output has {len(found.steps)} axes, {self.teacher}'s features"
                f" {len(wanted.steps)}; distill into a module on the signal's grid, or contrast whole signals"
            )
        aim = resample(wanted, found).float().movedim(1, -1)  # (b, c, *grid) -> (b, *grid, c)
        mine: Tensor = self.head(found.values.movedim(1, -1)).float()  # (b, d, *grid) -> (b, *grid, c)
        valid = found.valid()
        if self.distance == "along":
            mask = valid[(...,) + (None,) * (mine.ndim - 2)]  # (b, n) -> (b, n, 1, ...)
            # (b, *grid, c) -> (b, steps, c)
            mine, aim = (torch.where(mask, side, 0.0).flatten(1, -2) for side in (mine, aim))
            return -functional.logsigmoid(functional.cosine_similarity(mine, aim, dim=1)).mean()
        if self.distance == "squared":
            error = (mine - aim).square().mean(-1)
        else:
            error = 1 - functional.cosine_similarity(mine, aim, dim=-1)
        return _mean(error, valid)


class Contrast(_Projected):
    """Contrastive loss between codec and teacher vectors, over the global batch (UniTok, arXiv 2502.20321).

    With m_i the normalized, projected mean of a module's output, a_j the teacher's normalized vector of a signal or of
    its caption, and z_ij = scale * m_i . a_j:

        softmax   mean_i -(log softmax_j(z_ij) + log softmax_j(z_ji))[j = i] / 2             (CLIP, arXiv 2103.00020)
        sigmoid   mean_i sum_j -log sigmoid(z_ij + bias if i = j else -(z_ij + bias))        (SigLIP, arXiv 2303.15343)

    Scale and bias are learned, from the papers' initial values. Signals without a caption are masked out.

    Args:
        teacher, at, num_codebooks, dim: See `Distillation`.
        kind: "softmax" (CLIP, section 2.3) or "sigmoid" (SigLIP, section 3.2).
    """

    def __init__(
        self,
        teacher: str,
        at: str = "bottleneck",
        num_codebooks: int | None = None,
        dim: int | None = None,
        kind: Literal["softmax", "sigmoid"] = "softmax",
    ) -> None:
        super().__init__(teacher, at, num_codebooks, dim)
        self.kind = kind
        self.scale = nn.Parameter(torch.tensor(math.log(1 / 0.07 if kind == "softmax" else 10.0)))
        if kind == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(-10.0))

    @staticmethod
    def target_channels(teacher: Teacher) -> int:
        """Return the number of channels of the teacher's pooled vector."""
        return teacher.pooled_channels or teacher.channels

    def forward(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the contrastive loss of the global batch; see `LossTerm.compare`."""
        wanted = guidance.target(self.teacher)
        aim = wanted.mean() if wanted.pooled is None else wanted.pooled
        with torch.autocast(fake.device.type, enabled=False):
            mine = functional.normalize(self.head(self.read_features(guidance).mean().float()), dim=1)
            mine = gather_rows_with_gradient(mine)
            aim = gather_rows(functional.normalize(aim.float(), dim=1))
            logits = self.scale.exp().clamp(max=100) * mine @ aim.T
            there = aim.any(1)  # False for a signal without a caption, whose vector is 0
            count = there.sum().clamp(min=1)
            if self.kind == "softmax":
                logits = logits.masked_fill(~(there & there[:, None]), torch.finfo(logits.dtype).min)
                own = -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2
                return torch.where(there, own, 0.0).sum() / count
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            pairs = -functional.logsigmoid(sign * (logits + self.bias))
            return torch.where(there & there[:, None], pairs, 0.0).sum() / count


class TeacherDistance(LossTerm):
    """Perceptual loss: distance between a teacher's features F of the reconstruction y and of the signal x.

        cosine: mean_t 1 - cos(F(y)[t], F(x)[t])   squared: mean (F(y) - F(x))^2   absolute: mean |F(y) - F(x)|

    Args:
        teacher: Name of the teacher in `objective.teachers`.
        distance: "cosine", "squared" or "absolute".
    """

    def __init__(self, teacher: str, distance: Literal["cosine", "squared", "absolute"] = "cosine") -> None:
        super().__init__()
        self.teacher: str = teacher
        self.distance = distance

    def forward(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Return the perceptual loss; see `LossTerm.compare`."""
        wanted = guidance.target(self.teacher)
        found: FeatureMap = guidance.teachers[self.teacher](fake, guidance.lengths)
        if self.distance == "cosine":
            error = 1 - functional.cosine_similarity(found.values, wanted.values, dim=1)
        else:
            away = found.values - wanted.values
            error = (away.square() if self.distance == "squared" else away.abs()).mean(1)
        return _mean(error, found.valid())


def _mean(error: Tensor, valid: Tensor) -> Tensor:
    """Average errors `(b, *grid)` over each sample's valid steps `(b, n)` of the first axis, then over samples."""
    return masked_mean(error.flatten(2).mean(2) if error.ndim > 2 else error, valid)
