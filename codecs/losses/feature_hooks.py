"""Capture the outputs of a codec's named modules as feature maps while it reconstructs."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from varitok import UserError
from varitok.data.feature_map import FeatureMap

from ..bottlenecks.contract import straight_through
from ..bottlenecks.residual import Residual, Split
from ..codec import Codec
from ..result import Quantized

__all__ = ["Tap", "capture", "num_features", "resolve"]


class Tap(NamedTuple):
    """Module of a codec whose output a loss term reads: tokens `(b, n, d)`, or a grid `(b, d, *grid)`.

    Attributes:
        path: Path of the module, such as `encoder`, `bottleneck.parts.0` or `decoder.transformer.blocks.3`.
        num_codebooks: Number of leading codebooks of a residual bottleneck whose sum is read; None for the module's
            output.
    """

    path: str
    num_codebooks: int | None = None


def resolve(codec: Codec, tap: Tap) -> list[nn.Module]:
    """Return the modules whose outputs a tap reads: one, or one per codebook.

    Raises:
        UserError: The codec has no such module, or it doesn't sum that many codebooks.
    """
    module: nn.Module = codec
    passed: list[str] = []
    for part in tap.path.split("."):
        children = dict(module.named_children())
        if part not in children:
            here = ".".join(passed) or "the codec"
            raise UserError(f"objective: at={tap.path}: {here} has no part {part!r}; it has {', '.join(children)}")
        module = children[part]
        passed.append(part)
    if tap.num_codebooks is None:
        return [module]
    # The parts of a split have different widths, so only its first codebook can be read.
    levels = list(module.parts) if isinstance(module, Residual | Split) else []
    single = [len(level.codebook_sizes) == 1 for level in levels]  # type: ignore[arg-type]
    most = int(single[0]) if isinstance(module, Split) else len(levels) * all(single)
    if not 1 <= tap.num_codebooks <= most:
        reason = f"from 1 to {most}" if most else "null, since it adds up no codebooks"
        raise UserError(f"objective: at={tap.path}: num_codebooks={tap.num_codebooks} should be {reason}")
    return levels[: tap.num_codebooks]


def num_features(codec: Codec, tap: Tap) -> int:
    """Return the number of channels at a tap.

    Raises:
        UserError: The codec has no such module, or its width is unknown.
    """
    module = resolve(codec, tap)[0]
    for name in ("dim", "width", "out_features"):
        if isinstance(found := getattr(module, name, None), int):
            return found
    raise UserError(f"objective: at={tap.path}: {type(module).__name__} has no known width; give the term dim")


@contextmanager
def capture(
    codec: Codec, taps: Iterable[Tap], signal: Tensor, lengths: Tensor | None
) -> Iterator[Mapping[Tap, FeatureMap]]:
    """Capture feature maps at a codec's taps during the first forward pass within the context.

    Args:
        codec: Codec to hook.
        taps: Modules to read.
        signal: Signals to be reconstructed, `(b, c, *grid)`.
        lengths: int64 `(b,)`, valid steps of the first axis; None for all.
    """
    captured: dict[Tap, FeatureMap] = {}

    def record(tap: Tap, calls: list[tuple[Tensor, Tensor]], module: nn.Module, given: Any, output: Any) -> None:
        count = tap.num_codebooks or 1
        if len(calls) < count:  # codebooks may share one module, which then runs `count` times
            calls.append((given[0], output.latents if isinstance(output, Quantized) else output))
            if len(calls) == count:
                values = calls[0][1]
                if count > 1:
                    # Straight-through once for the sum, as in the bottleneck's own output.
                    values = straight_through(calls[0][0], torch.stack([made for _, made in calls]).sum(0))
                captured[tap] = _as_feature_map(codec, tap, values, signal, lengths)

    handles = []
    for tap in dict.fromkeys(taps):
        hook = partial(record, tap, [])
        handles += [module.register_forward_hook(hook) for module in dict.fromkeys(resolve(codec, tap))]
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _as_feature_map(codec: Codec, tap: Tap, values: Tensor, signal: Tensor, lengths: Tensor | None) -> FeatureMap:
    """Reshape tokens `(b, n, d)` to a grid `(b, d, *grid)`; an output on a grid is kept.

    Raises:
        UserError: The tokens aren't on a grid over the signal.
    """
    layout, grid = codec.layout, codec.layout.grid(signal.shape[2:])
    if values.ndim == 3 and len(values) == len(signal):
        values, count = values.transpose(1, 2), math.prod(grid)  # (b, n, d) -> (b, d, n)
        within = layout.ordered and "." in tap.path and not tap.path.startswith("bottleneck")
        if within and values.shape[2] > count:
            values = values[:, :, -count:]  # the placed tokens follow the ordered ones
        elif layout.ordered:
            return FeatureMap(values, (1.0,))  # ordered tokens have no position in the signal
        if len(grid) > 1 and values.shape[2] == count:
            values = values.reshape(*values.shape[:2], *grid)  # (b, d, n) -> (b, d, *grid)
    if values.ndim != signal.ndim:
        raise UserError(f"objective: at={tap.path}: {tuple(values.shape)} isn't on a grid over the signal")
    steps = tuple(
        step * whole / count for step, whole, count in zip(layout.downsample, grid, values.shape[2:], strict=True)
    )
    valid = None if lengths is None else torch.ceil((lengths + layout.causal_pad) / steps[0]).long()
    return FeatureMap(values, steps, valid, layout.causal_pad)
