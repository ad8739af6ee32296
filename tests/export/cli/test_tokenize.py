"""The codes of a corpus: written by `varitok tokenize`, read by `varitok.codes`."""

import errno
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from onnx import helper
from PIL import Image

import varitok
from varitok import UserError
from varitok.data.cli.shards import main as pack
from varitok.export.bitstream import container
from varitok.export.cli.main import main
from varitok.export.cli.tokenize import main as tokenize_main
from varitok.export.runtime.bundle import DECODER, ENCODER, FORMAT_VERSION, sha256
from varitok.export.runtime.images import ImageBundle

from ...data.clips import frames, write
from ...data.pictures import BROKEN, fill
from ..conftest import KINDS
from ..exporters.test_rebuild import exported_preset
from ..runtime.test_examples import write_bundle, write_graph

ALONE = ["--workers", "0"]


def tokenize(data, bundle, out, *words):
    tokenize_main([str(data), "--bundle", str(bundle), "--out", str(out), *ALONE, *words])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def photos(tmp_path):
    """Return a folder of ten images: two share a stem, one has a caption."""
    folder = fill(tmp_path / "photos", 8)
    fill(folder / "more.jpg", 1)
    shutil.copy(folder / "good_003.png", folder / "more.jpg" / "good_000.webp")
    (folder / "good_003.txt").write_text("a caption\n")
    return folder


@pytest.fixture
def told(photos, exported, tmp_path):
    """Return a folder of codes of the images, in four shards."""
    tokenize(photos, exported[1], tmp_path / "told", "--shard-files", "3")
    return tmp_path / "told"


def test_a_corpus_has_the_codes_of_encode(photos, exported, told):
    bundle, found = varitok.load(exported[1]), varitok.codes(told)
    paths = sorted(path for path in photos.rglob("*") if path.suffix in (".png", ".webp"))
    assert [record.name for record in found] == [path.relative_to(photos).as_posix() for path in paths]
    assert (found.modality, found.codebook_sizes, found.tokens) == ("image", bundle.codebook_sizes, bundle.tokens)
    assert found.bundle == container.identity(exported[1]).hex()
    for path, record in zip(paths, found, strict=True):
        np.testing.assert_array_equal(record.codes, bundle.encode(Image.open(path))[0])
        assert record.codes.dtype == np.min_scalar_type(bundle.codebook_sizes[0] - 1)
        assert record.facts["signal_size"] == [16, 16] and record.facts["shape"] == list(record.codes.shape)
    assert [record.facts.get("caption") for record in found if record.name == "good_003.png"] == ["a caption"]
    assert sum("caption" in record.facts for record in found) == 1


def test_the_sequence_of_records(told):
    found = varitok.codes(told)
    names = [record.name for record in found]
    assert len(found) == 10 and [len(shard) for shard in found.shards()] == [3, 3, 3, 1]
    assert [record.name for shard in found.shards() for record in shard] == names
    assert [record.name for record in found[2:-1:3]] == names[2:-1:3] and found[-1].name == names[-1]
    assert [record.name for record in pickle.loads(pickle.dumps(found))] == names
    assert len(pickle.dumps(found)) < 2000
    with pytest.raises(IndexError):
        found[10]
    code = f"import sys, varitok; print(varitok.codes({str(told)!r})[0].name, {{'torch', 'fsspec'}} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout == f"{names[0]} set()\n"


def test_an_index_that_is_made_anew_keeps_what_the_codes_have(told):
    before = contents(told)
    pack([str(told)])
    assert contents(told) == before and len(varitok.codes(told)) == 10


def test_parts_and_interrupted_runs_write_the_same(photos, exported, told, tmp_path):
    words = ["--shard-files", "3"]
    for part in ("3/3", "1/3"):
        tokenize(photos, exported[1], tmp_path / "parts", *words, "--part", part)
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.tar")) == [f"00000{n}.tar" for n in (0, 2, 3)]
    with pytest.raises(UserError, match="1 of 4 shards are missing; run varitok tokenize to its end, or"):
        varitok.codes(tmp_path / "parts")
    assert len(varitok.codes(tmp_path / "parts", partial=True)) == 7
    before = (tmp_path / "parts" / "000000.tar").stat().st_mtime_ns
    # As kills leave it: a shard half written, one in its place without having been whole, an index without its shard.
    (tmp_path / "parts" / ".000001.tar.0a1b2c3d.partial").write_bytes(b"half")
    (tmp_path / "parts" / ".000001.index.jsonl.77.partial").write_bytes(b"half")
    (tmp_path / "parts" / "000003.tar").write_bytes(b"cut")
    (tmp_path / "parts" / "000002.tar").unlink()
    tokenize(photos, exported[1], tmp_path / "parts", *words, "--part", "1/1")
    assert contents(tmp_path / "parts") == contents(told)
    assert (tmp_path / "parts" / "000000.tar").stat().st_mtime_ns == before


