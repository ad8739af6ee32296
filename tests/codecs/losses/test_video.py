"""Terms and discriminators of clips: what they see, and that padding is none of it."""

import pytest
import torch
from torch import nn
from torchvision.models.optical_flow import raft_small

from varitok import UserError
from varitok.codecs.discriminators.clip import ClipDiscriminator, FrameDiscriminator
from varitok.codecs.discriminators.patch import PatchDiscriminator
from varitok.codecs.losses import flow, frames
from varitok.codecs.losses.adversarial import Adversarial
from varitok.codecs.losses.contract import Guidance
from varitok.codecs.losses.pixel import L1

NETS = {
    "clip": lambda: ClipDiscriminator(width=4, layers=2),
    "frames": lambda: FrameDiscriminator(PatchDiscriminator(width=4, layers=2)),
}


def _pair(b=3, t=7, side=16):
    random = torch.Generator().manual_seed(0)
    real = torch.rand(b, 3, t, side, side, generator=random) * 2 - 1
    return (real + 0.3 * torch.randn(real.shape, generator=random)).requires_grad_(), real, torch.full((b,), t)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_each_frame_compares_every_valid_frame_as_one_image():
    fake, real, _ = _pair()
    lengths = torch.tensor([1, 7, 2])
    pairs = [(fake[i, :, j], real[i, :, j]) for i, k in enumerate(lengths.tolist()) for j in range(k)]
    one = frames.PerFrame(L1())(fake, real, lengths)
    torch.testing.assert_close(one, torch.stack([(a - b).abs().mean() for a, b in pairs]).mean())


def test_some_frames_are_drawn_anew_each_time():
    fake, real, lengths = _pair(t=9)
    seen = []

    class Seen(nn.Module):
        def forward(self, fake, real, lengths):
            seen.append(real)
            return (fake - real).abs().mean()

    some = frames.PerFrame(Seen(), 4)
    for _ in range(5):
        some(fake, real, lengths)
    assert {len(images) for images in seen} == {4}
    assert not all(torch.equal(images, seen[0]) for images in seen)
    # Of whole clips, the same ones without reading the lengths.
    for guidance in (Guidance({}, real, lengths, {}, {}), Guidance({}, real, None, {}, {})):
        torch.manual_seed(1)
        some.compare(fake, guidance)
    assert torch.equal(seen[-1], seen[-2])


def test_temporal_difference_hears_flicker_and_no_constant_error():
    real = torch.rand(2, 3, 6, 8, 8)
    lengths, term = torch.tensor([6, 6]), frames.TemporalDifference()
    assert term(real + 0.2, real, lengths).item() == pytest.approx(0, abs=1e-6)
    flicker = 0.1 * (-1) ** torch.arange(6)[:, None, None]
    assert term(real + flicker, real, lengths).item() == pytest.approx(0.2, abs=1e-5)
    assert term(real[:, :, :1] + 1, real[:, :, :1], torch.ones(2, dtype=torch.int64)) == 0


@pytest.fixture
def raft(tmp_path, monkeypatch):
    """RAFT's file with random weights."""
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    path = tmp_path / flow.NETWORKS["small"].filename
    torch.save(raft_small(weights=None).state_dict(), path)
    return path


@pytest.mark.slow
def test_flow_consistency_pulls_motion_together(raft):
    term = flow.FlowConsistency("small", updates=2)
    fake, real, lengths = _pair(b=1, t=3, side=32)
    assert term(real, real, lengths).item() == pytest.approx(0, abs=1e-5)
    loss = term(fake, real, lengths)
    loss.backward()
    assert loss > 0 and fake.grad.isfinite().all() and fake.grad.abs().sum() > 0
    assert not list(term.parameters())
    with torch.no_grad():
        alone = term(fake[:, :, :2], real[:, :, :2], torch.tensor([2]))
        torch.testing.assert_close(term(fake, real, torch.tensor([2])), alone)
        assert term(fake[:, :, :1], real[:, :, :1], torch.tensor([1])) == 0


def test_flow_says_which_file_it_needs(raft):
    raft.write_bytes(b"broken")
    with pytest.raises(UserError, match="not torchvision's weights of RAFT"):
        flow.FlowConsistency()
    raft.unlink()
    with pytest.raises(UserError, match=r"needs the file raft_small_C_T_V2-01064c6d\.pth"):
        flow.FlowConsistency()
    with pytest.raises(UserError, match="one of small, large"):
        flow.FlowConsistency("tiny")


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("lengths", [(7, 1, 4), (2, 7, 7)])
def test_a_clip_is_judged_the_same_padded_and_alone(name, lengths):
    judge, (_, real, _) = NETS[name](), _pair(side=32)
    with torch.no_grad():
        for part in judge.parameters():
            part.normal_(std=0.2)
        together = judge(real, torch.tensor(lengths))
        for row, length in enumerate(lengths):
            for one, padded in zip(judge(real[row : row + 1, :, :length]), together, strict=True):
                valid = padded.valid[row].expand_as(padded.logits[row])
                torch.testing.assert_close(padded.logits[row][valid], one.logits[0].flatten(), rtol=1e-4, atol=1e-5)
                for feature, wide in zip(one.features, padded.features, strict=True):
                    valid = wide.valid[row].expand_as(wide.values[row])
                    found = wide.values[row].movedim(0, -1)[valid.movedim(0, -1)] if name == "clip" else None
                    if found is not None:
                        wanted = feature.values[0].movedim(0, -1).flatten()
                        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NETS)
def test_discriminators_learn_to_tell(name):
    real = torch.rand(4, 3, 5, 16, 16) * 0.5
    fake = (real + 0.5 * torch.randn_like(real)).detach().requires_grad_()
    term = Adversarial(NETS[name](), kind="hinge", weight=1.0, features=1.0)
    optimizer, lengths = torch.optim.Adam(term.parameters(), 3e-3), torch.tensor([5, 5, 3, 1])
    losses = []
    for _ in range(30):
        loss, _ = term.discriminator_loss(fake, real, lengths)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    sum(term.codec_losses(fake, real, lengths).values()).backward()
    assert fake.grad[:, :, 0].abs().sum() > 0
    assert fake.grad[3, :, 1:].abs().sum() == 0  # padding gets no gradient
