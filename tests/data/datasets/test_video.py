"""Folders of clips: stretches and crops that follow from their key, images among them, mistakes in one line."""

import json

import pytest
import torch
from PIL import Image

from varitok import UserError
from varitok.codecs.build import build
from varitok.data.datamodule import DataModule
from varitok.data.datasets.video import clips_and_images, kinetics, ucf101, video_folder
from varitok.data.decoding.errors import BadSample

from ..clips import frames, numbers, write

FORM = {"crop_tokens": 2, "image_size": 16, "frame_rate": 10.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for split, count in (("train", 3), ("val", 2)):
        (root / split).mkdir()
        for number in range(count):
            write(root / split / f"{number}.mp4", frames(14 - 5 * number))
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for number in range(6):
        Image.fromarray(frames(1)[0]).save(root / f"{number}.png")
    return root


def test_a_stretch_has_whole_latent_frames(folder):
    splits = video_folder(str(folder), **FORM, val_tokens=3)
    assert len(splits.train) == 3 and len(splits.val) == 2
    assert splits.train[0, 0].shape == (3, 5, 16, 16) and splits.train[0, 0].dtype == torch.uint8
    assert numbers(splits.val[0, 0]) == list(range(9))
    assert splits.train.sizes().tolist() == [5, 5, 4]
    assert splits.train[0, 2].shape[1] == 4  # shorter than a stretch
    assert video_folder(str(folder), **FORM, downsample=4, causal_pad=0).train[0, 0].shape[1] == 8
    assert "9 frames at 10 frames a second" in splits.about["protocol"]


def test_all_chance_follows_from_the_key(folder):
    train, again = (video_folder(str(folder), **FORM, seed=seed).train for seed in (0, 0))
    other = video_folder(str(folder), **FORM, seed=1).train
    assert torch.equal(train[3, 0], again[3, 0])
    starts = {tuple(numbers(train[epoch, 0])) for epoch in range(12)}
    assert len(starts) > 3 and all(stretch == tuple(range(stretch[0], stretch[0] + 5)) for stretch in starts)
    assert any(not torch.equal(train[epoch, 0], other[epoch, 0]) for epoch in range(4))
    sides = {bool(train[epoch, 0][0, :, :, :4].float().mean() > 150) for epoch in range(12)}
    assert sides == {True, False}  # mirrored by chance


def test_val_is_the_beginning_and_the_center(folder):
    val = video_folder(str(folder), **{**FORM, "image_size": [16, 8]}).val
    assert torch.equal(val[0, 0], val[5, 0]) and val[0, 0].shape == (3, 5, 16, 8)
    assert numbers(val[0, 0]) == [0, 1, 2, 3, 4]


def test_a_manifest_lists_files(folder, tmp_path):
    path = tmp_path / "list.jsonl"
    lines = [{"path": str(folder / "train" / "0.mp4")}, {"path": str(folder / "val" / "0.mp4"), "split": "val"}]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n\n")
    splits = video_folder(str(path), **FORM)
    assert [len(splits.train), len(splits.val)] == [1, 1] and numbers(splits.val[0, 0]) == [0, 1, 2, 3, 4]
    path.write_text('{"path": 3, "split": "test"}')
    with pytest.raises(UserError, match="line 1 should be like"):
        video_folder(str(path), **FORM)
    path.write_text("")
    with pytest.raises(UserError, match="lists no clip"):
        video_folder(str(path), **FORM)


def test_clips_and_images_share_a_vocabulary_and_seldom_a_batch(folder, pictures):
    splits = clips_and_images(str(folder), str(pictures), weights={"clips": 1, "images": 2}, **FORM)
    kinds = [splits.train[0, index].shape[1] for index in range(len(splits.train))]
    assert set(kinds) == {1, 4, 5} or set(kinds) == {1, 5}
    assert [size > 1 for size in splits.train.sizes()] == [kind > 1 for kind in kinds]
    data = DataModule(splits, batch_size=2, workers=0, updates=8, bucket=0.05)
    data.setup("fit")
    mixed = [len(set(batch.lengths.tolist()) - {4, 5}) == 1 and 1 in batch.lengths.tolist() and max(batch.lengths) > 1
             for batch in data.train_dataloader()]  # fmt: skip
    assert sum(mixed) <= 3


BUCKETS = [[2, 16, 16], [1, 16, 32], [3, 16, 32], [1, 32, 16]]


@pytest.fixture(scope="module")
def shaped(tmp_path_factory):
    """Clips, wide, square, high and short, an image and a broken file."""
    root = tmp_path_factory.mktemp("shaped")
    for split in ("train", "val"):
        (root / split).mkdir()
        write(root / split / "a_wide.mp4", frames(14, 32, 64))
        write(root / split / "b_short.mp4", frames(2, 32, 64))
        write(root / split / "c_square.mp4", frames(14, 32, 32))
        write(root / split / "d_high.mp4", frames(14, 64, 32))
        Image.fromarray(frames(1, 32, 64)[0]).save(root / split / "e_image.png")
    (root / "train" / "f.mp4").write_bytes(b"nothing")
    return str(root)


def test_each_file_has_the_shape_most_like_it(shaped):
    train = video_folder(shaped, **FORM, buckets=BUCKETS).train
    assert train.shapes == [(5, 16, 16), (1, 16, 32), (9, 16, 32), (1, 32, 16)]
    assert train.bucket_ids().tolist() == [2, 1, 0, 3, 1, 0]
    assert [train[0, index].shape[1:] for index in range(5)] == [train.shapes[kind] for kind in train.bucket_ids()[:5]]


def test_a_budget_of_pixels_makes_batches_of_shapes(shaped):
    splits = video_folder(shaped, **FORM, buckets=BUCKETS)
    data = DataModule(splits, batch_size=1, workers=0, updates=12, budget=2 * 9 * 16 * 32, max_bad_share=1.0)
    batches = list(data.train_dataloader())
    assert all(batch.signal[0].numel() * len(batch.signal) // 3 <= 2 * 9 * 16 * 32 for batch in batches)
    sizes = {tuple(batch.signal.shape[2:]): len(batch.signal) for batch in batches}
    assert sizes == {(5, 16, 16): 7, (1, 16, 32): 18, (9, 16, 32): 2, (1, 32, 16): 18}
    assert any(batch.bad for batch in batches), "the broken file was not tried"
    assert {tuple(batch.signal.shape[3:]) for batch in data.val_dataloader()} == {(16, 16)}
    even = DataModule(splits, batch_size=3, workers=0, updates=4, max_bad_share=1.0)
    assert {len(batch.signal) for batch in even.train_dataloader()} == {3}


@pytest.mark.parametrize(("buckets", "options"), [(None, {"budget": 100}), (BUCKETS, {"bucket": 0.1})])
def test_a_budget_needs_shapes_and_shapes_no_sorting(shaped, buckets, options):
    with pytest.raises(UserError, match=r"^loader\.(budget|bucket): "):
        DataModule(video_folder(shaped, **FORM, buckets=buckets), batch_size=1, updates=1, **options)


def test_an_unreadable_file_is_a_bad_sample(folder, tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "val").mkdir()
    (tmp_path / "train" / "a.mp4").write_bytes(b"nothing")
    write(tmp_path / "val" / "tiny.mp4", frames(2, 4, 4))
    splits = video_folder(str(tmp_path), **FORM)
    assert splits.train.sizes().tolist() == [0]
    with pytest.raises(BadSample, match=r"a\.mp4"):
        splits.train[0, 0]
    with pytest.raises(BadSample, match="4 x 4 pixels are too few"):
        splits.val[0, 0]


def test_ucf101_and_kinetics_read_what_is_unpacked(folder, tmp_path):
    with pytest.raises(UserError, match=r"unpack UCF101\.rar and UCF101TrainTestSplits-RecognitionTask\.zip"):
        ucf101(str(tmp_path))
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist02.txt").write_text("Swing/a.avi 88\n")
    (lists / "testlist02.txt").write_text("Swing/b.avi\n")
    with pytest.raises(UserError, match="UCF-101/ is not there"):
        ucf101(str(tmp_path), fold=2)
    (tmp_path / "UCF-101" / "Swing").mkdir(parents=True)
    for name in "ab":
        write(tmp_path / "UCF-101" / "Swing" / f"{name}.avi", frames(8), codec="mpeg4", pixels="yuv420p")
    splits = ucf101(str(tmp_path), fold=2, **FORM)
    assert splits.train[0, 0].shape == splits.val[0, 0].shape == (3, 5, 16, 16)
    with pytest.raises(UserError, match=r"fold=4: must be at least 1 and at most 3"):
        build({"_target_": "varitok.data.datasets.video.ucf101", "root": str(tmp_path), "fold": 4})
    assert len(kinetics(str(folder), **FORM).train) == 3
    with pytest.raises(UserError, match="train/ is not there; place Kinetics"):
        kinetics(str(tmp_path / "nothing"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"crop_tokens": 0},
        {"image_size": 1},
        {"least_scale": 0},
        {"frame_rate": 0.0},
        {"val_tokens": 0},
        {"buckets": [[1, 16]]},
        {"buckets": [[0, 16, 16]]},
        {"buckets": [[1, 16, 16]], "causal_pad": 4},
        {"image_size": [16]},
        {"val_share": -0.1},
    ],
)
def test_numbers_out_of_range_are_told(folder, wrong):
    with pytest.raises(UserError, match=rf"\.{next(iter(wrong))}[^ ]*[=:] ?"):
        build({"_target_": "varitok.data.datasets.video.video_folder", "root": str(folder)} | FORM | wrong)
