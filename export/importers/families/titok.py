"""TiTok of one stage (arXiv 2406.07550; the authors' BL-64, BL-128 and SL-256), by 1d-tokenizer's tensors.

Its images are in [0, 1], ours in [-1, 1]: the first and the last convolution take that in. Its tokenizers of two stages
(L-32, B-64, S-128) end in MaskGIT's decoder, which isn't here.
"""

import math
from collections.abc import Iterator
from operator import add

import torch
from torch import Tensor

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.networks.register_vit import RegisterDecoder, RegisterEncoder

from ..derive import Derived, derive
from ..family import Family, Layout, Sizes
from ..source import Source

__all__ = ["FAMILIES"]

RENAMES = {r"\.attn\.in_proj_": ".qkv.", r"^quantize\.embedding\.weight$": "quantize.codebook"}
# Their modules of a block, and ours.
BLOCK = {
    "ln_1": "attention_norm",
    "qkv": "attention.qkv",
    "attn.out_proj": "attention.out",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.0",
    "mlp.c_proj": "mlp.2",
}
UNIT_VECTORS = 12  # dimensions of their codebooks of unit vectors; others have 64


def _shift(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the bias of a convolution of (x + 1) / 2."""
    return bias + weight.sum((1, 2, 3)) / 2


def _grid(positions: Tensor) -> Tensor:
    """Turn the positions of a class token and of patches into a table `(1, d, height, width)` of patches."""
    side = math.isqrt(positions.shape[0] - 1)
    return positions[1:].T.reshape(1, -1, side, side)


def _colors_first(tensor: Tensor) -> Tensor:
    """Reorder the outputs of the last linear map, rows, columns and colors of a patch, to colors first."""
    side = math.isqrt(tensor.shape[0] // 3)
    return tensor.reshape(side, side, 3, -1).permute(2, 0, 1, 3).reshape(tensor.shape)


def _prepare(source: Source) -> Source:
    embed, out = "encoder.patch_embed", "decoder.conv_out"
    derived = {
        f"{embed}.weight": Derived((f"{embed}.weight",), lambda weight: weight / 2),
        f"{embed}.bias": Derived((f"{embed}.weight", f"{embed}.bias"), _shift),
        "encoder.registers": Derived(("latent_tokens", "encoder.latent_token_positional_embedding"), add),
        "decoder.registers": Derived(("decoder.latent_token_positional_embedding",), torch.clone),
        "decoder.canvas": Derived(("decoder.mask_token",), torch.clone),
        f"{out}.weight": Derived((f"{out}.weight",), lambda weight: 2 * weight),
        f"{out}.bias": Derived((f"{out}.bias",), lambda bias: 2 * bias - 1),
    }
    for name in ("encoder", "decoder"):
        token, positions = f"{name}.class_embedding", f"{name}.positional_embedding"
        derived[f"{name}.class_token"] = Derived((token, positions), lambda token, positions: token + positions[:1])
        derived[f"{name}.positions.table"] = Derived((positions,), _grid)
    for name in ("weight", "bias"):
        derived[f"decoder.ffn.0.{name}"] = Derived((f"decoder.ffn.0.{name}",), _colors_first)
    return derive(source, derived)


def _sizes(source: Source) -> Sizes:
    if "decoder.ffn.2.weight" in source.shapes:
        raise UserError(f"{source.path}: a TiTok of two stages can't be imported yet; take BL-64, BL-128 or SL-256")
    width, _, patch, _ = source.shape("encoder.patch_embed.weight")
    size, dim = source.shape("quantize.codebook")
    said = source.config.get("model", {}).get("vq_model", {})
    values = {
        "data.image_size": patch * source.shape("encoder.positions.table")[-1],
        "codec.encoder.patch": patch,
        "codec.encoder.tokens": source.shape("encoder.registers")[0],
        "bottleneck.dim": dim,
        "bottleneck.codebook_size": size,
        "bottleneck.cosine": said.get("use_l2_norm", dim == UNIT_VECTORS),
    }
    for name, wide in (("encoder", width), ("decoder", source.shape("decoder.decoder_embed.weight")[0])):
        depth = source.count(rf"{name}\.transformer\.\d+\.ln_1\.weight")
        values |= {f"codec.{name}.width": wide, f"codec.{name}.depth": depth, f"codec.{name}.heads": wide // 64}
    return Sizes(values, {})


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    assert isinstance(codec.encoder, RegisterEncoder) and isinstance(codec.decoder, RegisterDecoder)
    for name, network in (("encoder", codec.encoder), ("decoder", codec.decoder)):
        yield name, name
        yield f"{name}.positions", f"{name}.positions"
        yield f"{name}.ln_pre", f"{name}.first_norm"
        yield f"{name}.ln_post", f"{name}.norm"
        for index in range(len(network.transformer.blocks)):
            for theirs, ours in BLOCK.items():
                yield f"{name}.transformer.{index}.{theirs}", f"{name}.transformer.blocks.{index}.{ours}"
    yield "encoder.patch_embed", "encoder.embed"
    yield "encoder.conv_out", "project_in"
    yield "quantize", "bottleneck"
    yield "decoder.decoder_embed", "project_out"
    yield "decoder.ffn.0", "decoder.to_pixels"
    yield "decoder.conv_out", "decoder.out"


FAMILIES = (
    Family(
        "titok",
        "TiTok of one stage",
        "image/titok",
        (Layout("1d-tokenizer", ("latent_tokens", "encoder.class_embedding", "quantize.embedding.weight"), RENAMES),),
        _sizes,
        _names,
        fixed={},
        marks={},
        ignored=(r"quantize\.embed_prob",),
        prepare=_prepare,
    ),
)
