"""VQGAN (arXiv 2012.09841), as taming-transformers, LlamaGen (arXiv 2406.06525) and diffusers save it."""

from collections.abc import Iterator

from varitok.codecs.codec import Codec

from ..family import Family, Layout, Sizes
from ..source import Source
from .resnet import DIFFUSERS, LLAMAGEN, TAMING, resnet_names, resnet_sizes, unify

__all__ = ["FAMILIES"]

CODEBOOK = "quantize.embedding.weight"


def _sizes(source: Source) -> Sizes:
    values, claims = resnet_sizes(source)
    size, dim = source.shape("quantize.codebook")
    claims |= {"latent_channels": values["codec.encoder.width"], "num_vq_embeddings": size, "norm_type": "group"}
    return Sizes(values | {"bottleneck.dim": dim, "bottleneck.codebook_size": size}, claims)


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    yield from resnet_names(codec)
    yield "quantize", "bottleneck"


FAMILIES = (
    Family(
        "vqgan",
        "VQGAN",
        "image/vqgan",
        (
            Layout("diffusers", (CODEBOOK, "encoder.conv_norm_out.weight"), DIFFUSERS),
            Layout("taming-transformers", (CODEBOOK, "encoder.down.0.block.0.norm1.weight"), TAMING),
        ),
        _sizes,
        _names,
        fixed={},
        marks={},
        ignored=(r"loss\..*", r"model_ema\..*"),
        prepare=unify,
    ),
    Family(
        "llamagen",
        "LlamaGen's VQGAN of unit vectors",
        "image/llamagen",
        (Layout("LlamaGen", (CODEBOOK, "encoder.conv_blocks.0.res.0.norm1.weight"), LLAMAGEN),),
        _sizes,
        _names,
        fixed={},
        marks={},
        ignored=(r"quantize\.codebook_used",),
        prepare=unify,
    ),
)
