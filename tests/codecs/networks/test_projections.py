"""Maps between the networks and the bottleneck that aren't linear: attention, and a branch for each part."""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.projections import AttentionProjection, BranchedProjection, Projection
from varitok.codecs.networks.register_vit import RegisterDecoder, RegisterEncoder

MAKES = [partial(AttentionProjection, heads=2), partial(BranchedProjection, parts=3, depth=1, heads=2)]


@torch.no_grad()
@pytest.mark.parametrize("make", MAKES)
def test_tokens_see_all_valid_tokens_and_no_padding(make: Callable[[int, int], Projection]) -> None:
    torch.manual_seed(0)
    project, x, lengths = make(8, 6).eval(), torch.randn(2, 6, 8), torch.tensor([6, 2])
    found = project(x, lengths, [3, 2])
    assert found.shape == (2, 6, 6)
    torch.testing.assert_close(found[:1], project(x[:1], None, [3, 2]))
    torch.testing.assert_close(found[1:, :2], project(x[1:, :2], None, [1, 2]))
    x[:, 5] += torch.randn(8)
    changed = (project(x, lengths, [3, 2]) - found).abs().amax(2) > 1e-5
    assert changed[0].all() and not changed[1, :2].any()


def test_a_part_depends_on_its_own_branch_alone() -> None:
    project = BranchedProjection(8, 6, parts=3, depth=1, heads=2)
    project(torch.randn(2, 4, 8), None, [2, 2])[..., 2:4].square().sum().backward()
    learning = {name.split(".")[1] for name, weight in project.named_parameters() if weight.grad.any()}
    assert learning == {"1"}


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match="heads=3 should divide 8, the larger of both widths"):
        AttentionProjection(8, 6, heads=3)
    with pytest.raises(UserError, match="parts=4 should divide 6, the bottleneck's width"):
        BranchedProjection(8, 6, parts=4, depth=1, heads=2)
    sizes = {"image_size": 16, "patch": 8, "tokens": 4, "width": 8, "depth": 1, "heads": 2}
    parts = (RegisterEncoder(**sizes), FiniteScalarQuantizer([4, 4]), RegisterDecoder(**sizes))
    with pytest.raises(UserError, match="project_in and project_out are for images on a grid; give null"):
        Codec(*parts, LengthPolicy(Full(), Truncate()), project_out=MAKES[0])
