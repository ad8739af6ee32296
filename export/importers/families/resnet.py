"""Names of VQGAN's network in the packages that publish it, and the sizes that its tensors have.

The table's names are those of diffusers, whose blocks are numbered in the order of execution. taming-transformers and
latent-diffusion number the decoder's stages from the last, LlamaGen has a list of blocks.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from varitok.codecs.codec import Codec
from varitok.codecs.networks.projections import LinearProjection

from ..derive import Derived, derive, join
from ..source import Source

__all__ = ["DIFFUSERS", "LLAMAGEN", "TAMING", "resnet_names", "resnet_sizes", "unify"]

_COMMON = {
    r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
    r"^quantize\.embedding\.weight$": "quantize.codebook",
}
# Regular expressions and replacements that make the table's names of a package's.
DIFFUSERS = {
    r"\.query\.": ".to_q.",  # before diffusers 0.15
    r"\.key\.": ".to_k.",
    r"\.value\.": ".to_v.",
    r"\.proj_attn\.": ".to_out.0.",
    r"^quantize\.embedding\.weight$": "quantize.codebook",
}
TAMING = {
    r"^(en|de)coder\.(down|up)\.(\d+)\.block\.": r"\1coder.\2.\3.resnets.",
    r"^(en|de)coder\.(down|up)\.(\d+)\.attn\.": r"\1coder.\2.\3.attentions.",
    r"^encoder\.down\.(\d+)\.downsample\.": r"encoder.down.\1.downsamplers.0.",
    r"^decoder\.up\.(\d+)\.upsample\.": r"decoder.up.\1.upsamplers.0.",
    r"^encoder\.down\.": "encoder.down_blocks.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    **_COMMON,
}
LLAMAGEN = {
    r"^encoder\.conv_blocks\.": "encoder.down_blocks.",
    r"^decoder\.conv_blocks\.": "decoder.up_blocks.",
    r"(_blocks\.\d+)\.res\.": r"\1.resnets.",
    r"(_blocks\.\d+)\.attn\.": r"\1.attentions.",
    r"(_blocks\.\d+)\.(down|up)sample\.": r"\1.\2samplers.0.",
    r"\.mid\.0\.": ".mid_block.resnets.0.",
    r"\.mid\.1\.": ".mid_block.attentions.0.",
    r"\.mid\.2\.": ".mid_block.resnets.1.",
    **_COMMON,
}


def unify(source: Source) -> Source:
    """Number the decoder's stages in the order of execution, and join the queries, keys and values of attention."""
    found = [re.match(r"decoder\.up\.(\d+)\.", name) for name in source.shapes]
    last = max((int(match[1]) for match in found if match), default=0)
    source = source.renamed(
        lambda name: re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{last - int(match[1])}", name)
    )
    derived = {}
    for name in [name for name in source.shapes if re.search(r"\.to_q\.(weight|bias)$", name)]:
        parts = tuple(name.replace(".to_q.", f".to_{one}.") for one in "qkv")
        derived[name.replace(".to_q.", ".qkv.")] = Derived(parts, join)
    return derive(source, derived)