def test_shards_have_the_codes_of_their_folder(photos, exported, told, tmp_path):
    pack([str(photos), "--out", str(tmp_path / "packed"), "--size", "3kB"])
    tokenize(tmp_path / "packed", exported[1], tmp_path / "out", "--shard-files", "3")
    assert contents(tmp_path / "out") == contents(told)


def test_training_and_validation_stay_apart(photos, exported, tmp_path, capsys):
    for part, number in (("train", 4), ("val", 2)):
        fill(tmp_path / "parted" / part, number)
    tokenize(tmp_path / "parted", exported[1], tmp_path / "out", "--tokens", "2")
    assert "out: codes of 6 files in 2 shards of " in capsys.readouterr().out
    train, val = (varitok.codes(tmp_path / "out" / part) for part in ("train", "val"))
    assert (len(train), len(val), train.tokens, train[0].codes.shape) == (4, 2, 2, (1, 2))
    assert train[0].name == val[0].name == "good_000.png"
    with pytest.raises(UserError, match=r"no shards of codes in this folder; give one of its folders, train, val$"):
        varitok.codes(tmp_path / "out")


def test_unreadable_files_are_counted_and_do_not_end_the_others(exported, tmp_path, capsys):
    broken = {name: BROKEN[name] for name in ("text.png", "empty.jpg")}
    folder = fill(tmp_path / "photos", 5, broken)
    for _ in range(2):  # finished shards remember them
        with pytest.raises(SystemExit) as caught:
            tokenize(folder, exported[1], tmp_path / "out", "--shard-files", "4")
        shown = capsys.readouterr()
        assert caught.value.code == 1 and "out: codes of 5 files in 2 shards" in shown.out
        assert sorted(shown.err.splitlines())[0] == "2 of 7 files can't be read"
        assert all(f"can't be read: {folder / name}: " in shown.err for name in broken)
    assert [record.name for record in varitok.codes(tmp_path / "out")] == [f"good_00{n}.png" for n in range(5)]
    with pytest.raises(UserError, match=r"000000.tar: none of its 2 files can be read \(.*empty.jpg: "):
        tokenize(fill(tmp_path / "bad", 0, broken), exported[1], tmp_path / "none")
    assert not list((tmp_path / "none").iterdir())


def test_sounds_of_any_length_in_worker_processes(exported_sounds, tmp_path, capfd):
    folder = exported_sounds[1]
    (tmp_path / "sounds").mkdir()
    waves = {f"{n}.wav": np.random.default_rng(n).uniform(-0.9, 0.9, 300 + 50 * n) for n in range(6)}
    for name, wave in waves.items():
        soundfile.write(tmp_path / "sounds" / name, wave, 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "sounds" / "empty.wav", np.zeros(0), 8000)
    words = ["--bundle", str(folder), "--out", str(tmp_path / "out"), "--workers", "2", "--batch", "2"]
    with pytest.raises(SystemExit):
        main(["tokenize", str(tmp_path / "sounds"), *words, "--codebooks", "1"])
    assert "1 of 7 files can't be read" in capfd.readouterr().err
    bundle, found = varitok.load(folder), varitok.codes(tmp_path / "out")
    assert found.codebook_sizes == bundle.codebook_sizes[:1] and found.tokens is None and len(found) == 6
    for record in found:
        wave = waves[record.name].astype(np.float32)
        np.testing.assert_array_equal(record.codes, bundle.encode(wave, 8000, num_codebooks=1)[0])
        assert record.facts["signal_size"] == [len(wave)] and record.facts["seconds"] == len(wave) / 8000


def test_clips_know_their_size_and_duration(tmp_path):
    write_bundle(tmp_path / "bundle", "video")
    (tmp_path / "clips").mkdir()
    for number in range(2):
        write(tmp_path / "clips" / f"{number}.mp4", frames(12 + number, 32, 48))
    tokenize(tmp_path / "clips", tmp_path / "bundle", tmp_path / "out")
    bundle = varitok.load(tmp_path / "bundle")
    for number, (name, codes, facts) in enumerate(varitok.codes(tmp_path / "out")):
        with bundle.open_file(tmp_path / "clips" / name) as file:
            np.testing.assert_array_equal(codes, bundle.encode(file.read())[0])
        assert facts["signal_size"] == [12 + number, 32, 48] and facts["seconds"] == 1.2 + number / 10
        assert bundle.decode(codes[None], facts["signal_size"]).shape == (1, 3, 12 + number, 32, 48)


