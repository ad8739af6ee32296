"""Captions: found beside files and in shards of any making, read by teachers as their library reads them."""

import io
import tarfile
from pathlib import Path

import pytest
import torch

from varitok import UserError
from varitok.data.batch import Splits
from varitok.data.cli.shards import main
from varitok.data.datamodule import DataModule
from varitok.data.datasets.images import image_folder
from varitok.data.storage.captions import caption_of, require_captions
from varitok.data.synthetic.video import Scenes
from varitok.data.teachers.text import TextTransformer

from ..pictures import encoded, fill, picture
from ..saved import TEXTS, saved


def captioned(folder: Path, count: int = 8) -> Path:
    """Fill a folder with images; every third has no caption."""
    for number, path in enumerate(sorted(fill(folder, count).iterdir())):
        if number % 3:
            path.with_suffix(".txt").write_text(f"a {path.stem}\n  on\twhite\n", encoding="utf-8")
    return folder


def told(root: Path) -> dict[str, str]:
    files = image_folder(root, val_share=0.2).train.files
    return {file.name: caption_of(file) for file in files}


def test_shards_know_the_captions_of_their_folder(tmp_path, capsys) -> None:
    folder = captioned(tmp_path / "photos")
    main([str(folder), "--out", str(tmp_path / "shards")])
    assert "8 images, 5 captions in 1 shards" in capsys.readouterr().out
    found = told(folder)
    assert found == told(tmp_path / "shards")
    assert found["good_001.png"] == "a good_001 on white" and found["good_003.png"] == ""
    with tarfile.open(tmp_path / "shards/000000.tar") as shard:
        texts = [name for name in shard.getnames() if name.endswith(".txt")]
    assert len(texts) == 5, "other readers of shards find them too"


def test_shards_of_other_makers_have_their_texts_found(tmp_path) -> None:
    (tmp_path / "shards").mkdir()
    image = encoded(picture(), "PNG")
    members = {"x/7.txt": b"ein Boot in blau", "x/7.png": image, "x/8.png": image, "x/9.txt": b"alone"}
    with tarfile.open(tmp_path / "shards/0.tar", "w") as shard:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            shard.addfile(entry, io.BytesIO(content))
    files = [file for split in image_folder(tmp_path / "shards")[:2] for file in split.files]
    assert {file.name: caption_of(file) for file in files} == {"x/7.png": "ein Boot in blau", "x/8.png": ""}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_bring_the_captions_of_what_they_hold(tmp_path, workers) -> None:
    folder = captioned(tmp_path / "photos")
    (folder / "good_002.png").write_bytes(b"no image any more")
    data = DataModule(
        image_folder(str(folder), image_size=8), batch_size=4, workers=workers, updates=6, captions=True,
        max_bad_share=1.0,
    )  # fmt: skip
    for batch in data.train_dataloader():
        names = [Path(name) for name in data.names(batch)]
        assert batch.captions == tuple(f"a {name.stem} on white" if int(name.stem[-1]) % 3 else "" for name in names)
    plain = DataModule(image_folder(str(folder), image_size=8), batch_size=4, workers=0, updates=1, max_bad_share=1.0)
    assert next(iter(plain.train_dataloader())).captions == ()


def test_what_has_no_captions_is_refused(tmp_path) -> None:
    splits = image_folder(str(fill(tmp_path / "photos", 8)), image_size=8)
    with pytest.raises(UserError, match=r"none of the first 7 files has a caption; write that of \S+\.png to \S+\.txt"):
        require_captions(splits.train.files)
    with pytest.raises(UserError, match="no files with captions"):
        DataModule(Splits(Scenes(16), Scenes(16)), batch_size=1, updates=1, captions=True)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_are_read_as_the_library_reads_them(tmp_path, kind) -> None:
    network, folder = saved(tmp_path, kind)
    teacher = TextTransformer(str(folder))
    captions = ["a red boat", "", "a dog sings " * 9]
    found = teacher.read(captions)
    assert found.pooled.shape == (3, teacher.pooled_channels) and not found.pooled[1].any()
    ids = [48, 3, 4, 6, 49]
    given = torch.tensor([ids + [1] * 3 if kind == "siglip" else ids])  # to its longest, 8
    with torch.no_grad():
        torch.testing.assert_close(found.pooled[:1], network.get_text_features(given).pooler_output)
    alone = teacher.read(captions[2:])
    torch.testing.assert_close(found.pooled[2:], alone.pooled)
    assert not any(part.requires_grad for part in teacher.parameters())
    sizes = [sum(part.numel() for part in network.parameters()) for network in (teacher.network, network)]
    assert sizes[0] < 0.8 * sizes[1], "the other side isn't held"
    with pytest.raises(UserError, match="encodes captions, not signals"):
        teacher(torch.rand(1, 3, 16, 16))


def test_folders_that_hold_no_reader_are_told(tmp_path) -> None:
    _, folder = saved(tmp_path, "vit")
    with pytest.raises(UserError, match="a vit has no text encoder"):
        TextTransformer(str(folder))
    _, folder = saved(tmp_path, "clip")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer can't be read") as error:
        TextTransformer(str(folder))
    assert "\n" not in str(error.value)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"place the tokenizer's files there, usually tokenizer\.json"):
        TextTransformer(str(folder))
