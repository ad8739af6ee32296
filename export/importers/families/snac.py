"""SNAC (arXiv 2410.14411), as the package snac saves it."""

import math
from collections.abc import Iterator
from typing import Any

from varitok.codecs.codec import Codec
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder

from ..family import Family, Layout, Sizes
from ..source import Source
from .dac import stage_names

__all__ = ["FAMILIES"]

HEAD = 64  # channels of an attention head
WINDOW = 32  # latents
GRADES = {3: [4, 2, 1], 4: [8, 4, 2, 1]}  # latents to a code, by the number of codebooks
ATTENTION = {"norm": "norm", "to_qkv": "attention.qkv", "to_out": "attention.out"}
LAYOUTS = (
    Layout(
        "snac",
        ("encoder.block.1.block.0.block.0.alpha", "decoder.model.1.bias"),
        {
            r"^decoder\.model\.": "decoder.block.",
            # A level of ours has several codebooks, here one.
            r"^quantizer\.quantizers\.(\d+)\.": r"quantizer.quantizers.\1.0.",
        },
    ),
)


def _sizes(source: Source) -> Sizes:
    stages = source.count(r"encoder\.block\.\d+\.block\.0\.block\.0\.alpha")
    attends = source.count(r"encoder\.block\.\d+\.to_qkv\.weight")
    base, channels, kernel = source.weight_shape("encoder.block.0")
    strides = [source.weight_shape(f"encoder.block.{stage}.block.4")[2] // 2 for stage in range(1, stages + 1)]
    width, _, last_kernel = source.weight_shape(f"encoder.block.{1 + stages + attends}")
    top = source.weight_shape("decoder.block.1")[0]
    size, dim = source.shape("quantizer.quantizers.0.0.codebook.weight")
    count = source.count(r"quantizer\.quantizers\.\d+\.0\.codebook\.weight")
    # No tensor shows these two.
    grades = source.config.get("vq_strides", GRADES.get(count, [1] * count))
    window = source.config.get("attn_window_size", WINDOW) if attends else None
    values: dict[str, Any] = {
        "codec.encoder.base": base,
        "codec.encoder.channels": channels,
        "codec.encoder.kernel": kernel,
        "codec.encoder.last_kernel": last_kernel,
        "codec.encoder.multiple": math.lcm(*grades, window or 1),
        "codec.encoder.strides": strides,
        "codec.encoder.width": width,
        "codec.decoder.base": top // 2**stages,
        "bottleneck.strides": grades,
        "bottleneck.level.codebook_size": size,
        "bottleneck.level.dim": width,
        "bottleneck.level.width": dim,
    }
    if window:
        for side, channels in (("encoder", width), ("decoder", top)):
            form = {"width": channels, "heads": channels // HEAD, "window": window}
            values |= {f"codec.{side}.inner.{key}": value for key, value in form.items()}
    claims = {
        "attn_window_size": window,
        "codebook_dim": dim,
        "codebook_size": size,
        "decoder_dim": top,
        "decoder_rates": strides[::-1],
        "depthwise": True,
        "encoder_dim": base,
        "encoder_rates": strides,
        "latent_dim": width,
        "noise": True,
    }
    return Sizes(values, claims)


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    encoder, decoder = codec.encoder, codec.decoder
    assert isinstance(encoder, ConvEncoder) and isinstance(decoder, ConvDecoder)
    attends, stages = int(encoder.inner is not None), len(encoder.stages)
    yield "encoder.block.0", "encoder.first.layer"
    yield f"encoder.block.{1 + stages + attends}", "encoder.last.layer"
    yield "decoder.block.0", "decoder.first.layer"
    yield "decoder.block.1", "decoder.pointwise.layer"
    if attends:
        for theirs, ours in (f"encoder.block.{1 + stages}", "encoder.inner"), ("decoder.block.2", "decoder.inner"):
            yield from ((f"{theirs}.{old}", f"{ours}.{new}") for old, new in ATTENTION.items())
    yield from stage_names(encoder, decoder, 2 + attends)
    yield f"decoder.block.{2 + attends + stages}", "decoder.act.inner"
    yield f"decoder.block.{3 + attends + stages}", "decoder.last.layer"
    for level in range(codec.num_codebooks):
        yield f"quantizer.quantizers.{level}", f"bottleneck.parts.{level}"


def _family(name: str, title: str, rate: int, grades: list[int]) -> Family:
    return Family(
        name,
        title,
        f"audio/{name}",
        LAYOUTS,
        _sizes,
        _names,
        fixed={"data.sample_rate": rate},
        marks={"sampling_rate": rate, "bottleneck.strides": grades},
        ignored=(r".*\.rel_pos\.inv_freq",),
    )


FAMILIES = (
    _family("snac", "SNAC at 24 kHz", 24000, [4, 2, 1]),
    _family("snac_32k", "SNAC at 32 kHz", 32000, [8, 4, 2, 1]),
    _family("snac_44k", "SNAC at 44.1 kHz", 44100, [8, 4, 2, 1]),
)
