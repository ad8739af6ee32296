"""Bottlenecks and small codecs that the tests share."""

import copy
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from varitok.codecs.bottlenecks.binary import BinarySphericalQuantizer, LookupFreeQuantizer
from varitok.codecs.bottlenecks.continuous import KLBottleneck
from varitok.codecs.bottlenecks.contract import Bottleneck
from varitok.codecs.bottlenecks.factorized import FactorizedResidualQuantizer
from varitok.codecs.bottlenecks.fsq import DitheredScalarQuantizer, FiniteScalarQuantizer, ResidualScalarQuantizer
from varitok.codecs.bottlenecks.hierarchy import Groups, Hierarchy, hierarchy, multi_scale
from varitok.codecs.bottlenecks.library import library
from varitok.codecs.bottlenecks.multirate import MultiRate, multirate
from varitok.codecs.bottlenecks.product import Product, grouped
from varitok.codecs.bottlenecks.residual import Residual, Split, residual
from varitok.codecs.bottlenecks.vq import EMAVectorQuantizer, KMeansQuantizer, VectorQuantizer
from varitok.codecs.build import build
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full, Uniform
from varitok.codecs.lengths.policy import Axis, LengthPolicy, MaskToken, Mechanism, Truncate, Zeros
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.register_vit import RegisterDecoder, RegisterEncoder
from varitok.codecs.networks.vit2d import ViTDecoder, ViTEncoder

from ..composing import composed

WIDTH, TOKENS, SIZE, PATCH = 16, 6, 16, 8
RATE, HOP = 8000, 40  # of the small codec of sounds

