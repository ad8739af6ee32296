"""Imported image codecs compute what the published ones do.

taming-transformers, LlamaGen, Cosmos-Tokenizer and 1d-tokenizer are no packages: those are compared with the networks
beside this file.
"""

import pytest
import torch

from varitok import UserError
from varitok.export.importers.importer import import_weights

from .titok import TiTok
from .vqgan import Tokenizer

# Form of the tensors, family, multipliers of the stages, the encoder's channels and those of latents.
FORMS = {
    "taming": ("vqgan", (1, 2), 8, 8),
    "llamagen": ("llamagen", (1, 1, 2), 8, 4),
    "cosmos": ("cosmos_ci", (2, 4, 4), 16, 16),
    "cosmos_di": ("cosmos_di", (2, 4, 4), 32, 6),
    "ldm": ("sd_vae", (1, 2), 4, 4),
}


def images(*size: int) -> torch.Tensor:
    return torch.rand(*size, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def compare(ours, encode, decode, signal: torch.Tensor) -> None:
    """Check an imported codec against functions of the published one; `signal` is of whole steps."""
    codes, expected = ours.encode(signal), encode(signal)
    if codes.dtype == torch.int64:
        assert torch.equal(codes, expected)
        assert len(codes.unique()) > 4
    else:
        torch.testing.assert_close(codes, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
    decoded, wanted = ours.decode(expected), decode(expected)
    torch.testing.assert_close(decoded, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    # Of a size that isn't whole steps, the last row and column are repeated, and cropped again.
    step = ours.downsample[0]
    odd = signal[:1, :, : signal.shape[2] - 1, : signal.shape[3] - step + 2]
    whole = torch.nn.functional.pad(odd, (0, step - 2, 0, 1), mode="replicate")
    torch.testing.assert_close(ours.encode(odd).double(), encode(whole).double(), rtol=0, atol=1e-5 * codes.abs().max())
    assert ours.decode(codes[:1], odd.shape[2:]).shape == odd.shape


@pytest.mark.parametrize("form", ["taming", *(pytest.param(one, marks=pytest.mark.slow) for one in list(FORMS)[1:])])
def test_published_tensors_give_the_published_codes_and_images(form, tmp_path):
    torch.manual_seed(0)
    family, multipliers, width, dim = FORMS[form]
    published = Tokenizer(form, multipliers, width, dim, size=64)
    state = published.state_dict() | ({"loss.logvar": torch.zeros(())} if form == "taming" else {})
    torch.save({"state_dict" if form == "taming" else "model": state}, tmp_path / "weights.pt")
    found = import_weights(tmp_path / "weights.pt")
    assert found.family.name == family
    compare(found.codec, published.encode, published.decode, images(2, 3, 32, 48))


@pytest.mark.slow
@torch.no_grad()
def test_tokens_of_an_image_are_those_of_titok(tmp_path):
    """Theirs are of images in [0, 1]; a prefix of the tokens decodes too."""
    torch.manual_seed(0)
    published = TiTok(side=32, patch=8, widths=(128, 192), depth=2, tokens=6, dim=64, size=50)
    torch.save(published.state_dict(), tmp_path / "pytorch_model.bin")
    found = import_weights(tmp_path)
    assert found.family.name == "titok"
    pictures = images(3, 3, 32, 32)
    codes = published.encode((pictures + 1) / 2)
    assert torch.equal(found.codec.encode(pictures), codes)
    assert len(codes.unique()) > 4
    for kept in (6, 2):
        expected = 2 * published.decode(codes[..., :kept]) - 1
        decoded = found.codec.decode(codes[..., :kept])
        torch.testing.assert_close(decoded, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_a_titok_of_two_stages_is_told(tmp_path):
    names = ("latent_tokens", "encoder.class_embedding", "quantize.embedding.weight", "decoder.ffn.2.weight")
    torch.save(dict.fromkeys(names, torch.zeros(2, 2)), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="a TiTok of two stages can't be imported yet; take BL-64"):
        import_weights(tmp_path)
