"""Moving dead leaves: the same for the same key, moving as told, different clip by clip."""

import numpy as np
import pytest
import torch

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.synthetic.images import draw_leaves, paint
from varitok.data.synthetic.video import Motion, Scenes, scenes


def test_clips_follow_from_seed_epoch_and_index() -> None:
    train, val = scenes(16, crop_tokens=3, length=4, val_length=4)[:2]
    assert train[0, 1].shape == (3, 9, 16, 16) and train[0, 1].dtype == torch.uint8
    assert torch.equal(train[2, 1], scenes(16, crop_tokens=3, length=4).train[2, 1])
    clips = [train[0, 0], train[0, 1], train[1, 0], val[0, 0], scenes(16, 3, seed=1).train[0, 0]]
    assert all(not torch.equal(one, other) for i, one in enumerate(clips) for other in clips[:i])
    assert torch.equal(val[0, 2], val[5, 2])
    with pytest.raises(IndexError):
        val[0, 4]


def test_frames_are_counted_in_latent_ones() -> None:
    assert scenes(8, crop_tokens=5, downsample=4, causal_pad=3).train[0, 0].shape[1] == 17
    assert scenes(8, crop_tokens=4, downsample=4, causal_pad=0).train[0, 0].shape[1] == 16


def test_neighbors_are_alike_and_something_moves() -> None:
    clips = torch.stack([Scenes(32, frames=9)[0, i] for i in range(12)]).float()
    step = (clips[:, :, 1:] - clips[:, :, :-1]).abs().mean((1, 2, 3, 4))
    far = (clips[:, :, 8] - clips[:, :, 0]).abs().mean((1, 2, 3))
    other = (clips - clips.roll(1, 0)).abs().mean((1, 2, 3, 4))
    assert step.mean() < 0.6 * far.mean() and far.mean() < other.mean()
    assert (step > 1).sum() >= 8  # few stand still


def test_a_moment_later_leaves_are_where_their_motion_says() -> None:
    rng = np.random.default_rng(3)
    leaves = draw_leaves(rng, 64, 6.0)
    motion = Motion(rng, len(leaves.turn), 64, 0.5)
    motion.swing[:], motion.zoom = 0, 0.0
    now, later = motion.at(leaves, 0.0), motion.at(leaves, 2.0)
    np.testing.assert_allclose(now.center, leaves.center, atol=1e-4)
    np.testing.assert_allclose(later.center - now.center, 2 * motion.velocity, atol=1e-3)
    np.testing.assert_allclose(later.turn - now.turn, 2 * motion.spin, atol=1e-5)


def test_a_slower_clip_is_the_faster_one_seen_more_often() -> None:
    slow, fast = Scenes(32, frames=3, frame_rate=4.0), Scenes(32, frames=9, frame_rate=16.0)
    assert torch.equal(slow[0, 0], fast[0, 0][:, ::4])


def test_the_ground_is_everywhere() -> None:
    data = Scenes(image_size=16)
    for index in range(40):
        leaves, motion = data.draw((0, index))
        leaves = leaves._replace(colors=np.ones_like(leaves.colors))
        assert all(paint(motion.at(leaves, seconds), data._fields, 16).min() > 0.99 for seconds in range(5))


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 4},
        {"length": 0},
        {"val_length": 0},
        {"frame_rate": 0},
        {"crop_tokens": 0},
        {"causal_pad": 20},
        {"speed": -1},
    ],
)
def test_numbers_out_of_range_are_told(wrong) -> None:
    with pytest.raises(UserError, match="must be"):
        build({"_target_": "varitok.data.synthetic.video.scenes"} | wrong)
