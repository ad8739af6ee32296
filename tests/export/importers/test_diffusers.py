"""Imported auto-encoders compute what diffusers' do, with random weights, at published size and narrow."""

import pytest
import torch
from torch import nn

from varitok import UserError
from varitok.export.importers.importer import import_weights

from .test_images import compare, images

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.slow

WIDE = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "norm_num_groups": 32}
NARROW = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 4}
BARE = {"use_quant_conv": False, "use_post_quant_conv": False, "latent_channels": 16}
GAUSSIAN = {
    "sd_vae": WIDE | {"latent_channels": 4},
    "flux": WIDE | BARE,
    "narrow": NARROW | {"latent_channels": 3},
    "narrow_bare": NARROW | BARE,
    "narrow_without_attention": NARROW | {"mid_block_add_attention": False},
}
VECTORS = {
    "vq_f4": WIDE | {"block_out_channels": (128, 256, 512), "latent_channels": 3, "num_vq_embeddings": 8192},
    "narrow": NARROW | {"latent_channels": 6, "vq_embed_dim": 4, "num_vq_embeddings": 64},
}


def _saved(model: type[nn.Module], options, folder) -> nn.Module:
    """Save a model of random weights as diffusers does."""
    torch.manual_seed(0)
    levels = len(options["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    made = model(**options, **blocks).eval().requires_grad_(False)
    for weight in made.parameters():  # norms and biases that do something
        weight.add_(0.1 * torch.randn_like(weight) if weight.dim() == 1 else 0.0)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("name", GAUSSIAN)
def test_latents_and_images_are_those_of_autoencoder_kl(name, tmp_path):
    published = _saved(diffusers.AutoencoderKL, GAUSSIAN[name], tmp_path)
    found = import_weights(tmp_path)
    assert (found.family.name, found.layout.name) == ("sd_vae", "diffusers")
    assert sum(one.numel() for one in found.codec.parameters()) == sum(one.numel() for one in published.parameters())
    compare(
        found.codec,
        lambda x: published.encode(x).latent_dist.mean,
        lambda z: published.decode(z).sample,
        images(2, 3, 32, 48),
    )


@pytest.mark.parametrize("name", VECTORS)
def test_codes_and_images_are_those_of_vq_model(name, tmp_path):
    published = _saved(diffusers.VQModel, VECTORS[name], tmp_path)
    table = published.quantize.embedding.weight
    table.copy_(0.5 * torch.randn_like(table))
    published.save_pretrained(tmp_path)
    found = import_weights(tmp_path)
    assert (found.family.name, found.layout.name) == ("vqgan", "diffusers")

    def encode(x: torch.Tensor) -> torch.Tensor:
        latents = published.encode(x).latents
        return published.quantize(latents)[2][2].reshape(len(x), 1, *latents.shape[2:])

    def decode(codes: torch.Tensor) -> torch.Tensor:
        entries = torch.nn.functional.embedding(codes[:, 0], table).movedim(-1, 1)
        return published.decode(entries, force_not_quantize=True).sample

    compare(found.codec, encode, decode, images(2, 3, 32, 48))


def test_names_before_diffusers_0_15_and_shards_load_too(tmp_path):
    published = _saved(diffusers.AutoencoderKL, GAUSSIAN["narrow"], tmp_path / "old")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = published.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    (tmp_path / "old" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(state, tmp_path / "old" / "diffusion_pytorch_model.bin")
    published.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    one, other = (import_weights(tmp_path / name).codec.state_dict() for name in ("old", "shards"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_configuration_that_contradicts_the_tensors_is_told(tmp_path):
    _saved(diffusers.AutoencoderKL, GAUSSIAN["narrow"], tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"layers_per_block": 1', '"layers_per_block": 2'))
    with pytest.raises(UserError, match="its configuration says layers_per_block=2, its tensors 1"):
        import_weights(tmp_path)
