"""Attention in spans of queries, as on GPUs, and through one dense mask, as on CPUs."""

from unittest import mock

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from varitok.codecs.networks.layers import attention
from varitok.codecs.networks.layers.attention import Attention, Rotary, Span, attention_spans, near

HEADS, WIDTH = 2, 8


def attended(x: Tensor, spans: list[Span], valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs at valid tokens and the gradient of the input."""
    torch.manual_seed(1)
    layer = Attention(WIDTH, HEADS, qk_norm=True, eps=1e-5)
    x = x.clone().requires_grad_()
    turn = Rotary(WIDTH // HEADS, 100.0)(torch.arange(x.shape[1])[None, :, None])
    y = layer(x, turn, spans, False, 0, None)[valid]
    return y, torch.autograd.grad(y.square().sum(), x)[0]


@settings(max_examples=25)
@given(
    steps=st.integers(1, 9),
    frame=st.integers(1, 4),
    causal=st.booleans(),
    window=st.integers(0, 4),
    hidden=st.sets(st.integers(0, 35)),
    masked=st.booleans(),
)
def test_spans_attend_as_through_one_mask(
    steps: int, frame: int, causal: bool, window: int, hidden: set[int], masked: bool
) -> None:
    n = steps * frame
    x, mask = torch.randn(2, n, WIDTH), torch.ones(2, n, dtype=torch.bool)
    mask[1, [place for place in hidden if place < n]] = False
    with mock.patch.object(attention, "SPAN", 4):
        spans = attention_spans(n, frame, causal, window, mask if masked else None, x)
    step = torch.arange(n) // frame
    allowed = near(step, step, causal, window)[None, None]
    valid = torch.ones_like(mask)
    if masked:
        allowed = allowed & (mask[:, None, None] | torch.eye(n, dtype=torch.bool))
        # A valid token's step, or window, may hold no other valid one, but itself.
        valid = mask
    for mine, wanted in zip(attended(x, spans, valid), attended(x, [Span(0, n, 0, n, allowed)], valid), strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-4)


def test_whole_frames_need_no_mask() -> None:
    """What GPUs have their fastest kernel for: each frame's queries see a range of keys, all of it."""
    spans = attention_spans(5 * 300, 300, True, 2, None, torch.zeros(1))
    assert [span[:4] for span in spans] == [
        (frame * 300, frame * 300 + 300, max(0, frame - 1) * 300, frame * 300 + 300) for frame in range(5)
    ]
    assert all(span.allowed is None for span in spans)
