"""The balancer: a weight is a share of the gradient."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from varitok.codecs.discriminators.spectrogram import SpectrogramDiscriminator
from varitok.codecs.losses.adversarial import Adversarial
from varitok.codecs.losses.balancer import Balancer
from varitok.codecs.losses.contract import SignalTerm
from varitok.codecs.losses.objective import Objective
from varitok.codecs.losses.pixel import L1, L2


class Pull(SignalTerm):
    """A term whose gradient points along one direction of each sample, of any size."""

    def __init__(self, index, scale):
        super().__init__()
        self.index, self.scale = index, scale

    def forward(self, fake, real, lengths):
        return self.scale * fake[:, 0, self.index].mean()


def pulls(scales, weights, balancer):
    terms = {
        name: {"weight": weight, "module": Pull(index, scale)}
        for index, (name, weight, scale) in enumerate(zip("abc", weights, scales, strict=True))
    }
    return Objective(terms, balancer=balancer)


def gradient(objective, b=4):
    fake = torch.zeros(b, 1, 3, requires_grad=True)
    total, _ = objective(fake, torch.zeros_like(fake), torch.full((b,), 3))
    total.backward()
    return fake.grad


@pytest.mark.parametrize("scales", [(1.0, 1.0, 1.0), (1e-4, 1.0, 1e5), (-3.0, 0.1, 700.0)])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 2.0), (6.0, 3.0, 1.0)])
def test_shares_of_the_gradient_are_the_weights_whatever_the_terms_scale(scales, weights):
    objective = pulls(scales, weights, Balancer(total=2.0))
    for _ in range(3):
        got = gradient(objective)
    expected = torch.tensor(weights) / sum(weights) * 2.0 * torch.tensor(scales).sign() / 4
    torch.testing.assert_close(got[:, 0], expected.expand(4, 3))


def test_a_samples_push_does_not_depend_on_the_batch():
    """The mean over the batch, as every term is: four times the batch, a quarter each."""
    small, large = (gradient(pulls((5.0, 1.0, 0.1), (1.0, 1.0, 1.0), Balancer()), b) for b in (2, 8))
    torch.testing.assert_close(small[0] / 4, large[0])


def test_norms_are_followed_slowly_and_without_what_they_began_with():
    objective = pulls((4.0, 1.0, 1.0), (1.0, 1.0, 1.0), Balancer(decay=0.9))
    torch.testing.assert_close(gradient(objective)[0, 0, 0].item(), 1 / 3 / 4)
    objective.terms["a"].scale = 8.0  # twice the norm: at first nearly twice the push
    average = (0.9 * 0.1 * 4 + 0.1 * 8) / (0.9 * 0.1 + 0.1)
    torch.testing.assert_close(gradient(objective)[0, 0, 0].item(), 8 / average / 3 / 4)
    for _ in range(100):
        last = gradient(objective)
    torch.testing.assert_close(last[0, 0, 0].item(), 1 / 3 / 4, atol=1e-4, rtol=0)


def test_norms_survive_a_resume():
    one, other = (pulls((4.0, 1.0, 1.0), (1.0, 1.0, 1.0), Balancer(decay=0.9)) for _ in range(2))
    for scale in (4.0, 50.0):
        one.terms["a"].scale = scale
        gradient(one)
    other.terms["a"].scale = 50.0
    other.load_state_dict(one.state_dict())
    torch.testing.assert_close(gradient(one), gradient(other), atol=0, rtol=0)
    assert not torch.equal(gradient(pulls((50.0, 1.0, 1.0), (1.0, 1.0, 1.0), Balancer(decay=0.9))), gradient(other))


def test_the_value_is_the_weighted_sum_and_evaluation_leaves_no_trace():
    terms = {"l1": {"weight": 2.0, "module": L1()}, "l2": {"weight": 0.5, "module": L2()}}
    real, lengths = torch.rand(2, 1, 50), torch.tensor([50, 20])
    fake = torch.rand(2, 1, 50)
    plain, values = Objective(terms)(fake, real, lengths)
    balanced = Objective(terms, balancer=Balancer())
    before = {name: value.clone() for name, value in balanced.state_dict().items()}
    total, again = balanced(fake, real, lengths)
    torch.testing.assert_close(total, plain)
    assert values.keys() == again.keys()
    assert all(torch.equal(value, before[name]) for name, value in balanced.state_dict().items())
    trained, _ = balanced(fake.requires_grad_(), real, lengths)
    torch.testing.assert_close(trained.detach(), plain)
    assert any(not torch.equal(value, before[name]) for name, value in balanced.state_dict().items())


def test_without_it_nothing_changes():
    terms = {"l1": {"weight": 2.0, "module": L1()}, "l2": {"weight": 0.5, "module": L2()}}
    fake, real, lengths = torch.rand(2, 1, 50, requires_grad=True), torch.rand(2, 1, 50), torch.tensor([50, 20])
    objective = Objective(terms)
    total, _ = objective(fake, real, lengths)
    plain = 2 * L1()(fake, real, lengths) + 0.5 * L2()(fake, real, lengths)
    torch.testing.assert_close(total, plain, atol=0, rtol=0)
    torch.testing.assert_close(*(torch.autograd.grad(one, fake)[0] for one in (total, plain)), atol=0, rtol=0)
    assert not objective.state_dict()


def test_the_discriminators_word_is_balanced_from_when_it_is_heard():
    """Its losses join by name; the shares are of active terms, and its late average is not dragged by zeros."""
    torch.manual_seed(0)
    adversarial = Adversarial(SpectrogramDiscriminator((64,), width=4), weight=3.0, features=3.0, head_start=2)
    terms = {"l1": {"weight": 1.0, "module": L1()}, "logged": {"weight": 0.0, "module": L2()}}
    objective = Objective(terms, adversarial, Balancer())
    real, lengths = torch.randn(2, 1, 400), torch.tensor([400, 300])
    fake = torch.randn(2, 1, 400, requires_grad=True)

    def push(update):
        total, values = objective(fake, real, lengths, update)
        return torch.autograd.grad(total, fake)[0], values

    alone, values = push(0)
    assert set(values) == {"l1", "logged"}
    torch.testing.assert_close(2 * alone.flatten(1).norm(dim=1).mean().item(), 1.0, atol=1e-4, rtol=0)
    both, values = push(2)
    assert set(values) == {"l1", "logged", "adversarial", "features"}
    others = both - alone / 7
    direct = adversarial.codec_losses(fake, real, lengths)
    parts = [torch.autograd.grad(loss, fake, retain_graph=True)[0] for loss in direct.values()]
    expected = sum(3 / 7 * part / (2 * part.flatten(1).norm(dim=1).mean()) for part in parts)
    torch.testing.assert_close(others, expected, atol=1e-6, rtol=1e-3)
    assert all(parameter.grad is None for parameter in adversarial.parameters())


def _uneven():
    """Terms of a size of their own for every sample, so that a batch's halves differ."""
    random = torch.Generator().manual_seed(0)
    return torch.randn(4, 1, 6, generator=random), torch.randn(4, 1, 6, generator=random), torch.tensor([6, 2, 5, 3])


def _balanced(rows):
    terms = {"l1": {"weight": 2.0, "module": L1()}, "l2": {"weight": 1.0, "module": L2()}}
    objective = Objective(terms, balancer=Balancer(decay=0.5))
    fake, real, lengths = (part[rows] for part in _uneven())
    for scale in (1.0, 3.0):
        fake = (scale * fake.detach()).requires_grad_()
        objective(fake, real, lengths)[0].backward()
    return fake.grad, objective.state_dict()


def _worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(_balanced(slice(2 * rank, 2 * rank + 2)), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_do_what_one_does_at_the_same_global_batch(tmp_path):
    mp.spawn(_worker, (str(tmp_path),), nprocs=2)
    (first, state), (second, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    whole, expected = _balanced(slice(None))
    # Half of each: DistributedDataParallel averages over processes.
    torch.testing.assert_close(torch.cat([first, second]) / 2, whole)
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value)
        assert torch.equal(state[name], other[name])
