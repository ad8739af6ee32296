"""Vocos (arXiv 2306.00814) on mel spectrograms, as the package vocos saves it."""

from collections.abc import Iterator

from varitok import UserError
from varitok.codecs.codec import Codec
from varitok.codecs.networks.layers.stft import mel_bank
from varitok.codecs.networks.vocos import VocosDecoder

from ..family import Family, Layout, Sizes
from ..source import Source

__all__ = ["FAMILIES"]

RATE = 24000
BANK = "feature_extractor.mel_spec.mel_scale.fb"
BLOCK = {"dwconv": "depthwise.layer", "norm": "norm", "pwconv1": "wide", "pwconv2": "out"}


def _sizes(source: Source) -> Sizes:
    if BANK not in source.shapes:
        raise UserError(f"{source.path}: is a Vocos of other features than mel bands, which can't be imported")
    bins, bands = source.shape(BANK)
    window = 2 * (bins - 1)
    expected = mel_bank(RATE, bands, window, 0.0, None, "htk")
    if not source.take(BANK).allclose(expected, atol=1e-4):
        raise UserError(f"{source.path}: its mel bands aren't those of torchaudio at {RATE} Hz, which vocos takes")
    base, _, _ = source.shape("backbone.embed.weight")
    values = {
        "codec.encoder.bands": bands,
        "codec.encoder.window": window,
        "codec.encoder.hop_length": window // 4,  # no tensor shows it
        "codec.decoder.base": base,
        "codec.decoder.hidden": source.shape("backbone.convnext.0.pwconv1.weight")[0],
        "codec.decoder.depth": source.count(r"backbone\.convnext\.\d+\.scale"),
    }
    return Sizes(values, {})


def _names(codec: Codec) -> Iterator[tuple[str, str]]:
    assert isinstance(codec.decoder, VocosDecoder)
    yield "backbone.embed", "decoder.first.layer"
    yield "backbone.norm", "decoder.norm"
    for index in range(len(codec.decoder.blocks)):
        theirs, ours = f"backbone.convnext.{index}", f"decoder.blocks.{index}"
        yield theirs, ours
        for one, other in BLOCK.items():
            yield f"{theirs}.{one}", f"{ours}.{other}"
    yield "backbone.final_layer_norm", "decoder.last_norm"
    yield "head.out", "decoder.out"


FAMILIES = (
    Family(
        "vocos",
        "Vocos on mel bands at 24 kHz",
        "audio/vocos",
        (Layout("vocos", ("backbone.convnext.0.gamma", "head.istft.window"), {r"\.gamma$": ".scale"}),),
        _sizes,
        _names,
        fixed={"data.sample_rate": RATE},
        marks={},
        ignored=(r"head\.istft\.window", r"feature_extractor\.mel_spec\..*"),
    ),
)