BOTTLENECKS: dict[str, Callable[[], Bottleneck]] = {
    "fsq": lambda: FiniteScalarQuantizer([8, 5, 5]),
    "fsq_even": lambda: FiniteScalarQuantizer([4, 6]),
    "vq": lambda: VectorQuantizer(5, 37),
    "vq_cosine": lambda: VectorQuantizer(5, 37, cosine=True),
}
CONFIGS = Path(__file__).parents[2] / "configs"
FOLDER = CONFIGS / "bottleneck"
# Every configuration is an example, at its own sizes but where a test would then take seconds.
SMALLER: dict[str, list[str]] = {
    "dual_token": ["parts.0.level.codebook_size=256", "parts.1.level.codebook_size=256"],
    "hierarchy": ["level.dim=4", "level.codebook_size=64"],
    "ibq": ["codebook_size=2048"],
    "kmeans": ["dim=64"],
    "lfq": ["bits=12"],
    "multi_scale": ["scales=[1,2,3]", "refinements=2", "level.dim=4", "level.codebook_size=64"],
    "product_fqgan": ["part.codebook_size=1024"],
    "product_rvq": ["part.level.dim=32", "part.level.codebook_size=256"],
    "product_vq": ["part.codebook_size=512"],
    "rvq": ["level.dim=32", "level.codebook_size=256"],
    "rvq_factorized": ["dim=256", "codebook_size=256"],
    "rvq_masked": ["dim=32", "level.codebook_size=256"],
    "rvq_multirate": ["level.dim=64", "level.codebook_size=256"],
    "rvq_probabilistic": ["num_codebooks=8", "level.dim=32", "level.codebook_size=256"],
    "rvq_shared": ["level.dim=32", "level.codebook_size=512"],
    "rvq_split": [
        *("dim=64", "semantic.dim=32", "semantic.codebook_size=512"),
        *("acoustic.level.dim=32", "acoustic.level.codebook_size=256"),
    ],
    "sim_vq": ["codebook_size=1024"],
    "token_flow": ["codebook_size=2048"],
    "vq_ema": ["dim=32"],
    "vq_factorized": ["dim=256", "codebook_size=1024"],
    "vq_rotation": ["codebook_size=2048"],
}
# Quantizers of vector-quantize-pytorch: every kind of layer, alone, in a stack and in groups of stacks.
LIBRARY: dict[str, tuple[str, dict[str, Any]]] = {
    "vq_cosine_heads": (
        "VectorQuantize",
        {"dim": 6, "codebook_size": 19, "codebook_dim": 4, "heads": 2, "separate_codebook_per_head": True}
        | {"use_cosine_sim": True, "threshold_ema_dead_code": 1},
    ),
    "vq_learnable": (
        "VectorQuantize",
        {"dim": 5, "codebook_size": 19, "learnable_codebook": True, "ema_update": False},
    ),
    "rvq": (
        "ResidualVQ",
        {"dim": 6, "codebook_dim": 5, "codebook_size": [19, 11, 7], "num_quantizers": 3, "decay": 0.9},
    ),
    "rvq_shared": (
        "ResidualVQ",
        {"dim": 5, "codebook_size": 19, "num_quantizers": 3, "shared_codebook": True, "kmeans_init": True},
    ),
    "rvq_grouped": ("GroupedResidualVQ", {"dim": 8, "groups": 2, "num_quantizers": 2, "codebook_size": 19}),
    "fsq": ("FSQ", {"levels": [5, 4, 3], "dim": 7, "num_codebooks": 2}),
    "fsq_residual": ("ResidualFSQ", {"levels": [5, 3, 4], "num_quantizers": 3, "dim": 6}),
    "lfq": ("LFQ", {"codebook_size": 32, "dim": 7, "spherical": True, "commitment_loss_weight": 0.25}),
    "sim_vq": ("SimVQ", {"dim": 5, "codebook_size": 19, "frozen_codebook_dim": 3}),
    "random_projection": (
        "RandomProjectionQuantizer",
        {"dim": 9, "codebook_size": 19, "codebook_dim": 4, "num_codebooks": 2},
    ),
}
# What no configuration has: smallest sizes, options that are off there, and bottlenecks within bottlenecks.
EDGES: dict[str, Callable[[], Bottleneck]] = {
    **BOTTLENECKS,
    "bsq_smallest": lambda: BinarySphericalQuantizer(2, entropy_group=1),
    "bsq_uneven_groups": lambda: BinarySphericalQuantizer(5, entropy_group=2),
    "dithered_even": lambda: DitheredScalarQuantizer([4, 2, 7]),
    "dithered_split": lambda: DitheredScalarQuantizer([17, 17]).split([5, 5], 2),
    "fsq_entropy": lambda: FiniteScalarQuantizer([8, 5, 3], entropy=0.1, entropy_group=2),
    "fsq_residual_alone": lambda: ResidualScalarQuantizer([2, 3], 1),
    "hierarchy_alone": lambda: hierarchy(partial(VectorQuantizer, 4, 11, cosine=True), [1]),
    "hierarchy_mixed": lambda: Hierarchy(
        [VectorQuantizer(2, 19), FiniteScalarQuantizer([5, 3])], [Groups(2, 6), Groups(6, 6)]
    ),
    "multi_scale_plain": lambda: multi_scale(partial(EMAVectorQuantizer, 3, 19), [2, 3], refinements=0, commitment=0.0),
    "lfq_plain": lambda: LookupFreeQuantizer(3, entropy=0.0),
    **{f"library_{name}": partial(library, *given) for name, given in LIBRARY.items()},
    "multirate_alone": lambda: multirate(partial(VectorQuantizer, 4, 11, cosine=True), [3]),
    "multirate_plain": lambda: multirate(partial(VectorQuantizer, 5, 19), [4, 2, 1]),
    "multirate_of_residual": lambda: MultiRate(
        [residual(partial(EMAVectorQuantizer, 4, 9), 2), FiniteScalarQuantizer([5, 3, 3, 3])], [2, 3]
    ),
    "product_alone": lambda: Product([VectorQuantizer(3, 9)]),
    "product_mixed": lambda: Product(
        [FiniteScalarQuantizer([5, 3]), residual(partial(EMAVectorQuantizer, 4, 11), 3), BinarySphericalQuantizer(6)]
    ),
    "product_disentangled": lambda: grouped(partial(VectorQuantizer, 4, 16, cosine=True), 3, disentangle=0.1),
    "residual_of_product": lambda: Residual(
        [
            grouped(partial(EMAVectorQuantizer, 3, 8), 2),
            VectorQuantizer(6, 7),
            grouped(partial(VectorQuantizer, 2, 5), 3),
        ]
    ),
    "residual_of_residual_fsq": lambda: Residual([ResidualScalarQuantizer([5, 3], 2), EMAVectorQuantizer(2, 13)]),
    "shared_codebook": lambda: residual(partial(EMAVectorQuantizer, 6, 20), 3, shared=True),
    "split_factorized": lambda: Split(
        FactorizedResidualQuantizer(6, 1, 9, 2), FactorizedResidualQuantizer(8, 3, 9, 4), 10
    ),
    "vq_entropy_rotation": lambda: VectorQuantizer(5, 37, rotation=True, entropy=0.1, temperature=0.5),
    "vq_one_entry": lambda: VectorQuantizer(4, 1),
    "ema_cosine_entropy": lambda: EMAVectorQuantizer(5, 37, cosine=True, rotation=True, entropy=0.1),
    "ema_plain": lambda: EMAVectorQuantizer(5, 37, revival=0.0, kmeans_init=False),
    "kl_split": lambda: KLBottleneck(3, split=True),
    "kmeans_cosine": lambda: KMeansQuantizer(5, 12, cosine=True),
}
CONFIGURED = sorted(path.stem for path in FOLDER.glob("*.yaml"))
EXAMPLES = [*CONFIGURED, *(name for name in EDGES if name not in CONFIGURED)]
MECHANISMS: dict[str, Callable[[], Mechanism]] = {
    "truncate": Truncate,
    "mask_token": lambda: MaskToken(WIDTH),
    "zeros": Zeros,
}
# A run of seconds, as overrides of train.yaml; those who use it add `updates`, `callbacks` and `export`.
TINY_RUN = [
    "experiment=image/demo",
    "data=dead_leaves",
    "data.image_size=16",
    "data.length=12",
    "data.val_length=5",
    "codec.encoder.tokens=4",
    "codec.encoder.width=16",
    "codec.encoder.depth=1",
    "loader.batch_size=3",
    "loader.workers=0",
    "checkpoint.every=2",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
]
QUIET = ["callbacks.samples=null", "callbacks.evaluation=null"]  # without what a run shows while it goes on
# Experiments of images on a grid; test_image_experiments.py trains and exports each.
GRID_IMAGES = (
    *("bsq_vit", "bsq_vit_36", "bsq_vit_64", "cosmos_ci", "cosmos_ci_64", "cosmos_di", "cosmos_di_64"),
    *("fqgan", "fqgan_64", "fqgan_triple", "ibq", "ibq_64", "llamagen", "llamagen_64", "llamagen_f8"),
    *("open_magvit2", "open_magvit2_64", "robusttok", "robusttok_64", "sd_vae", "sd_vae_64", "unitok", "unitok_64"),
    *("var", "var_64", "vit_vqgan", "vit_vqgan_64", "vitok", "vitok_64", "vqgan", "vqgan_64", "xqgan", "xqgan_64"),
)
# A run of seconds of sounds and of clips, two updates with all that a run leaves but a bundle.
TINY_SOUND = [
    "experiment=audio/demo", "data=voices", "codec.encoder.widths=[16,8,8]", "codec.decoder.vocoder.width=16",
    "codec.decoder.vocoder.base=8", "codec.decoder.vocoder.hidden=16", "codec.decoder.vocoder.depth=1",
    "bottleneck.num_codebooks=3", "bottleneck.level.dim=8", "bottleneck.level.codebook_size=16", "data.crop_tokens=8",
    "data.length=8", "data.val_length=3", "data.val_seconds=0.5", "loader.batch_size=2", "loader.workers=0",
    "updates=2", "training.log_every=1", "callbacks.samples.every=1", "callbacks.samples.count=2",
    "callbacks.evaluation.every=1", "export=none", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
]  # fmt: skip
TINY_CLIP = [
    "experiment=video/cosmos_small", "data=scenes",
    "updates=2", "data.image_size=16", "data.val_length=3", "loader.batch_size=2", "loader.workers=0",
    "codec.encoder.base=4", "codec.encoder.width=8", "codec.encoder.multipliers=[1,1,1]",
    "callbacks.samples.every=1", "callbacks.samples.count=2", "callbacks.evaluation.every=1", "export=none",
    "trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "training.log_every=1",
]  # fmt: skip


