"""A prior learns a bundle's codes by the trainer that trains codecs, and goes on where a run was cut."""

import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

import varitok
from varitok import UserError
from varitok.codecs.training.run import build_run
from varitok.export.bitstream.entropy_coding import codebooks_of, coding_of
from varitok.export.bitstream.packing import Codebook
from varitok.export.bitstream.symbols import Symbols
from varitok.export.cli.main import main
from varitok.export.exporters.prior import SymbolRows, Tokenizer

from ...codecs.examples import SIZE
from ...composing import composed
from .test_rebuild import exported_preset

SMALL = [
    "data.length=64",
    "data.val_length=32",
    "loader.workers=0",
    "loader.batch_size=16",
    "optim.warmup=5",
    "trainer.enable_progress_bar=false",
    "trainer.accelerator=cpu",
    "prior.network.width=32",
    "prior.network.heads=2",
    "prior.network.depth=1",
    "prior.network.window=16",
    "training.log_every=10",
]

IMAGES = ["experiment=prior/images", "data=dead_leaves", f"data.image_size={SIZE}"]
SOUNDS = ["experiment=prior/audio", "data=voices", "data.crop_tokens=8", "loader.bucket=0"]
CLIPS = ["experiment=prior/video", "data=scenes", "data.crop_tokens=2", "loader.bucket=0", "data.image_size=64"]


def fit(folder, tokenizer, *words, kind=IMAGES, callbacks=()):
    config = composed(*kind, *SMALL, f"tokenizer={tokenizer}", *map(str, words))
    run = build_run(config, folder)
    run.trainer.callbacks.extend(callbacks)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume, weights_only=True)
    return run


def check_two_updates(folder, tokenizer, kind):
    few = ["updates=2", "loader.batch_size=2", "data.length=4", "data.val_length=2", "export=none"]
    run = fit(folder, tokenizer, *few, "callbacks.evaluation.every=2", kind=kind)
    assert run.module.update == 2 and run.module.counts.sum() > 0
    assert all(value.isfinite().all() for value in run.module.parameters())
    rows = (folder / "evaluation/bits.csv").read_text().splitlines()
    assert rows[-1].split(",")[-1] != "" and len(rows) > 2


def test_a_prior_takes_two_updates(exported, tmp_path):
    check_two_updates(tmp_path / "run", exported[1], IMAGES)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "preset"),
    [
        ([*IMAGES, "data.image_size=64"], "image/demo"),
        (IMAGES[:2], "image/vit_vqgan_64"),
        (SOUNDS, "audio/demo"),
        (CLIPS, "video/demo"),
    ],
    ids=["images", "grid", "sounds", "clips"],
)
def test_every_prior_takes_two_updates(kind, preset, tmp_path):
    exported_preset(preset, tmp_path / "bundle", formats=["safetensors", "onnx"])
    check_two_updates(tmp_path / "run", tmp_path / "bundle", kind)


@pytest.mark.slow
def test_a_prior_of_a_grid_writes_images_of_any_size_row_by_row(tmp_path):
    exported_preset("image/vit_vqgan_64", tmp_path / "bundle", formats=["safetensors", "onnx"])
    few = ["updates=2", "loader.batch_size=2", "data.length=4", "data.val_length=2", "callbacks.evaluation=null"]
    run = fit(tmp_path / "run", tmp_path / "bundle", *few, kind=IMAGES[:2])
    assert run.data.splits.val[0, 0].shape == (3, 64, 64), "not the size of the tokenizer's training"
    bundle = varitok.load(tmp_path / "run" / "bundle")
    codes = np.random.default_rng(0).integers(0, bundle.codebook_sizes[0], (1, 5, 7))  # (codebooks, rows, columns)
    coding = coding_of("learned", codebooks_of(bundle), bundle)
    data = coding.encode(codes)
    np.testing.assert_array_equal(coding.decode(data, 5, (7,), True), codes)
    arrived = coding.decode(data[: len(data) // 2], 5, (7,), False)
    np.testing.assert_array_equal(arrived, codes[:, : arrived.shape[1]])  # whole rows
    assert 1 <= arrived.shape[1] < 5
    drawn = coding.draw(3, (2,), np.random.default_rng(0))
    assert bundle.decode(drawn[None], (24, 16)).shape == (1, 3, 24, 16)


@pytest.mark.slow
def test_it_learns_and_its_bundle_writes_less(exported, tmp_path, capsys):
    run = fit(tmp_path / "run", exported[1], "updates=150")
    rows = [line.split(",") for line in (tmp_path / "run/evaluation/bits.csv").read_text().splitlines()]
    last = dict(zip(next(row for row in rows if row[0] == "kept"), rows[-1], strict=True))
    packed, order, learned = (float(last[name]) for name in ("packed", "order_0", "prior"))
    assert learned < order < packed
    assert run.module.counts.sum() > 0
    bundle = varitok.load(tmp_path / "run" / "bundle")
    pixels = run.data.splits.val[0, 0].movedim(0, -1).numpy()
    from PIL import Image

    Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / "a.png")
    sizes = {}
    for coding in ("packed", "static", "learned"):
        capsys.readouterr()
        main(["encode", str(bundle.folder), str(tmp_path / "a.png"), "--json", "--coding", coding])
        (told,) = json.loads(capsys.readouterr().out)
        sizes[coding] = told["payload bytes"]
    assert sizes["learned"] < sizes["packed"]


class Killed(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, *_):
        if pl_module.update == 5:
            raise RuntimeError("killed")


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was_saved(exported, tmp_path):
    plain = ["export=none", "callbacks.evaluation=null", "updates=8", "checkpoint.every=4"]
    whole = fit(tmp_path / "whole", exported[1], *plain)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "part", exported[1], *plain, callbacks=[Killed()])
    resumed = fit(tmp_path / "rest", exported[1], *plain, f"resume={tmp_path / 'part'}")
    assert resumed.module.update == 8
    again = resumed.module.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in whole.module.state_dict().items())


@pytest.mark.parametrize(("ordered", "inner"), [(0, ()), (1, (4,)), (None, (2, 3))], ids=["image", "blocks", "grid"])
def test_rows_on_a_device_are_those_of_each_code(ordered, inner):
    codebooks = [Codebook(5), Codebook(2**20, 2), Codebook(300)]
    symbols = Symbols(codebooks, ordered, 256)
    codes = torch.stack([torch.randint(codebook.size, (2, 6, *inner)) for codebook in codebooks], dim=1)
    for kept in (1, 2, 3):
        rows = SymbolRows(symbols, kept, 6, inner, codes.device)
        row = rows.row(codes[:, :kept])
        expected = [symbols.row(code) for code in codes[:, :kept].numpy()]
        structure = symbols.structure(kept, 6, inner)
        assert row.tolist() == np.stack(expected).tolist()
        assert rows.contexts(row).tolist() == [symbols.contexts(structure, one).tolist() for one in expected]


def test_continuous_codes_have_no_prior(tmp_path):
    with pytest.raises(UserError, match="is"):
        Tokenizer(str(tmp_path))
