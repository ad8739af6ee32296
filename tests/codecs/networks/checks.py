"""What every pair of an encoder and a decoder of sounds keeps: the checks that their tests share."""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Pair = tuple[Any, Any]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def paint(decoder: Any, latents: Tensor, mask: Tensor | None = None) -> Tensor:
    """Decode latents of sounds."""
    painted: Tensor = decoder(latents, mask, [latents.shape[1]])
    return painted


def sound(encoder: Any, batch: int, tokens: int, channels: int = 1) -> Tensor:
    return torch.randn(batch, channels, tokens * encoder.downsample[0])


def folded(module: nn.Module) -> nn.Module:
    """Make weight norm's weights plain, as export does."""
    for part in module.modules():
        for name in list(getattr(part, "parametrizations", [])):
            parametrize.remove_parametrizations(part, name, leave_parametrized=True)
    return module.requires_grad_(False)


@torch.no_grad()
def check_lengths(pair: Pair, tokens: int, channels: int = 1) -> None:
    encoder, decoder = pair
    signal = sound(encoder, 2, tokens, channels)
    latents = encoder(signal)
    assert latents.shape == (2, tokens, encoder.width)
    assert paint(decoder, latents).shape == signal.shape
    assert paint(decoder, latents, torch.ones(2, tokens, dtype=torch.bool)).shape == signal.shape
    assert encoder.downsample == decoder.downsample


@torch.no_grad()
def check_padding(pair: Pair, lengths: list[int], garbage: float, channels: int = 1) -> None:
    """A padded batch is its single items, whatever the padding holds, and its padding comes out silent."""
    encoder, decoder = pair
    hop = encoder.downsample[0]
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    signal = sound(encoder, len(lengths), max(lengths), channels)
    signal = torch.where(mask.repeat_interleave(hop, 1)[:, None], signal, torch.tensor(garbage))
    latents = encoder(signal, mask)
    painted = paint(decoder, torch.where(mask[..., None], latents, torch.tensor(garbage)), mask)
    for item, length in enumerate(lengths):
        alone = encoder(signal[item : item + 1, :, : length * hop])
        torch.testing.assert_close(latents[item : item + 1, :length], alone, **CLOSE)
        torch.testing.assert_close(painted[item : item + 1, :, : length * hop], paint(decoder, alone), **CLOSE)
        assert not painted[item, :, length * hop :].any()


@torch.no_grad()
def check_causal(pair: Pair, cut: int, channels: int = 1) -> None:
    """What comes after a cut changes nothing before it, and something behind it."""
    encoder, decoder = pair
    cut = max(cut, encoder.first_steps, decoder.first_steps)
    hop = encoder.downsample[0]
    signal = sound(encoder, 1, 6, channels)
    other = signal.clone()
    other[..., cut * hop :] = torch.randn_like(other[..., cut * hop :])
    one, two = encoder(signal), encoder(other)
    torch.testing.assert_close(one[:, :cut], two[:, :cut], atol=1e-6, rtol=1e-6)
    assert not torch.allclose(one[:, cut], two[:, cut])
    changed = one.clone()
    changed[:, cut:] += torch.randn_like(changed[:, cut:])
    first, second = paint(decoder, one), paint(decoder, changed)
    torch.testing.assert_close(first[..., : cut * hop], second[..., : cut * hop], atol=1e-6, rtol=1e-6)
    after = slice(cut * hop, (cut + 1) * hop)
    assert not torch.allclose(first[..., after], second[..., after])


def check_script(pair: Pair, channels: int = 1) -> None:
    encoder, decoder = (folded(network) for network in pair)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read, back = (torch.jit.freeze(torch.jit.script(network)) for network in (encoder, decoder))
    for tokens in (4, 1, 7):
        mask = torch.arange(tokens) < torch.tensor([[tokens], [1]])
        signal = sound(encoder, 2, tokens, channels)
        latents = encoder(signal)
        torch.testing.assert_close(read(signal), latents, **CLOSE)
        torch.testing.assert_close(paint(back, latents), paint(decoder, latents), **CLOSE)
        torch.testing.assert_close(read(signal, mask), encoder(signal, mask), **CLOSE)
        torch.testing.assert_close(paint(back, latents, mask), paint(decoder, latents, mask), **CLOSE)


class _Around(nn.Module):
    """A decoder that finds out the grid by itself."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, latents: Tensor) -> Tensor:
        return paint(self.decoder, latents)


def _session(network: nn.Module, example: Tensor, axes: dict[int, str]) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            network, (example,), dynamic_shapes=(axes,), opset_version=20, dynamo=True, verbose=False
        )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


def check_onnx(pair: Pair, channels: int = 1) -> None:
    """Both directions export with a free batch and a free time, and give the same."""
    encoder, decoder = (folded(network) for network in pair)
    read = _session(encoder, sound(encoder, 2, 5, channels), {0: "batch", 2: "samples"})
    back = _session(_Around(decoder), torch.randn(2, 5, encoder.width), {0: "batch", 1: "tokens"})
    for batch, tokens in ((1, 1), (3, 7)):
        signal = sound(encoder, batch, tokens, channels)
        latents = encoder(signal)
        torch.testing.assert_close(read(signal), latents, **CLOSE)
        torch.testing.assert_close(back(latents), paint(decoder, latents), **CLOSE)
