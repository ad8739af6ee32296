"""A condition modulates a block, and the first tokens other than the rest."""

import torch

from varitok.codecs.networks.layers.modulation import ModulatedBlock, time_waves


@torch.no_grad()
def test_a_block_starts_as_the_identity_and_modulates_each_part_by_itself():
    torch.manual_seed(0)
    block, x, condition = ModulatedBlock(8, 2), torch.randn(2, 5, 8), torch.randn(2, 8)
    assert torch.equal(block(x, condition, 2, None), x)
    block.modulation.bias[6 * 8 :] = 0.5  # of the rest alone
    found = block(x, condition, 2, None)
    assert torch.equal(found[:, :2], x[:, :2]) and (found[:, 2:] != x[:, 2:]).any(2).all()
    block.modulation.bias[: 6 * 8] = 0.5
    torch.testing.assert_close(block(x, condition, 2, None), block(x, condition, 5, None))
    mask = torch.tensor([[True, False, True, True, True]]).expand(2, -1)
    alone = block(x[:, [0, 2, 3, 4]], condition, 1, None)
    torch.testing.assert_close(block(x, condition, 2, mask)[:, [0, 2, 3, 4]], alone)


def test_waves_tell_times_apart():
    waves = time_waves(torch.linspace(0, 1, 101), 33)
    assert waves.shape == (101, 33) and waves.abs().max() <= 1 and not waves[:, -1].any()
    assert torch.cdist(waves, waves).add(torch.eye(101)).min() > 0.1
