"""A codec of one clip: weights as a file, whose beginning decodes; a run, its bundle, and mistakes."""

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import varitok
from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer, ResidualScalarQuantizer
from varitok.codecs.build import load_run
from varitok.codecs.evaluation.cli import main as evaluate_main
from varitok.codecs.evaluation.table import read_csv
from varitok.codecs.implicit import bitplane_coder as rans
from varitok.codecs.implicit.codec import ImplicitCodec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.nerv import NeRV
from varitok.codecs.training.run import build_run
from varitok.data.batch import to_uint8
from varitok.data.datasets.single_clip import single_clip, single_scene
from varitok.export.exporters.bundle import export_bundle
from varitok.export.exporters.parity import ParityError
from varitok.export.exporters.torchscript import load_torchscript

from ...composing import composed
from ...data.clips import frames, numbers, write

FORM = {"frames": 6, "image_size": [16, 24], "strides": [2, 2], "widths": [6, 4], "stem": 4, "hidden": 8, "levels": 8}
TINY = [
    "experiment=video/nerv_pp_small", "updates=4", "data.frames=6", "data.image_size=16", "checkpoint.every=2",
    "codec.decoder.strides=[2,2]", "codec.decoder.widths=[6,4]", "codec.decoder.stem=4", "codec.decoder.hidden=8",
    "codec.decoder.levels=8", "training.log_every=1", "trainer.enable_progress_bar=false", "trainer.accelerator=cpu",
    "callbacks.samples.every=2", "callbacks.evaluation.every=2", "optim.warmup=0",
]  # fmt: skip


def make(codebooks=8, **form):
    torch.manual_seed(0)
    codec = ImplicitCodec(
        NeRV(**(FORM | form)), ResidualScalarQuantizer([2], codebooks), LengthPolicy(Full(), Truncate()), frame_rate=8.0
    )
    return codec.eval()


def build(folder, *overrides):
    folder.mkdir(parents=True, exist_ok=True)
    config = composed(*TINY, *overrides)
    return build_run(config, folder)


def fit(folder, *overrides):
    run = build(folder, *overrides)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


def clip(codec):
    return torch.zeros(1, 3, *codec.downsample)


@given(st.integers(1, 600), st.integers(1, 9), st.floats(0.01, 3), st.integers(0, 2**20))
def test_planes_come_back_from_any_beginning(n, bits, spread, seed):
    levels = np.random.default_rng(seed).normal(2 ** (bits - 1), spread * bits, n).clip(0, 2**bits - 1).astype(int)
    planes = (levels >> np.arange(bits - 1, -1, -1)[:, None] & 1).astype(np.uint8)
    coded = rans.pack(planes)
    assert coded.ends[-1] == len(coded.data)
    for kept, end in enumerate(coded.ends, 1):
        assert np.array_equal(rans.unpack(coded.data[:end], n), planes[:kept])


def test_the_coder_comes_near_the_entropy():
    levels = np.random.default_rng(0).normal(128, 12, 50_000).clip(0, 255).astype(int)
    shares = np.unique(levels, return_counts=True)[1] / len(levels)
    least = -(shares * np.log2(shares)).sum() * len(levels) / 8
    planes = (levels >> np.arange(7, -1, -1)[:, None] & 1).astype(np.uint8)
    assert least < len(rans.pack(planes).data) < 1.02 * least


@pytest.mark.parametrize("end", [3, 40, -1])
def test_bytes_that_end_elsewhere_are_told(end):
    codec = make()
    data = codec.compress(codec.encode(clip(codec))).data
    with pytest.raises(UserError, match=r"coded weights: .* damaged"):
        codec.read(data[:end])


def test_frames_are_painted_by_their_numbers():
    codec = make()
    painted = codec.decoder(torch.tensor([4, 0, 4]))
    assert painted.shape == (3, 3, 16, 24) and painted.abs().max() <= 1
    assert torch.equal(painted[0], painted[2]) and not torch.equal(painted[0], painted[1])
    stretch = codec.frames(torch.tensor([1, 3]), 2).signal
    torch.testing.assert_close(stretch[1, :, 1], painted[0])
    assert stretch.shape == (2, 3, 2, 16, 24)


