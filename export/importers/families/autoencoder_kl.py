"""Stable Diffusion's auto-encoder (arXiv 2112.10752), as latent-diffusion and diffusers save it.

That of Stable Diffusion 1, 2 and XL has 4 channels, that of 3 and of FLUX 16 and no pointwise convolution beside the
bottleneck. Latents are the auto-encoder's own, without the scale and shift that its diffusion model expects.
"""

from ..family import Family, Layout, Sizes
from ..source import Source
from .resnet import DIFFUSERS, TAMING, resnet_names, resnet_sizes, unify

__all__ = ["FAMILIES"]


def _sizes(source: Source) -> Sizes:
    values, claims = resnet_sizes(source)
    # The pointwise convolutions may change the number of channels.
    inside = source.shapes.get("post_quant_conv.weight", (0, values["codec.decoder.width"]))[1]
    moments = source.shapes.get("quant_conv.weight", (values["codec.encoder.width"],))[0]
    claims |= {"latent_channels": inside}
    return Sizes(values | {"bottleneck.dim": inside, "bottleneck.split": moments == 2 * inside}, claims)


FAMILIES = (
    Family(
        "sd_vae",
        "the auto-encoder of Stable Diffusion or FLUX",
        "image/sd_vae",
        (
            Layout("diffusers", "encoder.conv_norm_out.weight", DIFFUSERS),
            Layout("latent-diffusion", "encoder.down.0.block.0.norm1.weight", TAMING),
        ),
        _sizes,
        resnet_names,
        fixed={},
        marks={"bottleneck.split": True},
        ignored=(r"loss\..*", r"model_ema\..*"),
        prepare=unify,
    ),
)
