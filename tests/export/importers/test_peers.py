"""Imports beside the packages that save the weights: equal codes, equal signals."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.streaming import ChunkedCodec
from varitok.export.importers.importer import import_weights

Encode = Callable[[Tensor], Tensor]
ENCODEC = {
    "num_filters": 4,
    "hidden_size": 16,
    "codebook_size": 32,
    "codebook_dim": 16,
    "target_bandwidths": [1.5],
}
MUSIC = {"audio_channels": 2, "norm_type": "time_group_norm", "use_causal_conv": False, "sampling_rate": 48000}
DAC = {"encoder_hidden_size": 4, "decoder_hidden_size": 48, "n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4}
MIMI = {
    "num_filters": 4,
    "hidden_size": 32,
    "codebook_size": 32,
    "codebook_dim": 16,
    "vector_quantization_hidden_dimension": 16,
    "num_quantizers": 4,
    "upsample_groups": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "sliding_window": 5,
    "layer_scale_initial_scale": 0.5,
}
# Name of the family, model of transformers, and sizes: narrow ones, and those that are published.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encodec": ("encodec", "Encodec", ENCODEC),
    "encodec_48k": ("encodec_48k", "Encodec", ENCODEC | MUSIC),
    "dac_44k": ("dac_44k", "Dac", DAC | {"sampling_rate": 44100}),
    "dac_24k": ("dac_24k", "Dac", DAC | {"sampling_rate": 24000, "downsampling_ratios": [2, 4, 5, 8]}),
    "mimi": ("mimi", "Mimi", MIMI),
}
PUBLISHED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "encodec": ("encodec", "Encodec", {}),
    "encodec_48k": (
        "encodec_48k",
        "Encodec",
        MUSIC
        | {"target_bandwidths": [3.0, 6.0, 12.0, 24.0], "chunk_length_s": 1.0, "overlap": 0.01, "normalize": True},
    ),
    "dac_16k": ("dac_16k", "Dac", {"n_codebooks": 12, "sampling_rate": 16000, "downsampling_ratios": [2, 4, 5, 8]}),
    "dac_24k": ("dac_24k", "Dac", {"n_codebooks": 32, "sampling_rate": 24000, "downsampling_ratios": [2, 4, 5, 8]}),
    "dac_44k": ("dac_44k", "Dac", {"n_codebooks": 9, "sampling_rate": 44100}),
    "mimi": ("mimi", "Mimi", {}),
}


def randomized(model: nn.Module) -> nn.Module:
    """Set all codebooks to random entries: those of a new model are zeros."""
    random = torch.Generator().manual_seed(0)
    for name, value in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith((".embed", ".embed_sum", "codebook.weight")):
            value.data.copy_(0.3 * torch.randn(value.shape, generator=random))
        elif name.endswith("cluster_usage"):
            value.data.copy_(0.5 + torch.rand(value.shape, generator=random))
    return model.eval()


def coding(model: Any) -> tuple[Encode, Callable[[Tensor], Tensor]]:
    """Return how a model of transformers encodes to codes `(b, q, n)`, and decodes them."""
    kind = type(model).__name__
    if kind == "EncodecModel":
        quantizer = model.quantizer
        return (
            lambda x: quantizer.encode(model.encoder(x)).transpose(0, 1),
            lambda codes: model.decoder(quantizer.decode(codes.transpose(0, 1))),
        )
    if kind == "DacModel":

        def encode(x: Tensor) -> Tensor:
            whole = nn.functional.pad(x, (0, -x.shape[2] % model.config.hop_length))
            codes: Tensor = model.quantizer(model.encoder(whole))[1]
            return codes

        return encode, lambda codes: model.decoder(model.quantizer.from_codes(codes)[0])
    return lambda x: model.encode(x).audio_codes, lambda codes: model.decode(codes).audio_values


@torch.no_grad()
def compare(codec: Codec, encode: Encode, decode: Encode, steps: list[float], batch: int = 2) -> None:
    """Codes of signals of some steps of the grid are equal, also of one codebook, and so are the signals."""
    random = torch.Generator().manual_seed(1)
    for count in steps:
        signal = 0.3 * torch.randn(batch, codec.encoder.channels, int(count * codec.downsample[0]), generator=random)
        codes = encode(signal)
        assert torch.equal(codec.encode(signal), codes)
        for kept in {1, max(1, codes.shape[1] // 2), codes.shape[1]}:
            theirs = decode(codes[:, :kept])
            ours = codec.decode(codes[:, :kept])
            # DAC's decoder drops the last samples if a stride is odd.
            rest = ours[..., theirs.shape[2] :]
            assert not rest.any() and rest.shape[2] < 16
            error = (ours[..., : theirs.shape[2]] - theirs).abs().max()
            assert float(error) <= 1e-5 * float(theirs.abs().max())


def _made(name: str, sizes: dict[str, Any], folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = randomized(getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**sizes)))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("case", CASES)
def test_a_narrow_model_of_transformers_codes_alike(case: str, tmp_path: Path) -> None:
    family, name, sizes = CASES[case]
    model = _made(name, sizes, tmp_path)
    found = import_weights(tmp_path, family if name == "Dac" else None)
    assert (found.family.name, found.layout.name) == (family, "transformers")
    compare(found.codec, *coding(model), steps=[9, 4.6, 0.02])


@pytest.mark.slow
@pytest.mark.parametrize("case", PUBLISHED)
def test_a_model_of_transformers_of_published_size_codes_alike(case: str, tmp_path: Path) -> None:
    family, name, sizes = PUBLISHED[case]
    model = _made(name, sizes, tmp_path)
    found = import_weights(tmp_path)  # recognized from names, shapes and config.json
    assert (found.family.name, found.layout.name) == (family, "transformers")
    learned = sum(weight.numel() for weight in found.codec.parameters())
    theirs = sum(weight.numel() for weight in model.parameters())
    # transformers folds the weight norm of DAC, which trains with it.
    assert learned == theirs or name == "Dac"
    compare(found.codec, *coding(model), steps=[9.3], batch=1)


@pytest.mark.parametrize("kind", ["encodec", "encodec_48k"])
def test_a_narrow_model_of_the_package_encodec_codes_alike(kind: str, tmp_path: Path) -> None:
    encodec = pytest.importorskip("encodec")
    stereo = kind == "encodec_48k"
    torch.manual_seed(0)
    sizes = {"channels": 2 if stereo else 1, "dimension": 16, "n_filters": 4, "causal": not stereo}
    sizes |= {"norm": "time_group_norm" if stereo else "weight_norm"}
    encoder, decoder = encodec.modules.SEANetEncoder(**sizes), encodec.modules.SEANetDecoder(**sizes)
    quantizer = encodec.quantization.ResidualVectorQuantizer(dimension=16, n_q=4, bins=32)
    model = randomized(encodec.EncodecModel(encoder, decoder, quantizer, [1.5], 24000, sizes["channels"]))
    torch.save(model.state_dict(), tmp_path / "encodec.th")
    found = import_weights(tmp_path / "encodec.th")
    assert (found.family.name, found.layout.name) == (kind, "encodec")
    compare(
        found.codec,
        lambda x: quantizer.vq.encode(encoder(x)).transpose(0, 1),
        lambda codes: decoder(quantizer.decode(codes.transpose(0, 1))),
        steps=[9, 4.6, 0.02],
    )


@pytest.mark.parametrize("case", ["dac_44k", "dac_24k"])
def test_a_narrow_model_of_descript_audio_codec_codes_alike(case: str, tmp_path: Path) -> None:
    dac = pytest.importorskip("dac")
    rates = [2, 4, 8, 8] if case == "dac_44k" else [2, 4, 5, 8]
    sizes = {"encoder_dim": 4, "encoder_rates": rates, "decoder_dim": 48, "decoder_rates": rates[::-1]}
    sizes |= {"n_codebooks": 3, "codebook_size": 32, "codebook_dim": 4}
    sizes |= {"sample_rate": 44100 if case == "dac_44k" else 24000}
    torch.manual_seed(0)
    model: Any = randomized(dac.DAC(**sizes))
    torch.save({"state_dict": model.state_dict(), "metadata": {"kwargs": sizes}}, tmp_path / "weights.pth")
    found = import_weights(tmp_path / "weights.pth", case)
    assert found.layout.name == "descript-audio-codec"
    compare(
        found.codec,
        lambda x: model.quantizer(model.encoder(model.preprocess(x, None)))[1],
        lambda codes: model.decoder(model.quantizer.from_codes(codes)[0]),
        steps=[9, 4.6, 0.02],
    )


MOSHI = {
    "narrow": {"width": 32, "base": 4, "depth": 2, "hidden": 64, "codebooks": 4, "size": 32, "dim": 16},
    "published": {"width": 512, "base": 64, "depth": 8, "hidden": 2048, "codebooks": 32, "size": 2048, "dim": 256},
}


def moshi_model(**sizes: int) -> Any:
    """Make Mimi of the package moshi, whose layer scales start at 0.01, and are given more effect."""
    loaders = pytest.importorskip("moshi.models.loaders")
    defaults, width = loaders._mimi_config, sizes["width"]
    torch.manual_seed(0)
    model = loaders.get_mimi(
        None,
        defaults
        | {
            "seanet": defaults["seanet"] | {"dimension": width, "n_filters": sizes["base"]},
            "transformer": defaults["transformer"]
            | {"d_model": width, "input_dimension": width, "output_dimensions": [width], "layer_scale": 0.5}
            | {"num_layers": sizes["depth"], "dim_feedforward": sizes["hidden"]},
            "quantizer": {"dimension": sizes["dim"], "n_q": sizes["codebooks"], "bins": sizes["size"]}
            | {"input_dimension": width, "output_dimension": width},
        },
        num_codebooks=sizes["codebooks"],
    )
    return randomized(model).requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize("case", ["narrow", pytest.param("published", marks=pytest.mark.slow)])
def test_mimi_of_the_package_moshi_codes_alike(case: str, tmp_path: Path) -> None:
    model = moshi_model(**MOSHI[case])
    # The published file was written before the package numbered these matrices; it reads both.
    older = {"in_projs.0.weight": "in_proj_weight", "out_projs.0.weight": "out_proj.weight"}
    state = model.state_dict()
    for new, old in older.items():
        state = {name.replace(new, old): value for name, value in state.items()}
    save_file(state, tmp_path / "tokenizer.safetensors")
    found = import_weights(tmp_path / "tokenizer.safetensors")
    assert (found.family.name, found.layout.name) == ("mimi", "moshi")
    assert sum(weight.numel() for weight in found.codec.parameters()) == sum(w.numel() for w in model.parameters())
    compare(found.codec, model.encode, model.decode, steps=[9, 4.6, 0.02] if case == "narrow" else [9.3])
    if case == "published":
        return
    torch.save({"model": model.state_dict()}, tmp_path / "tokenizer.pt")
    newer = import_weights(tmp_path / "tokenizer.pt").codec.state_dict()
    assert all(torch.equal(newer[name], value) for name, value in found.codec.state_dict().items())
    # Chunk by chunk, both code alike.
    chunked, signal, states = ChunkedCodec(found.codec), 0.3 * torch.randn(1, 1, 6 * 1920), [None, None]
    with model.streaming(1):
        for chunk in signal.split(2 * 1920, 2):
            codes, states[0] = chunked.encode_chunk(chunk, states[0])  # type: ignore[call-overload]
            assert torch.equal(codes, model.encode(chunk))
            sound, states[1] = chunked.decode_chunk(codes, states[1])  # type: ignore[call-overload]
            theirs = model.decode(codes)
            torch.testing.assert_close(sound, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()))


def vocos_model(**sizes: int) -> Any:
    """Make a model of the package vocos; its blocks start nearly without effect, and are given some."""
    vocos = pytest.importorskip("vocos")
    torch.manual_seed(0)
    bands, window = sizes["bands"], sizes["window"]
    features = vocos.feature_extractors.MelSpectrogramFeatures(24000, window, window // 4, bands)
    backbone = vocos.models.VocosBackbone(bands, sizes["base"], 3 * sizes["base"], sizes["depth"])
    model = vocos.Vocos(features, backbone, vocos.heads.ISTFTHead(sizes["base"], window, window // 4, "center"))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.add_((0.2 if "head" not in name else 0.02) * torch.randn_like(value))
    return model.eval()


VOCOS = {
    "narrow": {"bands": 12, "window": 64, "base": 16, "depth": 2},
    "published": {"bands": 100, "window": 1024, "base": 512, "depth": 8},
}


@torch.no_grad()
@pytest.mark.parametrize("case", ["narrow", pytest.param("published", marks=pytest.mark.slow)])
def test_a_model_of_the_package_vocos_decodes_alike(case: str, tmp_path: Path) -> None:
    model = vocos_model(**VOCOS[case])
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    found = import_weights(tmp_path)
    assert (found.family.name, found.layout.name) == ("vocos", "vocos")
    codec, hop = found.codec, found.codec.downsample[0]
    assert sum(weight.numel() for weight in codec.parameters()) == sum(w.numel() for w in model.parameters())
    for steps in (9, 30):
        signal = 0.3 * torch.randn(2, 1, steps * hop)
        signal[1, :, 4 * hop :] = 0  # silence is at the floor
        # The package has a frame more than hops, and leaves out the hop after the last frame.
        theirs = model.feature_extractor(signal[:, 0])[:, :, :steps]
        latents = codec.encode(signal)
        torch.testing.assert_close(latents, theirs, atol=1e-4, rtol=1e-4)
        sound = model.decode(theirs)
        error = (codec.decode(theirs)[:, 0, : sound.shape[1]] - sound).abs().max()
        assert sound.shape[1] == (steps - 1) * hop and float(error) <= 1e-5 * float(sound.abs().max())


def test_a_vocos_of_other_features_is_refused(tmp_path: Path) -> None:
    state = vocos_model(**VOCOS["narrow"]).state_dict()
    bank = "feature_extractor.mel_spec.mel_scale.fb"
    torch.save(state | {bank: state[bank].flip(1)}, tmp_path / "other.bin")
    with pytest.raises(UserError, match="its mel bands aren't those of torchaudio at 24000 Hz"):
        import_weights(tmp_path / "other.bin")
    torch.save({name: value for name, value in state.items() if name != bank}, tmp_path / "codes.bin")
    with pytest.raises(UserError, match="is a Vocos of other features than mel bands"):
        import_weights(tmp_path / "codes.bin")
