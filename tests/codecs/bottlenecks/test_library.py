"""Quantizers of vector-quantize-pytorch behind the contract, beside the package's own modules."""

import hydra
import pytest
import torch
import vector_quantize_pytorch

from varitok import UserError
from varitok.codecs.bottlenecks.library import OTHERS, QUANTIZERS, library
from varitok.codecs.build import build

from ..examples import LIBRARY

CHANCE = {"kmeans_init", "threshold_ema_dead_code"}
# Whose codebooks move without chance: no k-means, and no entry that dies.
STEADY = {
    "cosine": ("VectorQuantize", {"dim": 6, "codebook_size": 19, "codebook_dim": 4, "use_cosine_sim": True}),
    "heads": ("VectorQuantize", {"dim": 6, "codebook_size": 19, "codebook_dim": 3, "heads": 2}),
    "rvq_passed": ("ResidualVQ", {"dim": 5, "codebook_size": 19, "num_quantizers": 3, "quant_grad_frac": 0.3}),
    "fsq_rotated": ("FSQ", {"levels": [5, 5, 5], "orthogonal_rotation": True, "preserve_symmetry": True}),
    "fsq_soft": ("ResidualFSQ", {"levels": [5, 3], "num_quantizers": 2, "bound_hard_clamp": False}),
    "lfq_wide": (
        "LFQ",
        {"codebook_size": 64, "num_codebooks": 2, "soft_clamp_input_value": 3.0, "codebook_scale": 2.0},
    ),
    "lfq_grouped": ("GroupedResidualLFQ", {"dim": 8, "groups": 2, "codebook_size": 16, "num_quantizers": 2}),
    "lfq_residual": (
        "ResidualLFQ",
        {"codebook_size": 16, "dim": 4, "num_quantizers": 2, "soft_clamp_input_value": 4.0},
    ),
    "sim_vq_residual": ("ResidualSimVQ", {"dim": 5, "codebook_size": 19, "num_quantizers": 2, "rotation_trick": False}),
    "fsq_grouped": ("GroupedResidualFSQ", {"dim": 4, "groups": 2, "levels": [5, 3], "num_quantizers": 2}),
} | {name: (kind, given) for name, (kind, given) in LIBRARY.items() if not {*given} & CHANCE}


def _both(name):
    """Make ours and the package's, with the same weights."""
    quantizer, arguments = STEADY[name]
    torch.manual_seed(0)
    ours = library(quantizer, arguments)
    torch.manual_seed(0)
    sizes = arguments.get("codebook_size")
    theirs = arguments | ({"codebook_size": tuple(sizes)} if isinstance(sizes, list) else {})
    return ours, getattr(vector_quantize_pytorch, quantizer)(**theirs)


def _latents(dim, seed=1):
    return torch.randn(4, 25, dim, generator=torch.Generator().manual_seed(seed))


def _forward(ours, latents):
    torch.manual_seed(5)
    return ours(latents, torch.full((len(latents),), latents.shape[1]), ours.depths(latents))


def _theirs(module, latents):
    """Return latents, codes `(b, codebooks, n)` in our order, and the sum of the losses, of the package's module."""
    torch.manual_seed(5)
    found = module(latents)
    if torch.is_tensor(found):  # random projections give codes alone
        return None, found.reshape(*latents.shape[:2], -1).transpose(1, 2), 0.0
    quantized, codes, *loss = found
    if codes.ndim == 4:  # groups before all else: ours follow level by level
        codes = codes.permute(1, 2, 3, 0)
    return quantized, codes.reshape(*latents.shape[:2], -1).transpose(1, 2), loss[0].sum() if loss else 0.0


def _codebooks(module):
    return [value for key, value in module.state_dict().items() if key.endswith(("embed", "embed_avg", "cluster_size"))]


@pytest.mark.parametrize("name", STEADY)
def test_evaluation_is_the_packages_own(name):
    ours, theirs = _both(name)
    ours.eval(), theirs.eval()
    latents = _latents(ours.dim)
    quantized, codes, _ = _theirs(theirs, latents)
    assert torch.equal(ours.encode(latents), codes)
    if quantized is not None:
        torch.testing.assert_close(ours.decode(codes.long()), quantized, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in STEADY if "random" not in name])
