"""Transformers and recurrent layers on sequences, and the codecs of patches that are made of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.networks.layers.recurrent import Recurrent
from varitok.codecs.networks.layers.sequence import SequenceTransformer
from varitok.codecs.networks.patch_codec import PatchDecoder, PatchEncoder

from ..checks import check_causal, check_lengths, check_onnx, check_padding, check_script

PLAIN = {"width": 3, "base": 8, "patch": 5, "strides": [1, 2], "depths": [1, 2], "heads": 2, "layer_scale": 1.0}
CODECS = {
    "taae": PLAIN | {"window": 3},
    "stereo": PLAIN | {"channels": 2, "gated": False, "qk_norm": False, "window": None},
    "causal": PLAIN | {"causal": True, "window": 3},
}
CHANNELS = {"stereo": 2}
MIDDLES = {
    "all": {},
    "window": {"window": 2},
    "causal": {"causal": True},
    "causal_window": {"causal": True, "window": 3, "qk_norm": True, "gated": True},
}


def codec(kind: str) -> tuple[PatchEncoder, PatchDecoder]:
    torch.manual_seed(0)
    return PatchEncoder(**CODECS[kind]).eval(), PatchDecoder(**CODECS[kind]).eval()  # type: ignore[arg-type]


def middle(kind: str, depth: int = 2) -> nn.Module:
    torch.manual_seed(0)
    if kind.startswith("lstm"):
        return Recurrent(8, depth, bidirectional=kind == "lstm_both").eval()
    return SequenceTransformer(8, depth, 2, layer_scale=1.0, **MIDDLES[kind]).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", CODECS)
@settings(max_examples=4)
@given(tokens=st.integers(1, 9))
def test_lengths_are_exact(kind: str, tokens: int) -> None:
    check_lengths(codec(kind), tokens, CHANNELS.get(kind, 1))


@pytest.mark.parametrize("kind", CODECS)
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 6), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_padded_batch_is_its_single_items(kind: str, lengths: list[int], garbage: float) -> None:
    check_padding(codec(kind), lengths, garbage, CHANNELS.get(kind, 1))


@settings(max_examples=6)
@given(cut=st.integers(1, 5))
def test_a_causal_codec_does_not_see_what_comes(cut: int) -> None:
    check_causal(codec("causal"), cut)


@pytest.mark.parametrize("kind", CODECS)
def test_they_script(kind: str) -> None:
    check_script(codec(kind), CHANNELS.get(kind, 1))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CODECS)
def test_they_export(kind: str) -> None:
    check_onnx(codec(kind), CHANNELS.get(kind, 1))


def reach(network: nn.Module, n: int) -> Tensor:
    """Return which steps each step's output depends on, bool `(n, n)`."""
    x = torch.randn(1, n, 8, requires_grad=True)
    y = network(x)
    rows = [torch.autograd.grad(y[0, step].sum(), x, retain_graph=True)[0][0].abs().sum(1) > 0 for step in range(n)]
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [*MIDDLES, "lstm", "lstm_both"])
@settings(max_examples=5)
@given(n=st.integers(1, 9))
def test_a_step_depends_on_what_it_may(kind: str, n: int) -> None:
    places = torch.arange(n)
    back = places[:, None] - places
    expected = {
        "all": torch.ones(n, n, dtype=torch.bool),
        "window": back.abs() < 2,
        "causal": back >= 0,
        "causal_window": (back >= 0) & (back < 3),
        "lstm": back >= 0,
        "lstm_both": torch.ones(n, n, dtype=torch.bool),
    }
    assert torch.equal(reach(middle(kind, depth=1), n), expected[kind])


@pytest.mark.parametrize("kind", [*MIDDLES, "lstm", "lstm_both"])
@settings(max_examples=4)
@given(lengths=st.lists(st.integers(1, 7), min_size=2, max_size=3), garbage=st.floats(-3, 3))
def test_a_middle_of_a_padded_batch_is_its_single_items(kind: str, lengths: list[int], garbage: float) -> None:
    network = middle(kind)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    x = torch.where(mask[..., None], torch.randn(*mask.shape, 8), torch.tensor(garbage))
    y = network(x, mask)
    assert y.isfinite().all()
    for item, length in enumerate(lengths):
        alone = network(x[item : item + 1, :length])
        torch.testing.assert_close(y[item : item + 1, :length], alone, atol=1e-5, rtol=1e-5)


def test_only_differences_of_places_matter() -> None:
    """What streaming stands on: within a window, a sequence shifted is the output shifted."""
    network = middle("causal_window", depth=1)
    x = torch.randn(1, 9, 8)
    torch.testing.assert_close(network(x)[:, 4:], network(x[:, 2:])[:, 2:], atol=1e-5, rtol=1e-5)


def test_places_matter() -> None:
    network = middle("all", depth=1)
    x = torch.randn(1, 5, 8)
    turned = network(x.flip(1)).flip(1)
    assert not torch.allclose(network(x), turned, atol=1e-3)


def test_layer_scale_starts_near_the_identity() -> None:
    x = torch.randn(1, 5, 8)
    torch.testing.assert_close(SequenceTransformer(8, 2, 2, layer_scale=0.0)(x), x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning")
@pytest.mark.parametrize("kind", [*MIDDLES, "lstm", "lstm_both"])
def test_middles_script(kind: str) -> None:
    network = middle(kind)
    with torch.no_grad():
        scripted = torch.jit.script(network)
        for n in (5, 1, 3):
            x, mask = torch.randn(2, n, 8), torch.arange(n) < torch.tensor([[n], [1]])
            torch.testing.assert_close(scripted(x), network(x))
            torch.testing.assert_close(scripted(x, mask), network(x, mask))


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: SequenceTransformer(6, 1, 2), "width=6"),
        (lambda: Recurrent(5, 1, bidirectional=True), "width=5"),
        (lambda: PatchEncoder(**(PLAIN | {"depths": [1]})), "2 strides and 1 depths"),
        (lambda: PatchDecoder(**(PLAIN | {"depths": [], "strides": []})), "at least one"),
    ],
)
def test_mistakes_are_told(make, told: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UserError, match=told):
        make()
