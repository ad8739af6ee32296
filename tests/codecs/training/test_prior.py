"""The prior sees only earlier symbols, and its exact form has the same numbers however it is called."""

import pytest
import torch

from varitok import UserError
from varitok.codecs.build import build
from varitok.codecs.networks.code_prior import Prior
from varitok.codecs.training.callbacks.prior_bits import order_zero

SIZES, PLACES, SOURCES, WINDOW = [8, 5, 8], 6, 2, 7


@pytest.fixture
def prior():
    torch.manual_seed(0)
    made = Prior(SIZES, PLACES, SOURCES, width=16, depth=2, heads=2, window=WINDOW)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return made


def contexts(batch, count, seed=1):
    chance = torch.Generator().manual_seed(seed)
    tops = [len(SIZES), PLACES, *[1 + sum(SIZES)] * SOURCES]
    return torch.stack([torch.randint(0, top, (batch, count), generator=chance) for top in tops], dim=-1)


def start(prior, batch):
    return prior.head.weight.new_zeros(batch, *prior.state_shape)


@torch.no_grad()
def test_the_exact_form_is_close_to_what_was_trained(prior):
    seen = contexts(3, 40)
    trained, _ = prior(seen, start(prior, 3))
    exact = prior.exact()
    found, _ = exact(seen, start(exact, 3))
    assert torch.equal(found, found.round()) and found.dtype == torch.float64
    assert (found / 64 - trained).abs().max() < 0.05 < trained.std()
    assert not prior.rounds and prior.head.weight.dtype == torch.float32, "the trained one stays what it is"


@torch.no_grad()
@pytest.mark.parametrize("each", [1, 3, 40])
def test_the_exact_form_is_the_same_in_parts_in_batches_and_with_other_threads(prior, each):
    exact, seen = prior.exact(), contexts(3, 40)
    whole, after = exact(seen, start(exact, 3))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for row in range(3):
            state, parts = start(exact, 1), []
            for part in torch.split(seen[row : row + 1], each, dim=1):
                logits, state = exact(part, state)
                parts.append(logits)
            assert torch.equal(torch.cat(parts, dim=1)[0], whole[row]) and torch.equal(state[0], after[row])
    finally:
        torch.set_num_threads(threads)


@torch.no_grad()
def test_no_symbol_sees_those_behind_it_or_beyond_the_window(prior):
    seen = contexts(1, 40)
    other = seen.clone()
    other[:, 20:] = contexts(1, 20, seed=2)
    one, two = (prior(each, start(prior, 1))[0] for each in (seen, other))
    assert torch.equal(one[:, :20], two[:, :20]) and not torch.equal(one[:, 20], two[:, 20])
    other = seen.clone()
    other[:, 5] = contexts(1, 1, seed=3)[:, 0]
    reach = 5 + 2 * (WINDOW - 1)  # of two layers
    one, two = (prior(each, start(prior, 1))[0] for each in (seen, other))
    assert torch.equal(one[:, reach + 1 :], two[:, reach + 1 :]) and not torch.equal(one[:, 5:], two[:, 5:])


@torch.no_grad()
@pytest.mark.parametrize("each", [1, 4, 39])
def test_no_symbol_of_a_group_sees_another_wherever_calls_begin(each):
    torch.manual_seed(0)
    prior = Prior(SIZES, PLACES, SOURCES, width=16, depth=2, heads=2, window=WINDOW, order="delayed")
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    exact = prior.exact()
    behind = (torch.arange(39) % 3).expand(2, -1)[..., None]  # groups of three
    seen = contexts(2, 39)
    seen = torch.cat([seen[..., :2], behind, seen[..., 2:]], dim=2)
    whole = exact(seen, start(exact, 2))[0]
    state, parts = start(exact, 2), []
    for part in torch.split(seen, each, dim=1):
        logits, state = exact(part, state)
        parts.append(logits)
    assert torch.equal(torch.cat(parts, dim=1), whole)
    other = seen.clone()
    other[:, 20, 3] = (other[:, 20, 3] + 1) % (1 + sum(SIZES))
    changed = (exact(other, start(exact, 2))[0] != whole).any(dim=(0, 2))
    assert changed.nonzero()[:2].flatten().tolist() == [20, 21], "18 to 20 are a group, 21 begins the next"


def test_nats_are_of_the_symbols_kind_alone(prior):
    seen = contexts(2, 30)
    kinds = torch.tensor([0, 8, 13])[seen[..., 0]]
    sizes = torch.tensor(SIZES)[seen[..., 0]]
    total = sum((-prior.nats(seen, kinds + symbol % sizes)).exp() * (symbol < sizes) for symbol in range(8))
    torch.testing.assert_close(total, torch.ones(2, 30))
    untrained = Prior(SIZES, PLACES, SOURCES, width=16, depth=1, heads=2, window=WINDOW)
    torch.testing.assert_close(untrained.nats(seen, kinds), sizes.float().log())


def test_order_zero_is_the_surprise_at_what_was_counted():
    nats = order_zero(torch.tensor([0, 2, 5, 0, 0]), [3, 2])
    torch.testing.assert_close(nats.exp(), torch.tensor([10 / 1, 10 / 3, 10 / 6, 2.0, 2.0], dtype=torch.float64))


def test_an_unknown_order_is_one_line():
    with pytest.raises(UserError, match=r"^prior.order=reversed: must be serial or delayed$"):
        Prior(SIZES, PLACES, SOURCES, order="reversed")


@pytest.mark.parametrize(("option", "value"), [("heads", 0), ("window", 1), ("depth", -1), ("width", 1)])
def test_numbers_out_of_range_are_refused(option, value):
    form = {"sizes": SIZES, "places": PLACES, "sources": SOURCES, "width": 16, "heads": 2, option: value}
    with pytest.raises(UserError, match=rf"\.{option}={value}: must be"):
        build({"_target_": "varitok.codecs.networks.code_prior.Prior", **form})