def test_a_step_of_training_is_the_packages_own(name):
    """Latents, their gradient and that of all losses, and the codebooks afterwards."""
    ours, theirs = _both(name)
    mine, other = _latents(ours.dim).requires_grad_(), _latents(ours.dim).requires_grad_()
    weights = _latents(ours.dim, seed=2)
    quantized, codes, loss = _theirs(theirs, other)
    found = _forward(ours, mine)
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.latents, quantized, atol=1e-5, rtol=1e-5)
    # Groups are averaged here, and added up there.
    loss = loss / (2 if "groups" in STEADY[name][1] else 1)
    ((quantized * weights).sum() + 100 * loss).backward()
    ((found.latents * weights).sum() + 100 * sum(found.penalties.values())).backward()
    torch.testing.assert_close(mine.grad, other.grad, atol=1e-4, rtol=1e-4)
    gradients = [parameter.grad for parameter in ours.parameters()]
    for one, its in zip(gradients, (parameter.grad for parameter in theirs.parameters()), strict=True):
        torch.testing.assert_close(one, its, atol=1e-4, rtol=1e-4)
    ours.update()
    for one, its in zip(_codebooks(ours), _codebooks(theirs), strict=True):
        torch.testing.assert_close(one, its, atol=1e-5, rtol=1e-5)


def test_random_projections_decode_to_latents_of_the_same_codes():
    arguments = {"dim": 9, "codebook_size": 50, "codebook_dim": 4, "norm": False}
    bottleneck = library("RandomProjectionQuantizer", arguments)
    codes = bottleneck.encode(_latents(9))
    assert torch.equal(bottleneck.encode(bottleneck.decode(codes)), codes)


def test_sizes_are_those_of_each_codebook():
    sizes = {name: library(*given).codebook_sizes for name, given in LIBRARY.items()}
    assert sizes["rvq"] == (19, 11, 7)
    assert sizes["rvq_grouped"] == (19,) * 4
    assert sizes["fsq"] == (60, 60)
    assert sizes["fsq_residual"] == (60,) * 3
    assert sizes["lfq"] == (32,)
    assert sizes["random_projection"] == (19, 19)


def test_dead_entries_become_valid_tokens():
    arguments = {"dim": 3, "codebook_size": 40, "threshold_ema_dead_code": 1, "decay": 0.5, "kmeans_init": True}
    bottleneck = library("VectorQuantize", arguments)
    latents, lengths = _latents(3), torch.tensor([25, 10, 3, 1])
    latents[torch.arange(25) >= lengths[:, None]] = 1000.0
    for _ in range(3):
        quantized = bottleneck(latents, lengths, bottleneck.depths(latents))
        bottleneck.update()
    assert quantized.metrics["replaced"] > 0
    assert all(value.abs().max() < 100 for value in _codebooks(bottleneck))


@pytest.mark.parametrize(
    ("quantizer", "arguments", "message"),
    [
        ("ResidualVq", {}, r"quantizer=ResidualVq: .*; did you mean ResidualVQ"),
        ("nothing", {}, r"quantizer=nothing: .*; there are GroupedResidualVQ, "),
        ("HierarchicalVQ", {"dim": 4}, r"quantizer=HierarchicalVQ: has codebooks for a fixed number of tokens"),
        (
            "ResidualVQ",
            {"dim": 4, "comitment_weight": 1.0},
            r"arguments.comitment_weight: .*; did you mean commitment_",
        ),
        ("VectorQuantize", {"dim": 4}, r"arguments: VectorQuantize: .*missing .* 'codebook_size'"),
        ("LFQ", {"codebook_size": 9}, r"arguments: LFQ: your codebook size must be a power of 2"),
        ("SimVQ", {"dim": 4, "codebook_size": 9, "channel_first": True}, r"arguments.channel_first=True: latents are"),
        (
            "GroupedResidualFSQ",
            {"dim": 5, "groups": 2, "levels": [3, 3], "num_quantizers": 1},
            r"arguments: GroupedResidualFSQ: assert \(dim % groups",
        ),
    ],
)
def test_a_mistake_is_told_in_one_line(quantizer, arguments, message):
    with pytest.raises(UserError, match=rf"^bottleneck\.{message}") as told:
        library(quantizer, arguments)
    assert "\n" not in str(told.value)


def test_every_quantizer_of_the_package_is_taken_or_refused():
    """A class that a new version brings is noticed here."""
    offered = {name for name, found in vars(vector_quantize_pytorch).items() if isinstance(found, type)}
    assert offered - {"Sequential"} == {*QUANTIZERS, *OTHERS}


def test_a_command_line_names_another_class():
    with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
        overrides = ["bottleneck.quantizer=FSQ", "~bottleneck.arguments", "+bottleneck.arguments={levels: [8, 5, 5]}"]
        made = build(hydra.compose("bottleneck/library", overrides).bottleneck)
    assert made.codebook_sizes == (200,)
