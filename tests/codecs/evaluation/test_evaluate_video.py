"""`evaluate` on clips: frame by frame, flicker, padding that counts for nothing; and what a run leaves."""

import csv

import av
import pytest
import torch

from varitok import UserError
from varitok.codecs.evaluation.evaluate import evaluate
from varitok.codecs.evaluation.table import read_csv
from varitok.codecs.metrics import frechet, fvd, video
from varitok.codecs.modalities.image import Image
from varitok.codecs.modalities.media import draw_clips, write_mp4
from varitok.codecs.modalities.registry import modality_of
from varitok.codecs.modalities.video import Video
from varitok.codecs.training.run import build_run
from varitok.data.batch import Sample, collate, to_uint8
from varitok.data.synthetic.video import Scenes

from ...composing import composed
from ..examples import TINY_CLIP, clip_codec

CPU = torch.device("cpu")


def clips(b=3, t=6, side=32):
    real = torch.randint(40, 200, (b, 3, t, side, side), dtype=torch.uint8)
    return (real + torch.randint(0, 30, real.shape, dtype=torch.uint8)), real


@pytest.mark.parametrize("name", ["psnr", "ssim", "ms_ssim"])
def test_images_metrics_are_means_over_a_clips_own_frames(name):
    fake, real = clips()
    lengths = torch.tensor([6, 1, 4])
    values = Video().comparison(name, CPU)(fake, real, lengths)
    for row, length in enumerate(lengths.tolist()):
        frames = [side[row, :, :length].transpose(0, 1) for side in (fake, real)]
        each = Image().comparison(name, CPU)(*frames, torch.ones(length))
        assert values[row].item() == pytest.approx(each.double().mean().item())


def test_flicker_is_the_error_of_changes():
    real = torch.full((4, 3, 5, 8, 8), 100, dtype=torch.uint8)
    fake = real.clone()
    fake[0] += 20  # a constant error does not flicker
    fake[1, :, 1::2] += 10
    fake[2, :, 4] += 50
    values = video.flicker(fake, real, torch.tensor([5, 5, 4, 1]))
    assert values[:3].tolist() == [0, 10, 0] and values[3].isnan()


def test_seams_are_seen_where_chunks_meet_and_nowhere_else():
    real = torch.full((2, 3, 8, 8, 8), 100, dtype=torch.uint8)
    fake = real.clone()
    fake[0, :, 4:] += 12  # one jump, where chunks of four meet
    fake[1] += 12
    assert video.seam_error(fake, real, 4).tolist() == [12, 0]
    assert video.seam_error(fake, real, 3)[0].item() == pytest.approx(-12 / 5)


def test_what_is_not_measured_is_told():
    with pytest.raises(UserError, match="metric 'mel' is unknown"):
        Video().comparison("mel", CPU)
    assert {"psnr", "ssim", "ms_ssim", "flicker"} <= set(Video().available())


def test_padding_counts_for_nothing():
    codec = clip_codec()
    generator = torch.Generator().manual_seed(0)
    signals = [torch.randint(0, 256, (3, t, 16, 24), generator=generator, dtype=torch.uint8) for t in (9, 4, 1)]
    metrics = ["psnr", "flicker"]
    together = evaluate(codec, [collate([Sample(signal) for signal in signals])], metrics=metrics)
    alone = evaluate(codec, [collate([Sample(signal)]) for signal in signals], metrics=metrics)
    row, other = together.rows[0], alone.rows[0]
    assert row["clips"] == 3 and row["bits"] == pytest.approx(9 * 6 * (3 + 2 + 1) / 3)
    assert row["bpp"] == pytest.approx(9 * 6 * 6 / (14 * 16 * 24))
    for name, value in row.items():
        assert value == pytest.approx(other[name], rel=1e-5), name
    assert "bits / (pixels of a frame * frames)" in together.header["column bpp"]
    assert modality_of(codec).noun == "clip"


