"""`varitok encode` and `decode`: ordinary files to containers and back, sizes to the byte, mistakes in one line."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import varitok
from varitok import UserError
from varitok.data.decoding.audio import decode_audio
from varitok.export.bitstream import container
from varitok.export.bitstream.media_files import encode_file
from varitok.export.cli.encode_decode import destinations
from varitok.export.cli.main import main
from varitok.export.exporters.bundle import export_bundle

from ...codecs.examples import HOP, RATE, SIZE, TOKENS, clip_codec
from ...data.clips import frames, write


@pytest.fixture(scope="module")
def sounds(exported_sounds):
    return exported_sounds[1]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    chance = np.random.default_rng(0)
    for name, size in (("a.png", (20, 30, 3)), ("below/b.jpg", (16, 16, 3)), ("c.webp", (40, 17))):
        Image.fromarray(chance.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def run(capsys, *words):
    main([*map(str, words)])
    return capsys.readouterr().out


def refused(capsys, *words):
    with pytest.raises(SystemExit) as left:
        main([*map(str, words)])
    told = capsys.readouterr().err
    assert left.value.code == 2 and told.count("\n") == 1
    return told


@pytest.mark.parametrize("kept", [1, 3, TOKENS])
def test_a_folder_of_pictures_comes_back(exported, photos, tmp_path, capsys, kept):
    folder = exported[1]
    told = json.loads(
        run(
            capsys,
            "encode",
            folder,
            photos,
            "--out",
            tmp_path / "codes",
            "--tokens",
            kept,
            "--coding",
            "packed",
            "--json",
        )
    )
    assert sorted(one["out"] for one in told) == [
        str(tmp_path / "codes" / f"{name}.vtk") for name in ("a", "below/b", "c")
    ]
    bundle = varitok.load(folder)
    for one in told:
        about = json.loads(run(capsys, "info", one["out"], "--json"))
        assert about["bytes"]["file"] == one["bytes"] == sum(about["bytes"].values()) - about["bytes"]["file"]
        widths = [(size - 1).bit_length() for size in bundle.codebook_sizes]
        assert about["bytes"]["payload"] == one["payload bytes"] == -(-kept * sum(widths) // 8)
        assert about["modality"] == "image" and about["codes"] == [[len(widths), kept]] and about["whole"]
    shown = run(capsys, "decode", folder, tmp_path / "codes", "--out", tmp_path / "back")
    assert f"{kept} tokens" in shown and "missing" not in shown
    for name in ("a", "below/b", "c"):
        back = np.asarray(Image.open(tmp_path / "back" / f"{name}.png"))
        codes = container.read(tmp_path / "codes" / f"{name}.vtk").codes()
        assert np.array_equal(back, bundle.pixels(bundle.decode(codes))[0]) and back.shape == (SIZE, SIZE, 3)


def test_a_sound_comes_back_as_long_as_it_was(sounds, tmp_path, capsys):
    bundle, wave = varitok.load(sounds), np.random.default_rng(0).uniform(-0.5, 0.5, (5 * HOP + 3, 2))
    soundfile.write(tmp_path / "a.flac", wave, RATE)
    run(capsys, "encode", sounds, tmp_path / "a.flac", "--codebooks", 1, "--coding", "packed")
    found = container.read(tmp_path / "a.vtk")
    assert found.units == 5 * HOP + 3 and found.codes().shape == (1, 1, 6) and found.header.signal == (RATE,)
    run(capsys, "decode", sounds, tmp_path / "a.vtk")
    back, rate = soundfile.read(tmp_path / "a.wav", always_2d=True)
    assert rate == RATE and back.shape == (5 * HOP + 3, bundle.channels)
    wanted = bundle.decode(found.codes())[0, :, : len(back)].T
    np.testing.assert_allclose(back, wanted, atol=1e-4)
    data = (tmp_path / "a.vtk").read_bytes()
    (tmp_path / "twice.vtk").write_bytes(data * 2)
    assert f"{2 * len(back) / RATE:.3f}".rstrip("0") in run(capsys, "decode", sounds, tmp_path / "twice.vtk")
    (tmp_path / "cut.vtk").write_bytes(data[:-6])
    shown = run(capsys, "decode", sounds, tmp_path / "cut.vtk")
    assert "steps unchecked; the rest is missing" in shown
    assert 0 < len(soundfile.read(tmp_path / "cut.wav")[0]) <= 6 * HOP


def test_a_size_or_a_quality_chooses_how_much_is_kept(exported, sounds, photos, tmp_path, capsys):
    folder, photo = exported[1], photos / "a.png"

    def encoded(*words):
        return json.loads(run(capsys, "encode", *words, "--coding", "packed", "--json"))[0]

    whole = encoded(folder, photo)
    assert whole["tokens"] == TOKENS
    for most in (whole["bytes"] - 3, whole["bytes"] - 1, whole["bytes"], whole["bytes"] + 9):
        kept = encoded(folder, photo, "--bytes", most)
        assert kept["bytes"] <= most
        assert kept["tokens"] == TOKENS or encoded(folder, photo, "--tokens", kept["tokens"] + 1)["bytes"] > most
    assert "the shortest codes take" in refused(capsys, "encode", folder, photo, "--bytes", 9)
    assert "has no duration; give --bytes" in refused(capsys, "encode", folder, photo, "--kbps", 9)
    assert "ask for no better than that" in refused(capsys, "encode", folder, photo, "--psnr", 90)
    bundle = varitok.load(folder)
    original = bundle.values(Image.open(photo))
    error = np.mean((bundle.decode(bundle.encode(original, tokens=1)) - original) ** 2)
    assert encoded(folder, photo, "--psnr", 10 * np.log10(4 / error) - 0.1)["tokens"] == 1
    soundfile.write(tmp_path / "a.wav", np.random.default_rng(0).uniform(-0.5, 0.5, 100 * HOP), RATE)
    rate = varitok.load(sounds).bits(1, 2) * RATE / HOP / 1000
    assert encoded(sounds, tmp_path / "a.wav", "--kbps", 1.1 * rate)["codebooks"] == 2
    assert "kbit/s; give that or more" in refused(capsys, "encode", sounds, tmp_path / "a.wav", "--kbps", 0.01)


@pytest.mark.parametrize("metric", ["mel", "stft"])
def test_any_metric_of_the_evaluation_is_a_target(sounds, tmp_path, capsys, metric):
    from varitok.export.adapters.codec import quality

    bundle, wave = varitok.load(sounds), np.random.default_rng(0).uniform(-0.5, 0.5, 100 * HOP).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="FLOAT")
    original = bundle.values(wave)
    measure = quality(bundle, metric, 0).measure
    codebooks = range(1, len(bundle.codebook_sizes) + 1)
    found = [
        measure(bundle.decode(bundle.encode(wave, RATE, num_codebooks=kept))[..., : len(wave)], original)
        for kept in codebooks
    ]
    words = ["encode", sounds, tmp_path / "a.wav", "--coding", "packed", "--json", "--metric"]
    best = min(found)
    for wanted in (found[0] + 1e-4, best + 1e-4):
        kept = json.loads(run(capsys, *words, f"{metric}={wanted}"))[0]["codebooks"]
        assert found[kept - 1] <= wanted
        assert kept == 1 or min(found[: kept - 1]) > wanted or found[kept - 2] > wanted
    assert f"reach at best {best:.4g}; ask for no better" in refused(capsys, *words, f"{metric}={best - 1e-3}")
    assert "give a name and a value" in refused(capsys, *words, metric)
    assert "nothing" in refused(capsys, *words, "nothing=3")


@pytest.mark.parametrize("to", ["png", "jpg", "webp"])
def test_pictures_are_written_as_asked(exported, photos, tmp_path, capsys, to):
    folder = exported[1]
    run(capsys, "encode", folder, photos / "a.png", "--out", tmp_path)
    run(capsys, "decode", folder, tmp_path / "a.vtk", "--to", to)
    image = Image.open(tmp_path / f"a.{to}")
    assert image.format.lower() == {"jpg": "jpeg"}.get(to, to)
    bundle = varitok.load(folder)
    wanted = bundle.pixels(bundle.decode(container.read(tmp_path / "a.vtk").codes()))[0].astype(int)
    assert np.abs(np.asarray(image.convert("RGB")) - wanted).mean() <= (8 if to == "jpg" else 0)
    assert "writes png, jpg, webp" in refused(capsys, "decode", folder, tmp_path / "a.vtk", "--to", "wav")


def test_a_pipe_carries_what_files_do(sounds, tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 5 * HOP + 3)
    soundfile.write(tmp_path / "a.wav", wave, RATE)

    def piped(data, *words, status=0):
        command = [sys.executable, "-m", "varitok.export.cli.main", *map(str, words)]
        done = subprocess.run(command, input=data, capture_output=True, check=False)
        assert done.returncode == status, done.stderr
        return done

    coded = piped((tmp_path / "a.wav").read_bytes(), "encode", sounds, "-")
    assert b"- -> -: " in coded.stderr
    main(["encode", str(sounds), str(tmp_path / "a.wav")])
    assert coded.stdout == (tmp_path / "a.vtk").read_bytes()
    back = piped(coded.stdout, "decode", sounds, "-", "--to", "flac").stdout
    assert back.startswith(b"fLaC")
    main(["decode", str(sounds), str(tmp_path / "a.vtk"), "--out", str(tmp_path / "back")])
    here = soundfile.read(io.BytesIO(back), dtype="int16")[0]
    assert np.array_equal(here, soundfile.read(tmp_path / "back" / "a.wav", dtype="int16")[0])
    piped(coded.stdout, "decode", sounds, "-", "--out", tmp_path / "back")
    assert (tmp_path / "back" / "stdin.wav").is_file()
    assert b"varitok decode: -: " in piped(b"nothing", "decode", sounds, "-", status=2).stderr
    files = [tmp_path / "a.wav", tmp_path / "back" / "a.wav"]
    assert b"standard output takes one" in piped(b"", "encode", sounds, *files, "--out", "-", status=2).stderr


def test_sounds_of_another_rate_are_resampled_which_is_told_once(sounds, tmp_path, capsys):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (12 * HOP, 2))
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", wave, 2 * RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "c.wav", wave[:, 0], RATE)
    main(["encode", str(sounds), *(str(tmp_path / f"{name}.wav") for name in "abc")])
    assert capsys.readouterr().err.count(f"a.wav: {2 * RATE} Hz resampled to {RATE} Hz, 2 channels averaged\n") == 1
    found = container.read(tmp_path / "b.vtk")
    assert found.units == 6 * HOP
    bundle = varitok.load(sounds)
    trained = decode_audio(tmp_path / "b.wav", sample_rate=RATE, channels=1)
    np.testing.assert_array_equal(found.codes(), bundle.encode(trained, RATE))


def test_another_bundles_codes_are_refused(exported, sounds, photos, tmp_path, capsys):
    folder, codes = exported[1], tmp_path / "a.vtk"
    encode_file(varitok.load(folder), photos / "a.png", codes)
    other = shutil.copytree(folder, tmp_path / "other")
    about = json.loads((other / "export.json").read_text())
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    import hashlib

    about["files"]["config.json"]["sha256"] = hashlib.sha256((other / "config.json").read_bytes()).hexdigest()
    (other / "export.json").write_text(json.dumps(about))
    assert "give --force if both are exports of the same codec" in refused(capsys, "decode", other, codes)
    run(capsys, "decode", other, codes, "--force", "--out", tmp_path / "forced")
    assert (tmp_path / "forced" / "a.png").is_file()
    assert "codes of image" in refused(capsys, "decode", sounds, codes, "--force")


def test_what_can_not_be_is_told_in_one_line(exported, sounds, photos, tmp_path, capsys):
    folder = exported[1]
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "some.wav", np.zeros(100), RATE)
    (tmp_path / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (tmp_path / "broken.vtk").write_bytes(b"\x89VTK\x01")
    (tmp_path / "empty").mkdir()
    for words, message in [
        (["encode", folder, tmp_path / "gone.png"], "gone.png: no such file"),
        (["encode", folder, tmp_path / "empty"], "holds no file named *.jpg, "),
        (["encode", folder, "/dev/null"], "/dev/null: neither a file nor a folder"),
        (["encode", folder, tmp_path / "broken.png"], "broken.png: image file is truncated"),
        (["encode", folder, photos / "a.png", "--tokens", TOKENS + 1], f"{TOKENS + 1} tokens: this codec takes"),
        (["encode", folder, photos / "a.png", "--codebooks", 9], "9 codebooks: this codec has"),
        (["encode", sounds, tmp_path / "nothing.wav"], "nothing.wav: no samples"),
        (["encode", sounds, tmp_path / "some.wav", "--tokens", 1], "keep fewer codebooks instead"),
        (["encode", tmp_path, photos], "is"),
        (["decode", folder, tmp_path / "broken.vtk"], "broken.vtk: cut before the first code"),
    ]:
        assert message in refused(capsys, *words)


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_bad_file_ends_no_other(exported, photos, tmp_path, capsys, more):
    folder, codes, back = exported[1], tmp_path / "codes", tmp_path / "back"
    (photos / "b.png").write_bytes((photos / "a.png").read_bytes()[:60])
    (photos / "._a.png").write_bytes(b"resource fork")
    (photos / "folder.png").mkdir()
    shutil.copy(photos / "a.png", photos / "folder.png" / "a.png")
    os.mkfifo(photos / "pipe.png")

    def partly(*words):
        with pytest.raises(SystemExit) as left:
            main([*map(str, words), *more])
        assert left.value.code == 1
        shown = capsys.readouterr()
        if more:
            bad = [one for one in json.loads(shown.out) if "error" in one]
            assert [one["error"] for one in bad] == [line.partition(": ")[2] for line in shown.err.splitlines()[:-1]]
        return shown.err

    told = partly("encode", folder, photos, "--out", codes)
    assert f"varitok encode: {photos / 'b.png'}: image file is truncated" in told and told.endswith(
        "\n1 of 5 files failed\n"
    )
    written = ["a", "below/b", "c", "folder.png/a"]
    assert sorted(codes.rglob("*.vtk")) == [codes / f"{name}.vtk" for name in written]
    (codes / "c.vtk").write_bytes(b"\x89VTK\x01")
    told = partly("decode", folder, codes, "--out", back)
    assert "c.vtk: cut before the first code arrived\n1 of 4 files failed\n" in told
    assert sorted(path for path in back.rglob("*.png") if path.is_file()) == [
        back / f"{name}.png" for name in written if name != "c"
    ]
    assert "tokens: this codec takes" in refused(capsys, "encode", folder, photos, "--tokens", TOKENS + 1)


def test_files_of_one_stem_keep_their_suffixes(exported, photos, tmp_path, capsys):
    folder, codes = exported[1], tmp_path / "codes"
    shutil.copy(photos / "a.png", photos / "a.jpg")
    run(capsys, "encode", folder, photos, photos / "a.png", "--out", codes)
    assert sorted(path.name for path in codes.iterdir()) == ["a.jpg.vtk", "a.png.vtk", "below", "c.vtk"]
    run(capsys, "decode", folder, codes, "--out", tmp_path / "back")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["a.jpg.png", "a.png.png", "below", "c.png"]


STEMS = st.from_regex(r"[ab]{1,2}(\.(vtk|jpg))?", fullmatch=True)
FOUND = st.lists(st.tuples(st.sampled_from(["one", "two/c"]), STEMS, st.sampled_from(["", ".jpg", ".PNG", ".vtk"])))


@given(found=FOUND, out=st.none() | st.just(Path("out")))
def test_each_file_has_an_output_of_its_own(found, out):
    inside = {Path(folder, stem + suffix): Path(stem + suffix) for folder, stem, suffix in found}
    pairs = destinations(inside, out, ".vtk")
    assert [path for path, _ in pairs] == list(inside)
    outputs = [goes for _, goes in pairs]
    assert len({str(goes).casefold() for goes in outputs}) == len(outputs) and not set(outputs) & set(inside)
    places = [out / below if out else path for path, below in inside.items()]
    assert [goes.parent for goes in outputs] == [place.parent for place in places]
    short = [place.with_suffix(".vtk") for place in places]
    if len({str(path).casefold() for path in [*short, *inside]}) == len(short) + len(inside):
        assert outputs == short


def test_a_decoded_file_does_not_replace_the_original_beside_its_container(tmp_path):
    for name in ("a.vtk", "a.png", "b.vtk", "c.png"):
        (tmp_path / name).touch()
    found = {tmp_path / "a.vtk": Path("a.vtk"), tmp_path / "b.vtk": Path("b.vtk")}
    for _ in range(2):
        assert [goes.name for _, goes in destinations(found, None, ".png")] == ["a.vtk.png", "b.png"]
        (tmp_path / "a.vtk.png").touch()  # an earlier output, which is replaced
    again = {tmp_path / "c.png": Path("c.png"), tmp_path / "a.png": Path("a.png")}
    assert [goes.name for _, goes in destinations(again, None, ".vtk")] == ["c.vtk", "a.vtk"]
    assert [goes.name for _, goes in destinations(found, tmp_path, ".png")] == ["a.png", "b.png"]


@pytest.mark.slow
def test_a_clip_comes_back_with_its_frames_and_rate(tmp_path, capsys):
    export_bundle(clip_codec().eval(), tmp_path / "bundle", formats=["onnx"], streaming=False)
    write(tmp_path / "a.mp4", frames(10, 36, 50))
    run(capsys, "encode", tmp_path / "bundle", tmp_path / "a.mp4")
    found = container.read(tmp_path / "a.vtk")
    assert found.units == 10 and found.codes().shape[2:] == (4, 5, 7) and found.header.signal[:2] == (36, 50)
    assert "10 frames" in run(capsys, "decode", tmp_path / "bundle", tmp_path / "a.vtk", "--out", tmp_path / "back")
    import av

    with av.open(str(tmp_path / "back" / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.width, stream.height) == (50, 36) and sum(1 for _ in file.decode(stream)) == 10
        assert round(1000 * float(stream.average_rate)) == found.header.signal[2]
    Image.fromarray(np.zeros((24, 32, 3), np.uint8)).save(tmp_path / "one.png")
    run(capsys, "encode", tmp_path / "bundle", tmp_path / "one.png")
    assert container.read(tmp_path / "one.vtk").units == 1
    (tmp_path / "none.mp4").write_bytes(b"nothing")
    assert "none.mp4: Invalid data found" in refused(capsys, "encode", tmp_path / "bundle", tmp_path / "none.mp4")
    with pytest.raises(UserError, match="frames of several sizes"):
        both = tmp_path / "both.vtk"
        both.write_bytes((tmp_path / "a.vtk").read_bytes() + (tmp_path / "one.vtk").read_bytes())
        from varitok.export.bitstream.media_files import decode_file

        decode_file(varitok.load(tmp_path / "bundle"), both, tmp_path / "both.mp4")
