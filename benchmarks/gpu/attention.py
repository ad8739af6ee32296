"""Forward and backward of attention under the masks that codecs may give it."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from .report import Report, Row
from .timing import medians, peak_memory

__all__ = ["measure"]

WIDTH = 64  # of a head
HIDING_NOTHING = ((128, 12, 320), (64, 16, 512))  # samples, heads, tokens: TiTok-B's encoder, TiTok-L's
CLIPS = ((8, 12, 16, 256), (1, 12, 13, 1680))  # samples, heads, frames, tokens a frame: BSQ-ViT's, LanDiff's


def measure(report: Report, device: str, tiny: bool) -> None:
    """Time a mask that hides nothing against none, and block-causal ones dense, as blocks, and left out."""
    for batch, heads, tokens in ((2, 2, 32),) if tiny else HIDING_NOTHING:
        with report.case("attention", f"{batch} x {heads} x {tokens}") as row:
            shown = torch.ones(batch, 1, 1, tokens, dtype=torch.bool, device=device)
            _compare(row, _inputs(batch, heads, tokens, device), {"hides nothing": partial(_step, mask=shown)}, device)
    for batch, heads, frames, frame in ((1, 2, 3, 16),) if tiny else CLIPS:
        with report.case("attention", f"{batch} x {heads} x {frames * frame}, causal by frame of {frame}") as row:
            forms = _causal_by_frame(frames * frame, frame, device)
            _compare(row, _inputs(batch, heads, frames * frame, device), forms, device)


def _causal_by_frame(tokens: int, frame: int, device: str) -> dict[str, Callable[..., None]]:
    """Return forms of attention from each frame to itself and to those before it."""
    place = torch.arange(tokens, device=device) // frame
    forms = {"dense mask": partial(_step, mask=(place[:, None] >= place)[None, None])}
    if device == "cuda":  # on a CPU it has no backward pass
        blocks = create_block_mask(
            lambda b, h, i, j: i // frame >= j // frame, None, None, tokens, tokens, device=device
        )
        flex = torch.compile(flex_attention)
        forms["FlexAttention"] = lambda q, k, v: flex(q, k, v, block_mask=blocks).sum().backward()
    return forms


def _inputs(batch: int, heads: int, tokens: int, device: str) -> list[Tensor]:
    size = (batch, heads, tokens, WIDTH)
    return [torch.randn(size, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]


def _step(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> None:
    scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()


def _compare(row: Row, inputs: list[Tensor], forms: dict[str, Callable[..., None]], device: str) -> None:
    """Add each form's milliseconds, its memory, and its time relative to that without a mask."""
    runs = {name: partial(form, *inputs) for name, form in {"none": _step, **forms}.items()}
    took = medians(runs, device, rounds=7)
    for name, run in runs.items():
        row[f"{name}, ms"] = took[name]
        if device == "cuda":
            row[f"{name}, GiB"] = peak_memory(run)
        if name != "none":
            row[f"{name} / none"] = took[name] / took["none"]