def test_coded_weights_come_back_exactly():
    codec = make()
    codes = codec.encode(clip(codec))
    assert codes.shape == (1, 8, codec.weights) and set(codes.unique().tolist()) == {0, 1}
    coded = codec.compress(codes)
    assert coded.ends[-1] == len(coded.data)
    other = make(hidden=8)
    with torch.no_grad():
        for weight in other.parameters():
            weight.zero_()
    for bits in (8, 5, 1):
        read, ranges = other.read(coded.data[: coded.ends[bits - 1]])
        assert torch.equal(read, codes[:, :bits])
        mine, theirs = codec.painter(codes[:, :bits]), other.painter(read, ranges)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_weights_are_rounded_to_even_levels_between_their_ends():
    codec = make()
    codes = codec.encode(clip(codec))
    for bits in (8, 4):
        rounded = codec.painter(codes[:, :bits])
        for name, weight in codec.decoder.named_parameters():
            size = float((weight.max() - weight.min()).detach())
            assert float((rounded[name] - weight).detach().abs().max()) <= size * (0.51 / 255 * 2 ** (8 - bits) + 1e-3)


def test_more_bits_are_nearer_to_the_network_itself():
    codec = make()
    codes = codec.encode(clip(codec))
    whole = codec.frames(torch.zeros(1).long(), 6).signal
    errors = [float((codec.decode(codes[:, :bits]) - whole).detach().square().mean()) for bits in range(3, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 100


def test_training_with_drawn_bits_reaches_every_weight():
    codec = make()
    result = codec.frames(torch.tensor([2, 3]), n_codebooks=torch.tensor([4, 4]))
    exact = codec.decode(codec.encode(clip(codec))[:, :4])[0, :, 2:4]
    torch.testing.assert_close(result.signal[:, :, 0].transpose(0, 1), exact)
    (result.signal - 0.5).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in codec.parameters())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"image_size": 18}, r"strides=\[2, 2\]: their product, 4, should divide the frames' sides, 18 x 18"),
        ({"widths": [4]}, "as many strides as widths"),
    ],
)
def test_a_network_that_cannot_be_is_told(wrong, told):
    with pytest.raises(UserError, match=told):
        make(**wrong)


def test_other_codebooks_and_clips_are_refused():
    with pytest.raises(UserError, match="bottleneck=fsq_residual"):
        ImplicitCodec(NeRV(**FORM), FiniteScalarQuantizer([8]), LengthPolicy(Full(), Truncate()))
    with pytest.raises(UserError, match="one clip of 6 x 16 x 24"):
        make().encode(torch.zeros(1, 3, 5, 16, 24))


def test_a_file_is_read_as_one_clip(tmp_path):
    path = write(tmp_path / "a.mp4", frames(9, 32, 48))
    splits = single_clip(str(path), 7, [16, 24])
    assert len(splits.train) == 7 and splits.train[3, 5].shape == (3, 1, 16, 24)
    assert len(splits.val) == 1 and numbers(splits.val[0, 0]) == list(range(7))
    with pytest.raises(UserError, match=r"data\.frames=10: .*a\.mp4 has 9; give data\.frames=9 or fewer"):
        single_clip(str(path), 10, 16)
    with pytest.raises(UserError, match=r"^data\.root=.*b\.mp4: "):
        single_clip(str(tmp_path / "b.mp4"), 1, 16)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = fit(
        folder,
        "updates=40",
        "optim.codec.lr=1e-2",
        "callbacks.evaluation.every=40",
        "checkpoint.every=40",
        "callbacks.samples.every=40",
        "training.log_every=20",
    )
    return folder, run


