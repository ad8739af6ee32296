"""The live page, in headless Chromium: its codes, signals and files are those of the Python runtime."""

import base64
import io
import os
import subprocess

import numpy as np
import pytest
import soundfile
from PIL import Image
from safetensors.numpy import load_file

import varitok
from varitok import UserError
from varitok.export.bitstream import container
from varitok.export.bitstream.media_files import encode_file
from varitok.export.cli.main import main
from varitok.export.report.live import page
from varitok.export.report.live.page import cached_runtime, find_runtime, write_live

from ....browser import CHROMIUM, chromium
from ....codecs.examples import HOP, RATE, SIZE, TOKENS, tiled_codec
from ...conftest import awake

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
needs_runtime = pytest.mark.skipif(
    not cached_runtime().is_file(), reason="onnxruntime-web is not in the cache; varitok report --live gets it"
)

GIVE = """(async () => {{
  window.saved = null;
  const bytes = Uint8Array.from(atob("{data}"), (letter) => letter.charCodeAt(0));
  const files = new DataTransfer();
  files.items.add(new File([bytes], "{name}"));
  const input = document.getElementById("file");
  input.files = files.files;
  input.dispatchEvent(new Event("change"));
}})()"""
SAVED = """(async () => {
  document.getElementById("%s").click();
  while (!window.saved) await new Promise((done) => setTimeout(done, 20));
  const bytes = new Uint8Array(await window.saved.arrayBuffer());
  window.saved = null;
  return btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
})()"""
CATCH = (
    "{ const make = URL.createObjectURL.bind(URL); URL.createObjectURL = (b) => { window.saved = b; return make(b); } }"
)


def give(browser, name, data):
    browser.run("document.getElementById('size').textContent = ''; document.getElementById('told').textContent = ''")
    browser.run(GIVE.format(data=base64.b64encode(data).decode(), name=name))
    browser.wait(
        "document.getElementById('size').textContent || document.getElementById('told').classList.contains('wrong')"
    )


def saved(browser, button="save"):
    browser.run("window.saved = null")
    return base64.b64decode(browser.run(SAVED % button))


def keep(browser, count):
    browser.run(
        f"{{ const s = document.getElementById('kept'); s.value = {count}; s.dispatchEvent(new Event('input')); }}"
    )
    browser.wait(f"document.getElementById('size').textContent.startsWith('{count} ')")


