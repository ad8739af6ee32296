"""Mimi (arXiv 2410.00037), as the packages moshi and transformers save it."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from varitok.codecs.bottlenecks.residual import Split
from varitok.codecs.codec import Codec
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder

from ..derive import Derived, derive, join
from ..family import Family, Layout, Sizes
from ..source import Source
from .seanet import encoder_sizes, seanet_names

__all__ = ["FAMILIES"]

SIDES = ("semantic", "acoustic")
LAYER = {
    "input_layernorm": "attention_norm",
    "self_attn.qkv": "attention.qkv",
    "self_attn.o_proj": "attention.out",
    "post_attention_layernorm": "mlp_norm",
    "mlp.fc1": "mlp.wide",
    "mlp.fc2": "mlp.out",
}
LAYOUTS = (
    Layout(
        "transformers",
        "quantizer.semantic_residual_vector_quantizer.layers.0.codebook.embed_sum",
        {r"\.self_attn_layer_scale\.scale$": ".attention_scale", r"\.mlp_layer_scale\.scale$": ".mlp_scale"},
    ),
    Layout(
        "moshi",
        "quantizer.rvq_first.vq.layers.0._codebook.embedding_sum",
        {
            r"^quantizer\.rvq_first\.(vq\.)?": "quantizer.semantic_residual_vector_quantizer.",
            r"^quantizer\.rvq_rest\.(vq\.)?": "quantizer.acoustic_residual_vector_quantizer.",
            r"\._codebook\.embedding_sum$": ".codebook.embed_sum",
            r"\._codebook\._?": ".codebook.",
            r"^((en|de)coder)\.model\.": r"\1.layers.",
            r"(\.conv(tr)?)+\.": ".conv.",
            r"^((en|de)coder_transformer)\.transformer\.": r"\1.",
            r"\.self_attn\.in_proj(s\.0\.|_)weight$": ".self_attn.in_proj.weight",
            r"\.self_attn\.out_projs?(\.0)?\.": ".self_attn.o_proj.",
            r"\.norm1\.": ".input_layernorm.",
            r"\.norm2\.": ".post_attention_layernorm.",
            r"\.linear([12])\.": r".mlp.fc\1.",
            r"\.layer_scale_1\.scale$": ".attention_scale",
            r"\.layer_scale_2\.scale$": ".mlp_scale",
        },
    ),
)


def _heads(source: Source) -> int:
    return int(source.config.get("num_attention_heads", 8))  # no tensor shows it


def _prepare(source: Source) -> Source:
    """Make one matrix of queries, keys and values."""
    derived = {}
    for name in source.shapes:
        if name.endswith(".q_proj.weight"):
            parts = tuple(name.replace(".q_proj.", f".{one}_proj.") for one in "qkv")
            derived[name.replace(".q_proj.", ".qkv.")] = Derived(parts, join)
        elif name.endswith(".in_proj.weight"):
            derived[name.replace(".in_proj.", ".qkv.")] = Derived((name,), partial(_part_pairs, heads=_heads(source)))
    return derive(source, derived)


def _part_pairs(weight: Tensor, heads: int) -> Tensor:
    """Reorder the rows of queries and keys: moshi rotates neighbors, ours the first half of a head with the second."""
    queries, keys, values = weight.chunk(3)
    parted = [part.reshape(heads, -1, 2, part.shape[1]).transpose(1, 2).flatten(0, 2) for part in (queries, keys)]
    return join(*parted, values)


def _sizes(source: Source) -> Sizes:
    encoder = encoder_sizes(source)
    layers = source.count(r"encoder_transformer\.layers\.\d+\.mlp\.fc1\.weight")
    hidden, width = source.shape("encoder_transformer.layers.0.mlp.fc1.weight")
    quantizer = "quantizer.{}_residual_vector_quantizer"
    size, dim = source.shape(f"{quantizer.format('semantic')}.layers.0.codebook.embed_sum")
    names = [rf"{quantizer.format(side)}\.layers\.\d+\.codebook\.embed_sum" for side in SIDES]
    semantic, acoustic = map(source.count, names)
    heads = _heads(source)
    middle = {
        "depth": layers,
        "heads": heads,
        "hidden": hidden,
        "window": source.config.get("sliding_window", 250),
        "eps": source.config.get("norm_eps", 1e-5),
    }
    values: dict[str, Any] = {f"codec.encoder.{name}": value for name, value in encoder.items()}
    values |= {f"codec.encoder.middle.{name}": value for name, value in middle.items()}
    values |= {
        "codec.decoder.kernel": encoder["kernel"],
        "codec.decoder.last_kernel": encoder["last_kernel"],
        "codec.encoder.resample": source.shape("downsample.conv.weight")[2] // 2,
        "bottleneck.dim": width,
        "bottleneck.semantic.dim": dim,
        "bottleneck.semantic.codebook_size": size,
        "bottleneck.acoustic.level.dim": dim,
        "bottleneck.acoustic.level.codebook_size": size,
        "bottleneck.acoustic.num_codebooks": acoustic,
    }
    claims = {
        "audio_channels": encoder["channels"],
        "codebook_dim": dim,
        "codebook_size": size,
        "compress": encoder["compress"],
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": hidden,
        "kernel_size": encoder["kernel"],
        "last_kernel_size": encoder["last_kernel"],
        "num_filters": encoder["base"],
        "num_hidden_layers": layers,
        "num_key_value_heads": heads,
        "num_quantizers": semantic + acoustic,
        "num_residual_layers": len(encoder["dilations"]),
        "num_semantic_quantizers": 1,
        "pad_mode": "constant",
        "residual_kernel_size": encoder["residual_kernel"],
        "trim_right_ratio": 1.0,
        "upsample_groups": source.shape("upsample.conv.weight")[0],
        "upsampling_ratios": encoder["strides"][::-1],
        "use_causal_conv": True,
        "use_conv_shortcut": encoder["conv_shortcut"],
    }
    return Sizes(values, claims)


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    encoder, decoder = codec.encoder, codec.decoder
    assert isinstance(encoder, ConvEncoder) and isinstance(decoder, ConvDecoder)
    assert isinstance(codec.bottleneck, Split)
    yield from seanet_names(encoder, decoder)
    for name in ("encoder", "decoder"):
        blocks = getattr(codec, name).middle.blocks
        for index in range(len(blocks)):
            theirs, ours = f"{name}_transformer.layers.{index}", f"{name}.middle.blocks.{index}"
            for old, new in LAYER.items():
                yield f"{theirs}.{old}", f"{ours}.{new}"
            yield theirs, ours  # the scales of both branches
    yield "downsample.conv", "encoder.down.layer"
    yield "upsample.conv", "decoder.up.layer"
    for index, side in enumerate(SIDES):
        theirs, part = f"quantizer.{side}_residual_vector_quantizer", codec.bottleneck.parts[index]
        yield f"{theirs}.input_proj", f"bottleneck.project_in.{index}"
        yield f"{theirs}.output_proj", f"bottleneck.project_out.{index}"
        levels = len(part.codebook_sizes)  # type: ignore[arg-type]
        inner = [f".parts.{level}" for level in range(levels)] if side == "acoustic" else [""]
        for level, path in enumerate(inner):
            yield f"{theirs}.layers.{level}.codebook", f"bottleneck.parts.{index}{path}.codebook"


FAMILIES = (
    Family(
        "mimi",
        "Mimi at 24 kHz",
        "audio/mimi",
        LAYOUTS,
        _sizes,
        _names,
        fixed={"data.sample_rate": 24000},
        marks={},
        ignored=(r".*\.codebook\.initialized",),
        prepare=_prepare,
    ),
)