def test_images_on_a_grid_have_codes_of_their_own_size(tmp_path):
    write_bundle(tmp_path / "bundle", "photo")
    bundle = varitok.load(tmp_path / "bundle")
    (tmp_path / "photos").mkdir()
    for name, (height, width) in {"a": (37, 50), "b": (1, 1), "c": (8, 600)}.items():
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{name}.png")
    tokenize(tmp_path / "photos", tmp_path / "bundle", tmp_path / "out", "--codebooks", "1")
    found = varitok.codes(tmp_path / "out")
    assert [record.codes.shape for record in found] == [(1, 5, 7), (1, 1, 1), (1, 1, 75)] and found.tokens is None
    for record in found:
        with Image.open(tmp_path / "photos" / record.name) as image:
            np.testing.assert_array_equal(record.codes, bundle.encode(image, num_codebooks=1)[0])
            assert record.facts["signal_size"] == [image.height, image.width]
        assert bundle.decode(np.int64(record.codes)[None], record.facts["signal_size"]).shape[1] == 3


@pytest.mark.slow
def test_a_device_has_the_tiles_of_encode(tmp_path):
    exported_preset("image/vit_vqgan_64", tmp_path / "bundle", formats=["safetensors", "onnx"])
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((150, 100)).save(tmp_path / "photos/a.png")
    for out, words in (("here", []), ("there", ["--device", "cpu:0"])):
        tokenize(tmp_path / "photos", tmp_path / "bundle", tmp_path / out, *words)
    (here,), (there,) = (varitok.codes(tmp_path / out) for out in ("here", "there"))
    assert here.codes.shape == there.codes.shape == (1, 13, 19)
    assert (here.codes == there.codes).mean() > 0.99


def test_a_device_encodes_batches(photos, exported, told, tmp_path):
    """The name "cpu:0" is torch's: "cpu" would be ONNX Runtime's."""
    tokenize(photos, exported[1], tmp_path / "out", "--shard-files", "3", "--device", "cpu:0", "--batch", "2")
    assert contents(tmp_path / "out") == contents(told)


def test_continuous_codes_stay_floats(tmp_path):
    bundle, sounds = tmp_path / "bundle", tmp_path / "sounds"
    for folder in (bundle, sounds):
        folder.mkdir()
    node = helper.make_node("AveragePool", ["signal"], ["made"], kernel_shape=[40], strides=[40])
    write_graph(bundle / ENCODER, {"signal": [None, 1, None]}, [node])
    write_graph(bundle / DECODER, {"latents": [None, 1, None]}, [helper.make_node("Identity", ["latents"], ["made"])])
    about = {"modality": "audio", "sampling_rate": 8000, "hop_length": 40, "channels": 1, "tokens": 0, "code_rows": 1}
    about |= {"format_version": FORMAT_VERSION, "codebook_sizes": []}
    (bundle / "config.json").write_text(json.dumps(about))
    sums = {name: {"sha256": sha256(bundle / name)} for name in ("config.json", ENCODER, DECODER)}
    (bundle / "export.json").write_text(json.dumps({"files": sums}))
    soundfile.write(sounds / "0.wav", np.full(400, 0.25), 8000)
    tokenize(sounds, bundle, tmp_path / "out")
    (record,) = found = varitok.codes(tmp_path / "out")
    assert found.codebook_sizes == () and record.codes.dtype == np.float32
    np.testing.assert_array_equal(record.codes, np.full((1, 10), 0.25))
    write_bundle(tmp_path / "features", "feature")
    with pytest.raises(UserError, match=r"no media file stores its signals; use varitok.load in Python$"):
        tokenize(sounds, tmp_path / "features", tmp_path / "none")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--part", "3/2"], "--part 3/2: give a part such as 2/8, from 1/8 to 8/8"),
        (["--part", "0/4"], "--part 0/4: give a part "),
        (["--part", "half"], "--part half: give a part "),
        (["--tokens", "7"], "7 tokens: this codec takes from 1 to 6"),
        (["--tokens", "0"], "0 tokens: this codec takes from 1 to 6"),
        (["--codebooks", "2"], "2 codebooks: this codec has 1"),
        (["--batch", "0"], "--batch=0: must be "),
        (["--shard-files", "0"], "--shard-files=0: must be "),
        (["--workers", "-1"], "--workers=-1: must be "),
        (["--memory", "0"], "--memory 0: must be above 0"),
        (["--memory", "1"], "told: has codes of another memory (--memory); name a new folder with --out"),
        (["--device", "mps:9", "--out", "new"], "--device mps:9: this device isn't available"),
        (["--tokens", "3"], "told: has codes of another number of tokens (--tokens); name a new folder with --out"),
        (["--shard-files", "4"], "told: has codes of another size of shards (--shard-files); name a new "),
        (["--out", "photos"], "photos: has other files, such as good_000.png; name a new folder with --out"),
        (["--out", "packed"], "packed/000000.index.jsonl: isn't a shard of codes; name a new folder with --out"),
        (["--out", "photos/good_000.png/x"], "x: can't be written (Not a directory); make room or name another "),
    ],
)
def test_mistakes_end_in_one_line(photos, exported, told, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    pack(["photos", "--out", "packed"])
    before = contents(tmp_path)
    capsys.readouterr()
    words = ["tokenize", "photos", "--bundle", str(exported[1]), "--out", "told", *ALONE, "--shard-files", "3", *words]
    with pytest.raises(SystemExit) as caught:
        main(words)
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.startswith("varitok tokenize: ") and error.count("\n") == 1
    assert message in error
    assert contents(tmp_path) == before


def test_another_corpus_or_bundle_needs_another_folder(photos, exported, told, tmp_path):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        tokenize(tmp_path / "nowhere", exported[1], tmp_path / "out")
    with pytest.raises(UserError, match="no image in this folder"):
        tokenize(told, exported[1], tmp_path / "out")
    (photos / "good_000.png").rename(photos / "good_009.png")
    with pytest.raises(UserError, match="told: has codes of other files; name a new folder"):
        tokenize(photos, exported[1], told, "--shard-files", "3")
    write_bundle(tmp_path / "bundle", "video")  # which takes images too
    with pytest.raises(UserError, match="told: has codes of another bundle; name a new folder"):
        tokenize(photos, tmp_path / "bundle", told, "--shard-files", "3")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_leaves_whole_shards(photos, exported, told, tmp_path, monkeypatch, number):
    calls = []

    def fsync(_):
        calls.append(0)
        if len(calls) > 1:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=rf"out: can't be written \({os.strerror(number)}\); make room or "):
            tokenize(photos, exported[1], tmp_path / "out", "--shard-files", "3")
    assert sorted(contents(tmp_path / "out")) == ["000000.index.jsonl", "000000.tar"]
    tokenize(photos, exported[1], tmp_path / "out", "--shard-files", "3")
    assert contents(tmp_path / "out") == contents(told)


