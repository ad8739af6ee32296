"""EnCodec (arXiv 2210.13438), as the packages encodec and transformers save it."""

import math
import re
from collections.abc import Iterator

from varitok.codecs.codec import Codec
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder

from ..family import Family, Layout, Sizes
from ..source import Source
from .seanet import encoder_sizes, seanet_names

__all__ = ["FAMILIES"]

LAYOUTS = (
    Layout(
        "encodec",
        "quantizer.vq.layers.0._codebook.embed",
        {
            r"^quantizer\.vq\.layers\.(\d+)\._codebook": r"quantizer.layers.\1.codebook",
            r"^((en|de)coder)\.model": r"\1.layers",
            r"\.conv\.norm\.": ".norm.",
            r"\.convtr\.norm\.": ".norm.",
            r"\.conv\.conv\.": ".conv.",
            r"\.convtr\.convtr\.": ".conv.",
        },
    ),
    Layout("transformers", "quantizer.layers.0.codebook.embed", {}),
)


def _sizes(source: Source) -> Sizes:
    encoder = encoder_sizes(source)
    codebooks = [name for name in source.shapes if re.fullmatch(r"quantizer\.layers\.\d+\.codebook\.embed", name)]
    size, dim = source.shapes["quantizer.layers.0.codebook.embed"]
    layers = [name for name in source.shapes if re.fullmatch(r"encoder\.layers\.\d+\.lstm\.weight_ih_l\d+", name)]
    values = {f"codec.encoder.{name}": value for name, value in encoder.items()}
    values |= {
        "codec.decoder.kernel": encoder["kernel"],
        "codec.decoder.last_kernel": encoder["last_kernel"],
        "codec.encoder.inner.width": encoder["base"] * 2 ** len(encoder["strides"]),
        "codec.encoder.inner.depth": len(layers),
        "bottleneck.num_codebooks": len(codebooks),
        "bottleneck.level.dim": dim,
        "bottleneck.level.codebook_size": size,
    }
    claims = {
        "audio_channels": encoder["channels"],
        "codebook_dim": dim,
        "codebook_size": size,
        "compress": encoder["compress"],
        "hidden_size": encoder["width"],
        "kernel_size": encoder["kernel"],
        "last_kernel_size": encoder["last_kernel"],
        "norm_type": "time_group_norm" if encoder["norm"] == "group" else "weight_norm",
        "num_filters": encoder["base"],
        "num_lstm_layers": len(layers),
        "num_residual_layers": len(encoder["dilations"]),
        "residual_kernel_size": encoder["residual_kernel"],
        "upsampling_ratios": encoder["strides"][::-1],
        "use_conv_shortcut": encoder["conv_shortcut"],
        "pad_mode": "reflect",
        "trim_right_ratio": 1.0,
    }
    if len(encoder["dilations"]) > 1:
        claims["dilation_growth_rate"] = 2
    values |= {"data.crop_tokens": math.ceil(source.config.get("sampling_rate", 24000) / math.prod(encoder["strides"]))}
    return Sizes(values, claims)


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    assert isinstance(codec.encoder, ConvEncoder) and isinstance(codec.decoder, ConvDecoder)
    yield from seanet_names(codec.encoder, codec.decoder)
    for index in range(codec.num_codebooks):
        yield f"quantizer.layers.{index}.codebook", f"bottleneck.parts.{index}.codebook"


IGNORED = (r".*\.codebook\.inited",)
FAMILIES = (
    Family(
        "encodec",
        "EnCodec at 24 kHz",
        "audio/encodec",
        LAYOUTS,
        _sizes,
        _names,
        fixed={"data.sample_rate": 24000, "codec.encoder.causal": True},
        marks={"codec.encoder.norm": "weight", "use_causal_conv": True},
        ignored=IGNORED,
    ),
    Family(
        "encodec_48k",
        "EnCodec at 48 kHz, stereo",
        "audio/encodec_48k",
        LAYOUTS,
        _sizes,
        _names,
        fixed={"data.sample_rate": 48000, "codec.encoder.causal": False},
        marks={"codec.encoder.norm": "group", "use_causal_conv": False},
        ignored=IGNORED,
    ),
)
