"""Feature clips: blocks of unlike numbers of tokens, their metrics and pictures, and a codec that learns them."""

from functools import cache

import numpy as np
import pytest
import torch

import varitok
from varitok import UserError
from varitok.codecs.allocation import allocate
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.evaluation.cli import validation_splits
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.lengths.distributions import Uniform
from varitok.codecs.lengths.policy import LengthPolicy, MaskToken, Truncate, Zeros
from varitok.codecs.metrics import feature
from varitok.codecs.modalities.feature import Feature
from varitok.codecs.modalities.media import principal_colors, write_mp4
from varitok.codecs.modalities.registry import modality_of
from varitok.codecs.networks.block_queries import BlockQueryDecoder, BlockQueryEncoder
from varitok.codecs.streaming import ChunkedCodec
from varitok.codecs.training.callbacks.samples import reconstructions
from varitok.codecs.training.run import build_run
from varitok.data.batch import Batch, Sample, collate

from ...composing import composed

FIRST, LATER, CHANNELS, SIZE = 7, 3, 6, (3, 5)
FORM = {
    "image_size": list(SIZE), "patch": [1, 1, 1], "tokens": FIRST, "later_tokens": LATER, "width": 32, "depth": 2,
    "heads": 4, "channels": CHANNELS,
}  # fmt: skip
MECHANISMS = {"truncate": Truncate, "zeros": Zeros, "mask_token": lambda: MaskToken(32)}


@cache
def tiny(mechanism="truncate", unit_latents=False, **form):
    torch.manual_seed(0)
    encoder, decoder = (side(**FORM | form) for side in (BlockQueryEncoder, BlockQueryDecoder))
    policy = LengthPolicy(Uniform(), MECHANISMS[mechanism]())
    codebook = FiniteScalarQuantizer([8, 8, 8])
    return Codec(encoder, codebook, decoder, policy, unit_latents, frame_rate=2.0, bounded=False).eval()


def clip(frames, batch=2):
    return 2 * torch.randn(batch, CHANNELS, frames, *SIZE, generator=torch.Generator().manual_seed(frames))


def test_later_blocks_have_fewer_tokens():
    codec = tiny()
    assert codec.layout.valid(torch.tensor([4, 2]), (4, *SIZE)).reshape(2, 4).tolist() == [[7, 3, 3, 3], [7, 3, 0, 0]]
    codes = codec.encode(clip(4))
    assert codes.shape == (2, 1, 4, FIRST)
    beyond = codes[:, :, 1:, LATER:]
    assert len(beyond.unique()) == 1 and len(codes[:, :, 0, LATER:].unique()) > 1