def test_a_run_fits_its_clip(finished):
    folder, run = finished
    table = read_csv(folder / "evaluation/evaluation.csv")
    assert table.column("codebooks") == [4, 5, 6, 7, 8] and {"ssim", "flicker"} <= table.rows[0].keys()
    psnr = table.column("psnr")
    assert psnr[-1] > psnr[0] and psnr[-1] > 14
    codec = run.module.evaluated
    data = (folder / "bundle/weights.bin").read_bytes()
    assert table.column("bytes") == codec.compress(codec.encode(clip(codec))).ends[3:]
    assert table.column("bytes")[-1] == len(data)
    assert table.column("bpp")[-1] == pytest.approx(8 * len(data) / (6 * 16 * 16), rel=1e-5)
    assert "entropy-coded" in table.header["column bytes"]
    assert (folder / "samples/update_0000040/0.mp4").is_file()


def test_its_bundle_paints_the_same_frames(finished):
    folder, run = finished
    codec = run.module.evaluated
    expected = codec.decode(codec.encode(clip(codec)))[0].transpose(0, 1)
    scripted = load_torchscript(folder / "bundle/codec.ts")[0]
    torch.testing.assert_close(scripted.decode(torch.arange(6)), expected, atol=1e-5, rtol=0)
    bundle = varitok.load(folder / "bundle")
    pixels = to_uint8(expected).permute(0, 2, 3, 1).numpy()
    assert bundle.decode().shape == (6, 16, 16, 3) and bundle.decode().dtype == np.uint8
    assert np.abs(bundle.decode().astype(int) - pixels).max() <= 1  # a value on the edge between two
    assert np.array_equal(bundle.decode([5, 2]), bundle.decode()[[5, 2]])
    assert np.array_equal(bundle.decode(3), bundle.decode()[3:4])
    assert bundle.frame_rate == 8.0 and "6 frames of 16 x 16" in repr(bundle)
    for wrong, told in (([6], "6 is not there; this clip has 0 to 5"), ([-1], "-1 is not there"), ([0.5], "whole")):
        with pytest.raises(UserError, match=told):
            bundle.decode(wrong)
    card = (folder / "bundle/README.md").read_text()
    assert "{" not in card.replace('{"frame_numbers": ', "") and "`weights.bin` has its" in card


def test_a_checkpoint_gives_the_same_codec(finished):
    folder, run = finished
    codec, config = load_run(folder)
    assert torch.equal(codec.encode(clip(codec)), run.module.evaluated.encode(clip(codec)))
    assert OmegaConf.select(config, "bottleneck.num_codebooks") == 8
    with pytest.raises(UserError, match="--data: this codec is of one clip alone"):
        evaluate_main([str(folder), "--data", str(folder)])


def test_an_export_that_differs_is_refused(tmp_path, monkeypatch):
    codec = make()
    export_bundle(codec, tmp_path / "good", formats=["torchscript"])
    assert not (tmp_path / "good/onnx").exists()
    painter = ImplicitCodec.painter
    monkeypatch.setattr(
        ImplicitCodec, "painter", lambda self, codes, ranges=None: painter(self, codes[:, : 8 if ranges is None else 4])
    )
    with pytest.raises(ParityError, match=r"weights\.bin, .* differ"):
        export_bundle(codec, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == 3:
            raise RuntimeError("killed")


@pytest.mark.parametrize("extra", [pytest.param([], marks=pytest.mark.slow), ["length=weight_bits"]])
def test_a_killed_run_goes_on_where_it_was_saved(tmp_path, extra):
    extra = [*extra, "export=none", "callbacks.samples=null", "callbacks.evaluation=null"]
    whole = fit(tmp_path / "whole", *extra)
    killed = build(tmp_path / "part", *extra)
    killed.trainer.callbacks.append(Killed())
    with pytest.raises(RuntimeError, match="killed"):
        killed.trainer.fit(killed.module, killed.data)
    resumed = fit(tmp_path / "rest", *extra, f"resume={tmp_path / 'part'}")
    assert resumed.module.update == 4
    for (name, value), again in zip(
        whole.module.state_dict().items(), resumed.module.state_dict().values(), strict=True
    ):
        assert torch.equal(value, again), name


def test_the_embedded_clip_is_the_same_each_time():
    one, other, third = (single_scene(3, 16, seed=seed).val[0, 0] for seed in (0, 0, 1))
    assert torch.equal(one, other) and not torch.equal(one, third)