def test_a_clip_is_written_and_drawn(tmp_path):
    clip = torch.zeros(3, 7, 17, 24, dtype=torch.uint8)
    clip[0] = 250
    write_mp4(tmp_path / "deep" / "a.mp4", clip, 7.5)
    with av.open(str(tmp_path / "deep" / "a.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
        assert float(file.streams.video[0].average_rate) == 7.5
    assert len(frames) == 7 and frames[0].shape == (16, 24, 3)
    assert frames[3][8, 8, 0] > 220 and frames[3][8, 8, 2] < 30
    picture = draw_clips([("original", [clip, clip[:, :1]]), ("codebooks: 1", [clip, clip[:, :1]])], scale=2)
    assert picture.size[1] == 2 * 2 * 17 and picture.size[0] > 2 * 2 * 5 * 24
    with pytest.raises(UserError, match=r"can't be written as MP4"):
        write_mp4(tmp_path / "b.mp4", clip[:, :, :1], 8.0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        write_mp4(tmp_path / "file" / "b.mp4", clip, 8.0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = build_run(composed(*TINY_CLIP), folder)
    run.trainer.fit(run.module, run.data)
    return folder


def test_a_run_leaves_strips_clips_and_a_table(finished):
    names = {path.relative_to(finished / "samples").as_posix() for path in (finished / "samples").rglob("*.*")}
    for update in ("update_0000001", "update_0000002"):
        assert {f"{update}.png", f"{update}/0.mp4", f"{update}/1.mp4"} <= names
    with av.open(str(finished / "samples/update_0000002/1.mp4")) as file:
        frames = list(file.decode(video=0))
    assert len(frames) == 9 and frames[0].width == 2 * 16  # the original beside what comes back
    table = read_csv(finished / "evaluation/evaluation.csv")
    assert table.column("clips") == [3] and {"psnr", "ssim", "flicker", "bpp"} <= table.rows[0].keys()
    assert (finished / "evaluation/evaluation.png").is_file()
    with (finished / "metrics.csv").open() as file:
        assert {"val/psnr@1", "loss/temporal", "loss/structure"} <= {row["name"] for row in csv.DictReader(file)}


def test_samples_are_8_bit_values():
    assert (
        modality_of(clip_codec()).as_written(torch.tensor([-2.0, 0.5])).tolist()
        == to_uint8(torch.tensor([-2.0, 0.5])).tolist()
    )


class _I3D(torch.nn.Module):
    """Takes what I3D's file takes, and gives as many features."""

    def forward(
        self, clip: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False
    ) -> torch.Tensor:
        assert rescale and resize and return_features
        return clip.mean((3, 4)).flatten(1)[:, :8].repeat(1, 50)


def test_fvd_reads_its_network_from_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("VARITOK_WEIGHTS", str(tmp_path))
    assert "fvd" not in Video().available()
    with pytest.raises(UserError, match=r"fvd needs the file i3d_torchscript\.pt"):
        fvd.network("fvd", CPU)
    (tmp_path / "i3d_torchscript.pt").write_bytes(b"other")
    with pytest.raises(UserError, match="not I3D as TorchScript"):
        fvd.network("fvd", CPU)
    torch.jit.save(torch.jit.script(_I3D()), tmp_path / "i3d_torchscript.pt")
    assert "fvd" in Video().available()
    features = fvd.network("fvd", CPU).features(clips(2, 12)[1], torch.tensor([12, 10]))
    assert features.shape == (2, 400)
    with pytest.raises(UserError, match="10 frames or more, got one of 9"):
        fvd.network("fvd", CPU).features(clips(1, 12)[1], torch.tensor([9]))


def test_the_stand_in_hears_noise_and_order_and_no_padding():
    network = fvd.network("fvd_random", CPU)
    lengths = torch.full((24,), 6)
    real = torch.stack([Scenes(16, frames=6)[0, i] for i in range(24)])
    noise = torch.randint(-40, 41, real.shape)

    def distance(other):
        both = [frechet.Moments(network.width) for _ in range(2)]
        for moments, signal in zip(both, (real, other), strict=True):
            moments.add(network.features(signal, lengths))
        return frechet.frechet_distance(*both)

    noisy = [(real.long() + noise * share // 4).clamp(0, 255).to(torch.uint8) for share in (1, 4)]
    same, little, much, shuffled = (distance(other) for other in (real, *noisy, real[:, :, [3, 0, 5, 1, 4, 2]]))
    assert same < 1e-6 < little < much and shuffled > 1e-4
    padded = torch.cat([real[:1], torch.zeros(1, 3, 4, 16, 16, dtype=torch.uint8)], dim=2)
    torch.testing.assert_close(network.features(padded, lengths[:1]), network.features(real[:1], lengths[:1]))


def test_fvd_is_measured_where_it_is_asked_for():
    batch = collate([Sample(signal) for signal in clips(3)[1]])
    table = evaluate(clip_codec(), [batch], metrics=["psnr", "fvd_random"])
    assert table.rows[0]["fvd_random"] > 0 and "a stand-in" in table.header["column fvd_random"]