def test_damaged_folders_of_codes_are_named(photos, exported, told, tmp_path):
    shutil.copytree(told, tmp_path / "mixed")
    tokenize(photos, exported[1], tmp_path / "other", "--shard-files", "3", "--tokens", "2")
    for suffix in (".tar", ".index.jsonl"):
        shutil.copy(tmp_path / "other" / f"000001{suffix}", tmp_path / "mixed" / f"000001{suffix}")
    with pytest.raises(UserError, match=r"000001.tar: has other codes than .*000000.tar; keep them in folders"):
        varitok.codes(tmp_path / "mixed")
    found = varitok.codes(told)
    (told / "000000.tar").write_bytes((told / "000000.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"000000.tar: can't be read \(.*\); copy it and .*000000.index.jsonl again"):
        found[2]
    with pytest.raises(UserError, match=r"000000.tar: 700 bytes instead of 10240; copy it again, or run tokenize"):
        varitok.codes(told)
    (told / "000000.index.jsonl").unlink()
    with pytest.raises(UserError, match=r"000000.tar: no codes of varitok tokenize; give a folder that it wrote"):
        varitok.codes(told)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        varitok.codes(tmp_path / "nowhere")


def test_a_file_that_crashes_its_decoder_is_named(photos, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageBundle, "open_file", lambda self, path: os._exit(3))
    words = ["--bundle", str(exported[1]), "--out", str(tmp_path / "out"), "--workers", "1"]
    with pytest.raises(UserError, match=r"a worker .* ended by exit status 3 while it read .*good_000.png; remove"):
        tokenize_main([str(photos), *words])


@pytest.mark.slow
@pytest.mark.parametrize("exported", [KINDS[0]], indirect=True)
def test_a_run_that_is_killed_twice_has_each_file_once(exported, tmp_path):
    folder = fill(tmp_path / "photos", 2000)
    command = [sys.executable, "-m", "varitok.export.cli.main", "tokenize", str(folder), "--bundle", str(exported[1])]
    command += ["--shard-files", "100", "--workers", "2", "--out"]
    for shards in (4, 11):
        run = subprocess.Popen([*command, str(tmp_path / "killed")])
        while len(list((tmp_path / "killed").glob("*.tar"))) < shards:
            assert run.poll() is None
            time.sleep(0.01)
        run.send_signal(signal.SIGKILL)
        run.wait()
    subprocess.run([*command, str(tmp_path / "killed")], check=True)
    subprocess.run([*command, str(tmp_path / "whole")], check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    main(["encode", str(exported[1]), str(folder), "--out", str(tmp_path / "codes"), "--json"])
    bundle, found = varitok.load(exported[1]), varitok.codes(tmp_path / "killed")
    assert [record.name for record in found] == sorted(path.name for path in folder.iterdir())
    for name, codes, _ in found:
        (one,) = container.read_all((tmp_path / "codes" / name).with_suffix(".vtk"))
        np.testing.assert_array_equal(codes, one.codes(bundle)[0])