def opened(browser, path):
    browser.open(path)
    browser.run(CATCH)
    browser.wait("document.getElementById('told').textContent.startsWith('Ready')")


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def photo(width, height, seed=0):
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(seed).integers(0, 40, (height, width, 3))
    pixels = np.stack([x * 200 // width, y * 200 // height, (x + y) % 200], axis=-1) + noise
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


@needs_browser
@needs_runtime
@pytest.mark.slow
def test_pictures_have_the_codes_and_files_that_python_gives(browser, exported, tmp_path):
    folder, bundle = exported[1], varitok.load(exported[1])
    write_live(tmp_path / "live.html", folder, cached_runtime())
    browser.complaints.clear()
    browser.requests.clear()
    opened(browser, tmp_path / "live.html")
    assert browser.run("document.getElementById('told').textContent").startswith("Ready. This is the bundle's example")
    golden = load_file(folder / "golden.safetensors")
    keep(browser, 1)
    first = np.asarray(Image.open(io.BytesIO(saved(browser, "save-signal"))).convert("RGB")).astype(int)
    assert abs(first - bundle.pixels(golden["reconstruction.1"])[0].astype(int)).max() <= 1
    for width, height in ((SIZE, SIZE), (61, 40), (9, 30), (200, 133)):
        (tmp_path / "a.png").write_bytes(photo(width, height))
        give(browser, "a.png", photo(width, height))
        for kept in (TOKENS, 1, 3):
            keep(browser, kept)
            encode_file(bundle, tmp_path / "a.png", tmp_path / "a.vtk", tokens=kept, coding="packed")
            assert saved(browser) == (tmp_path / "a.vtk").read_bytes(), (width, height, kept)
            seen = np.asarray(Image.open(io.BytesIO(saved(browser, "save-signal"))).convert("RGB")).astype(int)
            wanted = bundle.pixels(bundle.decode(container.read(tmp_path / "a.vtk").codes()))[0].astype(int)
            assert abs(seen - wanted).max() <= 1
    small = (tmp_path / "a.vtk").read_bytes()
    give(browser, "b.vtk", small)
    assert browser.run("document.getElementById('kept').max") == "3" and saved(browser) == small
    assert browser.run("document.getElementById('original').hidden")
    for name, data, told in (
        ("cut.vtk", small[:-6], "truncated"),
        ("flipped.vtk", small[:-7] + bytes([small[-7] ^ 1]) + small[-6:], "damaged: the checksum of a chunk differs"),
        ("other.vtk", small[:6] + bytes(8) + small[14:], "damaged"),
        ("a.txt", b"nothing of the kind", "can't read it as an image; use varitok encode"),
        ("a.tif", b"II*\0" + bytes(40), "can't read it as an image; use varitok encode"),
        ("text.vtk", b"nothing of the kind", "not a varitok container"),
    ):
        give(browser, name, data)
        assert told in browser.run("document.getElementById('told').textContent"), name
    encode_file(bundle, tmp_path / "a.png", tmp_path / "coded.vtk", coding="adaptive")
    give(browser, "coded.vtk", (tmp_path / "coded.vtk").read_bytes())
    assert "use varitok decode" in browser.run("document.getElementById('told').textContent")
    asked = [url for url in browser.requests if not url.startswith(("file:", "blob:"))]
    assert not asked and not browser.complaints


@needs_browser
@needs_runtime
@pytest.mark.slow
def test_images_on_a_grid_have_the_codes_and_files_that_python_gives(browser, once, tmp_path):
    folder, _ = once("tiled", awake(tiled_codec()), image_size=16, formats=["onnx"])
    bundle = varitok.load(folder)
    write_live(tmp_path / "live.html", folder, cached_runtime())
    browser.complaints.clear()
    opened(browser, tmp_path / "live.html")
    for width, height in ((16, 16), (1, 1), (61, 40), (9, 30)):
        (tmp_path / "a.png").write_bytes(photo(width, height))
        give(browser, "a.png", photo(width, height))
        for kept in (2, 1):
            keep(browser, kept)
            encode_file(bundle, tmp_path / "a.png", tmp_path / "a.vtk", num_codebooks=kept, coding="packed")
            assert saved(browser) == (tmp_path / "a.vtk").read_bytes(), (width, height, kept)
            seen = np.asarray(Image.open(io.BytesIO(saved(browser, "save-signal"))).convert("RGB")).astype(int)
            wanted = bundle.decode(container.read(tmp_path / "a.vtk").codes(), (height, width))
            assert abs(seen - bundle.pixels(wanted)[0].astype(int)).max() <= 1
    small = (tmp_path / "a.vtk").read_bytes()
    give(browser, "b.vtk", small)
    assert browser.run("document.getElementById('kept').max") == "1" and saved(browser) == small
    assert browser.run("document.getElementById('original').hidden")
    assert not browser.complaints


@needs_browser
@needs_runtime
@pytest.mark.slow
def test_sounds_have_the_codes_and_files_that_python_gives(browser, exported_sounds, tmp_path):
    bundle = varitok.load(exported_sounds[1])
    write_live(tmp_path / "live.html", exported_sounds[1], cached_runtime())
    browser.complaints.clear()
    opened(browser, tmp_path / "live.html")
    assert "LibriSpeech" in browser.run("document.getElementById('told').textContent")
    for channels, count in ((1, 20 * HOP + 3), (2, 500)):
        wave = np.random.default_rng(0).uniform(-0.5, 0.5, (count, channels))
        soundfile.write(tmp_path / "a.wav", wave, RATE, subtype="PCM_16")
        give(browser, "a.wav", (tmp_path / "a.wav").read_bytes())
        for codebooks in (4, 1):
            keep(browser, codebooks)
            encode_file(bundle, tmp_path / "a.wav", tmp_path / "a.vtk", num_codebooks=codebooks, coding="packed")
            assert saved(browser) == (tmp_path / "a.vtk").read_bytes()
            heard, rate = soundfile.read(io.BytesIO(saved(browser, "save-signal")), always_2d=True)
            wanted = bundle.decode(container.read(tmp_path / "a.vtk").codes())[0, :, :count].T
            assert rate == RATE and heard.shape == wanted.shape
            np.testing.assert_allclose(heard, wanted, atol=1e-4)
    playing = "document.getElementById('after')"
    browser.run(f"{playing}.play()", gesture=True)
    browser.wait(f"{playing}.currentTime > 0 || {playing}.ended")
    soundfile.write(tmp_path / "b.flac", np.random.default_rng(0).uniform(-0.5, 0.5, (2 * RATE, 2)), 2 * RATE)
    give(browser, "b.flac", (tmp_path / "b.flac").read_bytes())
    assert "kbit/s" in browser.run("document.getElementById('size').textContent")
    told = browser.run("document.getElementById('told').textContent")
    assert told.endswith(f"ms: {2 * RATE} Hz resampled to {RATE} Hz, 2 channels averaged.")
    for name, data, told in (
        ("a.wav", b"RIFF", "a.wav: this browser can't read it as an audio file; use varitok encode"),
        ("a.aif", b"FORM" + bytes(40), "a.aif: this page can't find its sample rate; use varitok encode"),
    ):
        give(browser, name, data)
        assert browser.run("document.getElementById('told').textContent") == told
    assert not browser.complaints


def test_mistakes_are_told_in_one_line(exported, tmp_path, capsys, monkeypatch):
    (tmp_path / "wrong.tgz").write_bytes(b"something else")
    for words, message in [
        ([exported[1], "--onnxruntime-web", tmp_path / "gone.tgz"], "not onnxruntime-web"),
        ([exported[1], "--onnxruntime-web", tmp_path / "wrong.tgz"], "as it was published"),
        ([exported[1], "--onnxruntime-web", tmp_path], "not onnxruntime-web"),
        ([exported[1], exported[1]], "--live shows one bundle"),
        ([tmp_path], "can't be read"),
    ]:
        with pytest.raises(SystemExit) as left:
            main(["report", "--live", "--out", str(tmp_path / "live.html"), *map(str, words)])
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1 and message in told
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(page.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="there is no npm to get it; give --onnxruntime-web"):
        find_runtime()
    failed = subprocess.CompletedProcess([], 1)
    monkeypatch.setattr(page.shutil, "which", lambda name: os.devnull)
    monkeypatch.setattr(page.subprocess, "run", lambda *words, **options: failed)
    with pytest.raises(UserError, match="npm could not get it"):
        find_runtime()
