"""DAC (arXiv 2306.06546), as descript-audio-codec and transformers save it."""

import re
from collections.abc import Iterator
from typing import Any

from varitok.codecs.codec import Codec
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder

from ..family import Family, Layout, Sizes
from ..source import Source

__all__ = ["FAMILIES", "stage_names"]

UNIT = ("snake1", "conv1", "snake2", "conv2")  # of a residual unit, in order
LAYOUTS = (
    Layout(
        "descript-audio-codec",
        "encoder.block.1.block.0.block.0.alpha",
        {
            r"^decoder\.model\.": "decoder.block.",
            r"^(..coder)\.block\.0\.(?=weight|bias|parametrizations)": r"\1.conv1.",
            r"^(..coder)\.block\.\d+\.(?=weight|bias|parametrizations)": r"\1.conv2.",
            r"^(..coder)\.block\.\d+\.alpha$": r"\1.snake1.alpha",
        },
    ),
    Layout(
        "transformers",
        "encoder.block.0.res_unit1.snake1.alpha",
        {
            r"^(..coder)\.block\.(\d+)\.": lambda found: f"{found[1]}.block.{int(found[2]) + 1}.",
            r"^(encoder\.block\.\d+)\.res_unit(\d)\.": lambda found: f"{found[1]}.block.{int(found[2]) - 1}.block.",
            r"^(decoder\.block\.\d+)\.res_unit(\d)\.": lambda found: f"{found[1]}.block.{int(found[2]) + 1}.block.",
            r"\.block\.((?:snake|conv)\d)\.": lambda found: f".block.{UNIT.index(found[1])}.",
            r"^(encoder\.block\.\d+)\.snake1\.": r"\1.block.3.",
            r"^(encoder\.block\.\d+)\.conv1\.": r"\1.block.4.",
            r"^(decoder\.block\.\d+)\.snake1\.": r"\1.block.0.",
            r"^(decoder\.block\.\d+)\.conv_t1\.": r"\1.block.1.",
        },
    ),
)


def _sizes(source: Source) -> Sizes:
    blocks = sorted(
        {int(found[1]) for name in source.shapes if (found := re.match(r"encoder\.block\.(\d+)\.block\.4\.", name))}
    )
    base, channels, kernel = source.weight_shape("encoder.conv1")
    strides = [source.weight_shape(f"encoder.block.{block}.block.4")[2] // 2 for block in blocks]
    width, _, last_kernel = source.weight_shape("encoder.conv2")
    decoder = source.weight_shape("decoder.conv1")[0]
    size, dim = source.shape("quantizer.quantizers.0.codebook.weight")
    count = source.count(r"quantizer\.quantizers\.\d+\.codebook\.weight")
    values: dict[str, Any] = {
        "codec.encoder.base": base,
        "codec.encoder.channels": channels,
        "codec.encoder.kernel": kernel,
        "codec.encoder.last_kernel": last_kernel,
        "codec.encoder.strides": strides,
        "codec.encoder.width": width,
        "codec.decoder.base": decoder // 2 ** len(strides),
        "bottleneck.codebook_size": size,
        "bottleneck.dim": width,
        "bottleneck.num_codebooks": count,
        "bottleneck.width": dim,
    }
    claims = {
        "codebook_dim": dim,
        "codebook_size": size,
        "decoder_dim": decoder,
        "decoder_hidden_size": decoder,
        "downsampling_ratios": strides,
        "encoder_dim": base,
        "encoder_hidden_size": base,
        "encoder_rates": strides,
        "n_codebooks": count,
    }
    return Sizes(values, claims)


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    assert isinstance(codec.encoder, ConvEncoder) and isinstance(codec.decoder, ConvDecoder)
    yield "encoder.conv1", "encoder.first.layer"
    yield from stage_names(codec.encoder, codec.decoder)
    yield "encoder.snake1", "encoder.act.inner"
    yield "encoder.conv2", "encoder.last.layer"
    yield "quantizer.quantizers", "bottleneck"
    yield "decoder.conv1", "decoder.first.layer"
    yield "decoder.snake1", "decoder.act.inner"
    yield "decoder.conv2", "decoder.last.layer"


def stage_names(encoder: ConvEncoder, decoder: ConvDecoder, first: int = 1) -> Iterator[tuple[str, str]]:
    """List the modules of all stages; `first` is the number of the decoder's first one, its layers before it."""
    for level, stage in enumerate(encoder.stages):
        theirs, ours, units = f"encoder.block.{level + 1}.block", f"encoder.stages.{level}", len(stage.units)  # type: ignore[arg-type]
        for unit in range(units):
            yield from _unit(f"{theirs}.{unit}.block", f"{ours}.units.{unit}")
        yield f"{theirs}.{units}", f"{ours}.act.inner"
        yield f"{theirs}.{units + 1}", f"{ours}.conv.layer"
    for level, stage in enumerate(decoder.stages):
        theirs, ours, before = f"decoder.block.{level + first}.block", f"decoder.stages.{level}", 2
        yield f"{theirs}.0", f"{ours}.act.inner"
        yield f"{theirs}.1", f"{ours}.conv.layer"
        if stage.noise is not None:
            yield f"{theirs}.2.linear", f"{ours}.noise.linear.layer"
            before = 3
        for unit in range(len(stage.units)):  # type: ignore[arg-type]
            yield from _unit(f"{theirs}.{unit + before}.block", f"{ours}.units.{unit}")


def _unit(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for index, name in enumerate(("act_in.inner", "wide.layer", "act_out.inner", "pointwise.layer")):
        yield f"{theirs}.{index}", f"{ours}.{name}"


def _family(name: str, title: str, rate: int, **marks: Any) -> Family:
    return Family(
        name,
        title,
        f"audio/{name}",
        LAYOUTS,
        _sizes,
        _names,
        fixed={"data.sample_rate": rate},
        marks={"sampling_rate": rate, **{f"bottleneck.{key}": value for key, value in marks.items()}},
    )


FAMILIES = (
    _family("dac_16k", "DAC at 16 kHz", 16000, num_codebooks=12),
    _family("dac_24k", "DAC at 24 kHz", 24000, num_codebooks=32),
    _family("dac_44k", "DAC at 44.1 kHz", 44100, num_codebooks=9),
)
