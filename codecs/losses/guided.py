"""Terms that a teacher guides: a frozen network's features of the signal, held against what goes on in the codec."""

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


class _Headed(LossTerm):
    """One that looks at a place in the codec through a linear map, which trains with the codec.

    The map belongs to the training: checkpoints hold it, bundles don't.

    Args:
        teacher: Its name in `objective.teachers`.
        at: Path of a module of the codec.
        num_codebooks: For a residual bottleneck: that many first codebooks; None for the module's output.
        dim: Channels of the module's output; None if the module has a known width.
    """

    def __init__(
        self, teacher: str, at: str = "bottleneck", num_codebooks: int | None = None, dim: int | None = None
    ) -> None:
        super().__init__()
        self.teacher: str = teacher
        self.at: Tap = Tap(at, num_codebooks)
        self.dim = dim

    def attend(self, codec: Codec, teachers: Mapping[str, Teacher]) -> None:
        """Make the map to the teacher's features.

        Raises:
            UserError: The codec has no such place, or doesn't know its channels.
        """
        self.head = nn.Linear(self.dim or num_features(codec, self.at), self.target_channels(teachers[self.teacher]))

    @staticmethod
    def target_channels(teacher: Teacher) -> int:
        """Count what the map gives."""
        return teacher.channels

    def read_features(self, guidance: Guidance) -> FeatureMap:
        """Return the features that were captured at the tap.

        Raises:
            UserError: It has other channels than was said.
        """
        features = guidance.inside[self.at]
        found, said = features.values.shape[1], self.head.in_features
        if found != said:
            raise UserError(f"objective: at={self.at.path} has {found} channels, not {said}; give the term dim={found}")
        return features


class Distillation(_Headed):
    """Pulls a module's output towards a teacher's features (SpeechTokenizer, Mimi, VA-VAE, GigaTok).

    The teacher's features are brought to the place's grid (`resample`), then compared at each valid step, and averaged
    over steps, sample by sample.

    Args:
        teacher: Its name in `objective.teachers`.
        at: Path of a module of the codec, such as "encoder", "bottleneck" or "decoder.transformer.blocks.2".
        num_codebooks: For a residual bottleneck: the sum of that many first codebooks; None for the module's output.
        dim: Channels of the module's output; None if the module has a known width.
        distance: "cosine" is 1 less the cosine of both vectors of a step (Mimi, arXiv 2410.00037, section 3.3.3);
            "squared" the mean squared error (X-Codec, arXiv 2408.17175, section 3); "along" the mean over channels of
            -log(sigmoid(cosine along all steps)) (SpeechTokenizer, arXiv 2308.16692, section 3.2).
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
        """Compare; see `LossTerm.compare`.

        Raises:
            UserError: The place's tokens have no grid as the teacher's features have.
        """
        found, wanted = self.read_features(guidance), guidance.target(self.teacher)
        if len(found.steps) != len(wanted.steps):
            raise UserError(
                f"objective: at={self.at.path}: its output has {len(found.steps)} axes, {self.teacher}'s features"
                f" {len(wanted.steps)}; distill into a module on the signal's grid, or contrast whole signals"
            )
        aim = resample(wanted, found).float().movedim(1, -1)
        mine: Tensor = self.head(found.values.movedim(1, -1)).float()
        valid = found.valid()
        if self.distance == "along":
            mask = valid[(...,) + (None,) * (mine.ndim - 2)]
            mine, aim = (torch.where(mask, side, 0.0).flatten(1, -2) for side in (mine, aim))
            return -functional.logsigmoid(functional.cosine_similarity(mine, aim, dim=1)).mean()
        if self.distance == "squared":
            error = (mine - aim).square().mean(-1)
        else:
            error = 1 - functional.cosine_similarity(mine, aim, dim=-1)
        return _mean(error, valid)


class Contrast(_Headed):
    """Tells each signal's own vector from those of all others in the batch of all processes (UniTok, arXiv 2502.20321).

    The mean of a module's output, through a linear map, is compared with the teacher's vector of the signal, or of
    its caption; signals without a caption are masked out.

    Args:
        teacher, at, num_codebooks, dim: See `Distillation`.
        kind: "softmax" over both directions (CLIP, arXiv 2103.00020, section 2.3), or "sigmoid" of each pair (SigLIP,
            arXiv 2303.15343, section 3.2). Scale and bias are learnt from their published starts.
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
        """Count the channels of the teacher's vector."""
        return teacher.pooled_channels or teacher.channels

    def forward(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Contrast the signals of the global batch; see `LossTerm.compare`."""
        wanted = guidance.target(self.teacher)
        aim = wanted.mean() if wanted.pooled is None else wanted.pooled
        with torch.autocast(fake.device.type, enabled=False):
            mine = functional.normalize(self.head(self.read_features(guidance).mean().float()), dim=1)
            mine = gather_rows_with_gradient(mine)
            aim = gather_rows(functional.normalize(aim.float(), dim=1))
            logits = self.scale.exp().clamp(max=100) * mine @ aim.T
            there = aim.any(1)
            count = there.sum().clamp(min=1)
            if self.kind == "softmax":
                logits = logits.masked_fill(~(there & there[:, None]), torch.finfo(logits.dtype).min)
                own = -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal() / 2
                return torch.where(there, own, 0.0).sum() / count
            sign = 2 * torch.eye(len(logits), device=logits.device) - 1
            pairs = -functional.logsigmoid(sign * (logits + self.bias))
            return torch.where(there & there[:, None], pairs, 0.0).sum() / count


class TeacherDistance(LossTerm):
    """A perceptual distance: of a teacher's features of both signals.

    Args:
        teacher: Its name in `objective.teachers`.
        distance: "cosine" is 1 less the cosine of both vectors of a step; "squared" and "absolute" are mean errors.
    """

    def __init__(self, teacher: str, distance: Literal["cosine", "squared", "absolute"] = "cosine") -> None:
        super().__init__()
        self.teacher: str = teacher
        self.distance = distance

    def forward(self, fake: Tensor, guidance: Guidance) -> Tensor:
        """Compare; see `LossTerm.compare`."""
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