def test_bits_and_codes_are_counted_exactly():
    batch = collate([Sample(one) for one in (clip(4)[0], clip(2)[0])])
    table = evaluate(tiny(), [batch])
    tokens = {1: 4 + 2, 2: 8 + 4, 4: 4 + 9 + 4 + 3, 7: 7 + 9 + 7 + 3}  # of both clips
    assert [row["bits"] for row in table.rows] == [9 * count / 2 for count in tokens.values()]
    assert [row["bytes"] for row in table.rows] == [
        sum(-(-9 * min(k, most) // 8) for most in (7, 3, 3, 3, 7, 3)) / 2 for k in tokens
    ]
    assert [row["bpf"] for row in table.rows] == [9 * count / 6 for count in tokens.values()]
    assert table.rows[-1]["usage"] <= 26 / 512, "codes beyond a block's own don't count"


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("shortcut", [False, True])
def test_what_is_beyond_a_blocks_tokens_is_not_read(mechanism, shortcut):
    codec, signal = tiny(mechanism, shortcut=shortcut), clip(4)
    codes = codec.encode(signal)
    changed = codes.clone()
    changed[:, :, 1:, LATER:] = 100
    back = codec.decode(codes)
    torch.testing.assert_close(codec.decode(changed), back, rtol=0, atol=1e-5)
    for kept in (1, LATER, 5, FIRST):
        cut = codec.decode(codes[..., :kept])
        lengths = torch.tensor([kept, *[min(kept, LATER)] * 3])
        torch.testing.assert_close(codec.decode(codes, lengths=lengths.expand(2, -1)), cut, rtol=0, atol=1e-5)
        torch.testing.assert_close(codec(signal, lengths.repeat(2)).signal, cut, rtol=0, atol=1e-5)
    torch.testing.assert_close(codec(signal).signal, back, rtol=0, atol=1e-5)


def test_with_as_many_tokens_everywhere_nothing_changes():
    same, plain = tiny(later_tokens=FIRST), tiny(later_tokens=None)
    assert torch.equal(same.encode(clip(3)), plain.encode(clip(3)))
    assert torch.equal(same.decode(same.encode(clip(3))), plain.decode(plain.encode(clip(3))))


def test_a_frame_knows_nothing_of_later_ones():
    codec, signal = tiny(), clip(5)
    changed = signal.clone()
    changed[:, :, 3:] += 1
    before, after = codec.encode(signal), codec.encode(changed)
    assert torch.equal(before[:, :, :3], after[:, :, :3]) and not torch.equal(before, after)
    torch.testing.assert_close(codec.decode(before[:, :, :3]), codec.decode(before)[:, :, :3], rtol=0, atol=1e-5)
    changed = signal.clone()
    changed[:, :, 0] += 1
    assert not torch.equal(codec.encode(changed)[:, :, 1, :LATER], before[:, :, 1, :LATER]), "P-frames see the I-frame"


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (2, 3), (4, 1)])
def test_chunks_are_the_whole(mechanism, cuts):
    codec, signal = tiny(mechanism, mechanism == "zeros", window=2), clip(5)
    chunked = ChunkedCodec(codec)
    whole, back = codec.encode(signal), codec.decode(codec.encode(signal))
    parts, state = [], None
    for chunk in signal.split(cuts, dim=2):
        part, state = chunked.encode_chunk(chunk, state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, dim=2), whole)
    frames, state = [], None
    for chunk in whole.split(cuts, dim=2):
        part, state = chunked.decode_chunk(chunk, state)
        frames.append(part)
    torch.testing.assert_close(torch.cat(frames, dim=2), back, rtol=0, atol=1e-5)


def test_an_allocation_gives_no_block_more_than_it_has(monkeypatch):
    codec, signal = tiny(), clip(4)
    monkeypatch.setattr(codec, "decode", lambda codes, size: signal + 1 / codes.shape[3])  # more is always better
    for mean in (1, 2.5, 4, FIRST):
        lengths = allocate(codec, signal, mean)
        assert (lengths.sum(1) <= 4 * mean).all() and (lengths >= 1).all()
    assert lengths.tolist() == [[FIRST, LATER, LATER, LATER]] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"later_tokens": 8}, "later_tokens=8 should be at most tokens=7"),
        ({"patch": [1, 2, 1]}, "[3, 5]"),
    ],
)
def test_sizes_that_do_not_fit_are_told(change, message):
    with pytest.raises(UserError) as told:
        BlockQueryDecoder(**FORM | change)
    assert message in str(told.value)


def test_the_scale_of_latents_is_that_of_tokens_all_blocks_have():
    codec = tiny(unit_latents=True)
    latents = codec.latents(clip(4))
    torch.testing.assert_close(latents[:, :LATER].square().mean((1, 2)), torch.ones(8), rtol=1e-3, atol=0)
    changed = clip(4)
    changed[:, :, 3] *= 100
    torch.testing.assert_close(codec.latents(changed)[:3], latents[:3])


def test_metrics_are_their_formulas_over_a_clips_own_frames():
    fake, real, lengths = clip(4), clip(4) + 0.5 * clip(4).flip(0), torch.tensor([4, 2])
    for row, length in enumerate(lengths.tolist()):
        one, other = (side[row, :, :length].double() for side in (fake, real))
        assert feature.mse(fake, real, lengths)[row].item() == pytest.approx(((one - other) ** 2).mean().item())
        like = (one * other).sum(0) / (one.square().sum(0).sqrt() * other.square().sum(0).sqrt())
        assert feature.cosine(fake, real, lengths)[row].item() == pytest.approx(like.mean().item())
    assert feature.mse(real, real, lengths).tolist() == [0, 0]
    with pytest.raises(UserError, match="metric 'psnr' is unknown"):
        modality_of(tiny()).comparison("psnr", torch.device("cpu"))