def resnet_sizes(source: Source) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the sizes of both networks from tensors: keys of the configuration, and what diffusers' config.json says.

    Raises:
        UserError: The source lacks a tensor that has a size.
    """
    first = source.weight_shape("encoder.conv_in")
    levels = source.count(r"encoder\.down_blocks\.\d+\.resnets\.0\.conv1\.weight")
    widths = [source.weight_shape(f"encoder.down_blocks.{level}.resnets.0.conv1")[0] for level in range(levels)]
    base = math.gcd(first[0], *widths)
    downs = [_has(source, f"encoder.down_blocks.{level}.downsamplers.0.conv") for level in range(levels - 1)]
    ups = [_has(source, f"decoder.up_blocks.{level}.upsamplers.0.conv") for level in range(levels - 1)]
    encoder = {
        "width": source.weight_shape("encoder.conv_out")[0],
        "channels": first[1],
        "base": base,
        "stem": None if first[0] == widths[0] else first[0] // base,
        "multipliers": [width // base for width in widths],
        "strides": [1 + down for down in downs],
        "depth": source.count(r"encoder\.down_blocks\.0\.resnets\.\d+\.conv1\.weight"),
        "attention": _has(source, "encoder.mid_block.attentions.0.group_norm"),
        "deepest_attention": _has(source, f"encoder.down_blocks.{levels - 1}.attentions.0.group_norm"),
        "groups": source.config.get("norm_num_groups", 32),
        "direct": not _has(source, "quant_conv"),
    }
    decoder = {"width": source.weight_shape("decoder.conv_in")[1], "strides": [1 + up for up in ups[::-1]]}
    claims = {
        "in_channels": first[1],
        "block_out_channels": widths,
        "layers_per_block": encoder["depth"],
        "mid_block_add_attention": encoder["attention"],
        "act_fn": "silu",
    }
    values = {"encoder": encoder, "decoder": decoder}
    return {f"codec.{part}.{key}": one for part, sizes in values.items() for key, one in sizes.items()}, claims


def _has(source: Source, module: str) -> bool:
    return f"{module}.weight" in source.shapes


def resnet_names(codec: Codec) -> Iterator[tuple[str, str]]:
    """List the modules of both networks, and of the linear maps between them and the bottleneck."""
    for name, changes, theirs, change in (
        ("encoder", "downs", "down_blocks", "downsamplers"),
        ("decoder", "ups", "up_blocks", "upsamplers"),
    ):
        network: Any = codec.get_submodule(name)
        yield f"{name}.conv_in", f"{name}.first.convs.0.layer"
        for level, stage in enumerate(network.stages):
            yield from _units(f"{name}.{theirs}.{level}", f"{name}.stages.{level}.units", stage.units)
        for level, part in enumerate(getattr(network, changes)):
            if part.across is not None:
                yield f"{name}.{theirs}.{level}.{change}.0.conv", f"{name}.{changes}.{level}.across.layer"
        yield from _middle(f"{name}.mid_block", f"{name}.middle", network.middle)
        yield f"{name}.conv_norm_out", f"{name}.norm"
        yield f"{name}.conv_out", f"{name}.last.convs.0.layer"
    if isinstance(codec.project_in, LinearProjection):
        yield "quant_conv", "project_in"
        yield "post_quant_conv", "project_out"


def _units(theirs: str, ours: str, units: Any) -> Iterator[tuple[str, str]]:
    for number, unit in enumerate(units):
        yield from _unit(f"{theirs}.resnets.{number}", f"{ours}.{number}", unit)
        if unit.within is not None:
            yield from _attention(f"{theirs}.attentions.{number}", f"{ours}.{number}.within")


def _unit(theirs: str, ours: str, unit: Any) -> Iterator[tuple[str, str]]:
    for number, name in enumerate(("first", "second"), 1):
        yield f"{theirs}.norm{number}", f"{ours}.{name}_norm"
        yield f"{theirs}.conv{number}", f"{ours}.{name}.convs.0.layer"
    if unit.shortcut is not None:
        yield f"{theirs}.conv_shortcut", f"{ours}.shortcut.layer"


def _attention(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    yield f"{theirs}.group_norm", f"{ours}.norm"
    yield f"{theirs}.qkv", f"{ours}.qkv"
    yield f"{theirs}.to_out.0", f"{ours}.out"


def _middle(theirs: str, ours: str, middle: nn.Module) -> Iterator[tuple[str, str]]:
    for number, name in enumerate(("first", "second")):
        yield from _unit(f"{theirs}.resnets.{number}", f"{ours}.{name}.units.0", middle.get_submodule(name).units[0])  # type: ignore[index]
    if middle.within is not None:
        yield from _attention(f"{theirs}.attentions.0", f"{ours}.within")