class StandIn(nn.Module):
    """A stand-in for LPIPS and its weights."""

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        return (fake - real).square().mean((1, 2, 3))


@cache
def _configured(name: str) -> DictConfig:
    overrides = [f"bottleneck.{override}" for override in SMALLER.get(name, [])]
    chosen: DictConfig = composed(*overrides, name=f"bottleneck/{name}").bottleneck
    return chosen


@cache
def read_config(group: str, name: str) -> Any:
    """Read a file of a group with those that it begins with; Hydra would take a second over a group."""
    node = OmegaConf.load(CONFIGS / group / f"{name}.yaml")
    begins = [read_config(group, word) for word in node.pop("defaults", []) if isinstance(word, str) and word[0] != "_"]
    return OmegaConf.merge(*begins, node)


def example(name: str, seed: int = 0) -> Bottleneck:
    """Make one of EXAMPLES, in training mode: the configuration of that name (smaller, if slow), or an edge case."""
    return copy.deepcopy(_built(name, seed))


@cache
def _built(name: str, seed: int) -> Bottleneck:
    """Build one once: building takes several times as long as copying."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        made: Bottleneck = EDGES[name]() if name in EDGES and name not in CONFIGURED else build(_configured(name))
        return made


# What the registers of an image start from.
STARTS: dict[str, dict[str, Any]] = {"cosines": {"cosines": 2}, "shortcut": {"shortcut": True}, "alike": {}}


def tiny_codec(bottleneck: str = "fsq", mechanism: str = "truncate", start: str = "cosines") -> Codec:
    """Make a codec of 16 x 16 images, 6 tokens."""
    sizes = {"image_size": SIZE, "patch": PATCH, "tokens": TOKENS, "width": WIDTH, "depth": 1, "heads": 2}
    return Codec(
        RegisterEncoder(**sizes, **STARTS[start]),
        BOTTLENECKS[bottleneck](),
        RegisterDecoder(**sizes, **STARTS[start]),
        LengthPolicy(Uniform(), MECHANISMS[mechanism]()),
        unit_latents=start != "alike",
    )


def photo_codec() -> Codec:
    """Make a codec of images of any size, a token for every 4 x 4 pixels."""
    torch.manual_seed(0)
    sizes = {"patch": 4, "width": WIDTH, "depth": 1, "heads": 2}
    length = LengthPolicy(Full(), Truncate())
    return Codec(ViTEncoder(**sizes), FiniteScalarQuantizer([8, 5, 5]), ViTDecoder(**sizes), length).eval()


def tiled_codec() -> Codec:
    """Make a codec of images of any size, a token of two codes for every 4 x 4 pixels."""
    torch.manual_seed(0)
    sizes = {"patch": 4, "width": WIDTH, "depth": 1, "heads": 2}
    bottleneck = grouped(lambda: VectorQuantizer(3, 19), 2)
    return Codec(ViTEncoder(**sizes), bottleneck, ViTDecoder(**sizes), LengthPolicy(Full(), Truncate())).eval()


def sound_codec(unit_latents: bool = False) -> Codec:
    """Make a codec of sounds at 8 kHz, a token for every 40 samples, 4 codebooks of 32 entries."""
    torch.manual_seed(0)
    sizes = {"width": WIDTH, "base": 8, "strides": [5, 8], "dilations": [3]}
    return Codec(
        ConvEncoder(**sizes),
        residual(lambda: EMAVectorQuantizer(12, 32), 4),
        ConvDecoder(**sizes, tanh=True),
        LengthPolicy(Full(), Truncate(), codebooks=Axis(Uniform())),
        unit_latents=unit_latents,
        sample_rate=RATE,
    )


def clip_codec(causal: bool = True, unit_latents: bool = False) -> Codec:
    """Make a codec of clips at 8 frames a second, a token for every 4 x 8 x 8 frames, rows and columns."""
    torch.manual_seed(0)
    form = {
        "width": 12,
        "base": 4,
        "strides": [[2, 2, 2], [2, 4, 4]],
        "dims": 3,
        "kernel": 3,
        "last_kernel": 3,
        "residual_kernel": 3,
        "dilations": [1],
        "channels": 3,
        "activation": "silu",
        "norm": "none",
        "causal": causal,
    }
    codec = Codec(
        ConvEncoder(**form),
        FiniteScalarQuantizer([8, 8, 8]),
        ConvDecoder(**form),
        LengthPolicy(Full(), Truncate()),
        unit_latents=unit_latents,
        frame_rate=8.0,
    )
    return loud(codec)


def loud(codec: Codec) -> Codec:
    """Draw large weights, so that codes differ."""
    with torch.no_grad():
        for part in codec.parameters():
            if part.ndim > 1:
                part.normal_(std=2 / part[0].numel() ** 0.5)
    return codec.eval()


NARROW = {"base": 8, "width": 8, "hidden": 8, "heads": 1, "depth": 1, "groups": 4}


def shrink(node: DictConfig, sizes: Mapping[str, int] = NARROW) -> None:
    """Make networks narrow and shallow in place, whatever they are; those within fit one width only, and go.

    Without linear maps around the bottleneck, latents keep their width, which is the bottleneck's.
    """
    if "encoder" in node and node.encoder.get("direct") and node.encoder.keys() & {"bands", "width"}:
        sizes = {key: value for key, value in sizes.items() if key != "width"}
    for key, value in node.items():
        if OmegaConf.is_dict(value):
            if value.get("_target_", "").endswith(("Recurrent", "LocalAttention")):
                node[key] = None
            else:
                shrink(value, sizes)
        elif OmegaConf.is_list(value) and key in ("depths", "widths"):
            node[key] = [1 if key == "depths" else sizes["width"]] * len(value)
        elif key in sizes and isinstance(value, int):
            node[key] = sizes[key]


def shrink_scales(config: DictConfig) -> None:
    """Make the tokens of a multi-scale codec squares of 4 x 4 narrow cells in place; others stay as they are."""
    if "scales" in config.bottleneck:
        config.codec.encoder.side = 4
        config.bottleneck.scales, config.bottleneck.refinements = [1, 2, 4], 2
        config.bottleneck.level.dim = NARROW["width"]
        config.length.codebooks.distribution.lengths = [1, 5, 21]