def test_features_are_known_by_their_codec():
    codec = tiny()
    assert isinstance(modality_of(codec), Feature)
    bounded = Codec(codec.encoder, codec.bottleneck, codec.decoder, codec.length)
    assert modality_of(bounded).noun == "clip" and not isinstance(modality_of(bounded), Feature)


def test_colors_are_principal_components_of_the_originals(tmp_path):
    torch.manual_seed(0)
    strong = torch.linspace(-1, 1, 24).reshape(1, 2, 3, 4)
    signal = torch.cat([0.01 * torch.randn(2, 2, 3, 4), 5 * strong, 0.02 * torch.randn(1, 2, 3, 4)])
    drawn = principal_colors(
        [("original", [signal]), ("k = 1", [signal.mean((1, 2, 3), keepdim=True).expand_as(signal)])]
    )
    (_, (colors,)), (_, (flat,)) = drawn
    assert colors.shape == (3, 2, 3, 4) and colors.dtype == torch.uint8
    assert torch.corrcoef(torch.stack([colors[0].flatten().float(), strong.flatten()]))[0, 1].abs() > 0.999
    assert set(flat.unique().tolist()) <= {127, 128}, "the mean is grey"
    assert principal_colors([("original", [signal[:1]])])[0][1][0].shape == (3, 2, 3, 4)
    codec = tiny()
    rows = reconstructions(codec, Batch(clip(3), torch.tensor([3, 2]), ()))
    picture, media = modality_of(codec).write_samples(tmp_path / "x", rows, 4)
    assert picture.is_file() and not media


def test_other_clips_are_standardised_as_the_runs_own(tmp_path):
    folder = tmp_path / "clips" / "val"
    for name in ("a", "b"):
        noise = torch.randint(0, 256, (3, 6, 48, 32), dtype=torch.uint8)
        write_mp4(folder / f"{name}.mp4", noise, 8.0)
        write_mp4(folder.parent / "train" / f"{name}.mp4", noise, 8.0)
    small = ["data.clips.image_size=32", "data.clips.crop_tokens=3", "data.clips.length=3", "data.clips.val_length=1"]
    config = composed("experiment=video/landiff_semantic_small", *small)
    own, others = (validation_splits(Feature(), config.data, place) for place in (None, folder.parent))
    assert torch.equal(others.val.mean, own.val.mean) and torch.equal(others.val.deviation, own.val.deviation)
    assert len(others.val) == 2 and others.val[0, 0].shape == own.val[0, 0].shape == (64, 3, 4, 4)
    assert str(folder.parent) in others.about["dataset"] and "stand-in" in others.about["protocol"]


@pytest.mark.slow
def test_it_learns_features_and_is_exported(tmp_path):
    small = [
        "data.clips.image_size=32", "data.clips.crop_tokens=3", "data.clips.val_length=2", "data.clips.length=8",
        "data.teacher.channels=16", "codec.encoder.channels=16", "codec.encoder.image_size=4",
        "codec.encoder.tokens=8", "codec.encoder.later_tokens=4", "codec.encoder.width=64", "codec.encoder.depth=2",
        "codec.encoder.heads=2", "loader.batch_size=2", "loader.workers=0", "loader.overfit=true", "updates=300",
        "length=full", "bottleneck.codebook_size=32", "export=whole", "trainer.enable_progress_bar=false",
        "trainer.accelerator=cpu", "callbacks.samples=null", "callbacks.evaluation=null", "training.ema_decay=0",
    ]  # fmt: skip
    config = composed("experiment=video/landiff_semantic_small", *small)
    run = build_run(config, tmp_path)
    run.trainer.fit(run.module, run.data)
    batch = next(iter(run.data.train_dataloader()))
    codec = run.module.codec.eval()
    with torch.no_grad():
        error = (codec(batch.signal).signal - batch.signal).square().mean()
        codes = codec.encode(batch.signal)
    assert error < 0.2 * batch.signal.var()
    bundle = varitok.load(tmp_path / "bundle")
    assert np.array_equal(bundle.encode(batch.signal.numpy()), codes.numpy())
    assert bundle.valid(codes.numpy()).tolist() == [8, 4, 4]
    measured = run.data.splits.train
    assert bundle.config["feature_mean"] == measured.mean.flatten().tolist()
    assert torch.equal(codec.feature_deviation, measured.deviation.flatten())
