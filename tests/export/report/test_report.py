"""The report: one page that holds everything, is correct, and escapes every name."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from varitok import UserError
from varitok.codecs.build import load_run
from varitok.codecs.evaluation.table import read_csv, write_rows
from varitok.data.batch import to_uint8
from varitok.data.decoding.video import VideoFile
from varitok.export.report import page as page_module
from varitok.export.report.classics import read_classics
from varitok.export.report.cli import main
from varitok.export.report.page import write_page
from varitok.export.report.plots import draw_progress
from varitok.export.report.subject import Source, open_subject

from ...browser import CHROMIUM, chromium
from .runs import HOSTILE, RUNS, make_pictures, make_run


class Page(HTMLParser):
    """A page's elements, its data, and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        found = re.search(r'<script type="application/json" id="media">(.*?)</script>', self.source, re.DOTALL)
        assert found
        self.media = json.loads(found[1])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def bytes_of(address: str | None, kind: str) -> bytes:
    assert address is not None
    head, _, data = address.partition(",")
    assert head == f"data:{kind};base64"
    return base64.b64decode(data, validate=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    names = {"image": HOSTILE}
    made = {kind: make_run(tmp_path_factory.mktemp(kind), words, names.get(kind)) for kind, words in RUNS.items()}
    for folder in made.values():  # whatever is logged is a figure of its own, which takes a moment
        log = folder / "metrics.csv"
        rows = log.read_text().splitlines(keepends=True)
        log.write_text("".join(row for row in rows if row.split(",")[1] in ("name", "loss", "lr", "health/used")))
    return made


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    main([*map(str, runs.values()), "--out", str(path), "--count", "2", "--seconds", "1.1"])
    return Page(path)


def test_it_asks_for_nothing_and_lets_nothing_else_run(page):
    links = [value for _, attributes in page.tags for name, value in attributes.items() if name in ("src", "href")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page.source and "url(http" not in page.source
    (policy,) = (one["content"] for one in page.all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/]{43}='", policy)


def test_names_stay_names(page):
    assert [one.get("type") for one in page.all("script")] == ["application/json", None]
    assert not any("onerror" in one for one in page.all("img"))
    assert any(HOSTILE in text for text in page.text)


def test_the_slider_has_the_evaluations_rungs(page, runs):
    for (subject, found), folder in zip(page.media.items(), runs.values(), strict=True):
        table = read_csv(folder / "evaluation/evaluation.csv")
        assert [int(rung["name"].split()[0]) for rung in found["rungs"]] == table.column(table.axis)
        assert f'id="{subject}"' in page.source and len(found["samples"]) == 2
        assert all(len(sample) == len(table.rows) for sample in found["samples"])
        assert f"{table.rows[-1]['bytes']:.0f} bytes" in found["rungs"][-1]["told"]
    assert [one["max"] for one in page.all("input")] == [str(len(one["rungs"]) - 1) for one in page.media.values()]
    assert ["disabled" in one for one in page.all("input")] == [False, False, True]  # the clips' codec has one codebook


@torch.no_grad()
def test_pictures_are_what_the_codec_gives_back_pixel_by_pixel(page, runs):
    codec, _ = load_run(runs["image"])
    first = next(one for one in page.all("img") if one["src"])
    with Image.open(io.BytesIO(bytes_of(first["src"], "image/webp"))) as image:
        original = np.asarray(image.convert("RGB"))
    codes = codec.encode(torch.from_numpy(original.copy()).permute(2, 0, 1)[None] / 127.5 - 1)
    for keep, (picture, player, told) in zip((1, 2, 4), page.media["subject-0"]["samples"][0], strict=True):
        with Image.open(io.BytesIO(bytes_of(picture, "image/webp"))) as image:
            shown = np.asarray(image.convert("RGB"))
        expected = to_uint8(codec.decode(codes[..., :keep]))[0].permute(1, 2, 0).numpy()
        assert (shown == expected).all() and not player
        assert told.startswith(f"{-(-12 * keep // 8)} bytes · PSNR ")


def test_sounds_come_without_loss_and_cut(page):
    sample = page.media["subject-1"]["samples"][0]
    sounds = [soundfile.read(io.BytesIO(bytes_of(player, "audio/flac"))) for _, player, _ in sample]
    assert {rate for _, rate in sounds} == {16000} and {len(sound) for sound, _ in sounds} == {17600}
    assert not np.array_equal(sounds[0][0], sounds[-1][0])
    with Image.open(io.BytesIO(bytes_of(sample[0][0], "image/webp"))) as picture:
        assert picture.height > 100
    original = next(one for one in page.all("audio") if "src" in one)
    assert soundfile.info(io.BytesIO(bytes_of(original["src"], "audio/flac"))).frames == 17600


def test_clips_are_films(page, tmp_path):
    (picture, player, told) = page.media["subject-2"]["samples"][0][0]
    (tmp_path / "clip.mp4").write_bytes(bytes_of(player, "video/mp4"))
    with VideoFile(tmp_path / "clip.mp4") as video:
        assert (video.length, video.height, video.width) == (9, 16, 16)
    assert not picture and "bytes" in told
    assert {(one["width"], one["height"]) for one in page.all("video")} == {("16", "16")}


def test_it_shows_curves_codebooks_bits_and_configuration(page):
    labels = [one.get("aria-label", "") for one in page.all("svg")]
    assert "PSNR (dB) over bytes per image" in labels and "loss over updates" in labels
    assert any(label.startswith("mel distance") and label.endswith("over kbit/s") for label in labels)
    assert not re.search(r"(fill|stroke): #", page.source)  # all colors are the style sheet's
    assert len(page.all("meter")) == 2 * (1 + 3 + 1)  # use and entropy of all codebooks
    assert "_target_: varitok.codecs.codec.Codec" in page.source and "What the columns mean" in page.text


@pytest.mark.slow
def test_of_one_kind_they_are_drawn_together(runs, tmp_path):
    path = tmp_path / "two.html"
    image, clip = (open_subject(runs[kind], Source(most=1))._replace(progress={}) for kind in ("image", "video"))
    write_page(path, [image, image, clip])
    found = Page(path)
    assert "All images together" in found.text and not any("All clips" in text for text in found.text)
    assert "PSNR (dB) over bits per pixel" in [one.get("aria-label") for one in found.all("svg")]


def test_classical_codecs_are_drawn_where_they_belong(runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs["image"], folder)
    rows = [
        {"codec": name, "counted": "payload", "bytes": 9 * n, "psnr": 20.0 + n}
        for name in ("JPEG", "varitok")
        for n in (1, 2)
    ]
    write_rows(folder / "evaluation/classic.csv", {"dataset": "others"}, [*rows, rows[0] | {"counted": "file"}])
    sounds = tmp_path / "sounds.csv"
    write_rows(sounds, {}, [{"codec": "Opus", "kbps": 6.0, "mel": 2.0}, {"codec": "Opus", "kbps": 9.0, "mel": ""}])
    (folder / "metrics.csv").unlink()
    main([str(folder), str(runs["audio"]), "--classic", str(sounds), "--out", str(tmp_path / "a.html"), "--count", "1"])
    image, sound = Page(tmp_path / "a.html").source.split('<section id="')[1:]
    assert ">JPEG<" in image and "Opus" not in image and "others" in image
    assert ">Opus<" in sound and "JPEG" not in sound
    (curve,) = read_classics(folder / "evaluation/classic.csv").curves("bytes", "psnr")
    assert (curve.name, curve.sizes, curve.values["psnr"]) == ("JPEG", [9, 18], [21, 22])


def test_a_bundle_is_shown_on_files(exported, tmp_path):
    codec, folder, _ = exported
    hostile = '<img src=x onerror=alert(3)>".png'
    pictures = make_pictures(tmp_path, "a.png", hostile)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "words.txt").write_text("no picture")
    main([str(folder), "--files", str(pictures), str(tmp_path / "a.png"), "--out", str(tmp_path / "b.html")])
    found = Page(tmp_path / "b.html")
    media = found.media["subject-0"]
    assert len(media["samples"]) == 2 and [rung["name"] for rung in media["rungs"]][-1] == f"{codec.tokens} tokens"
    assert any("2 of 3 images" in text for text in found.text) and "unreadable files left out" in found.text
    assert not any("onerror" in one for one in found.all("img")) and hostile in found.text


@pytest.mark.slow
def test_what_has_no_room_is_left_out_and_told(runs, tmp_path, monkeypatch):
    subject = open_subject(runs["audio"], Source(most=3, seconds=0.5))._replace(
        progress={}
    )  # which takes seconds to draw
    whole = tmp_path / "whole.html"
    write_page(whole, [subject])
    shown = Page(whole).media["subject-0"]["samples"]
    assert len(soundfile.read(io.BytesIO(bytes_of(shown[0][0][1], "audio/wav")))[0]) == 8000
    sizes = [len(json.dumps(sample)) for sample in shown]
    # Originals take room too: as much as a third of what comes back.
    monkeypatch.setattr(page_module, "MOST_BYTES", whole.stat().st_size)
    monkeypatch.setattr(page_module, "SHARE", 1.5 * sum(sizes[:2]) / whole.stat().st_size)
    write_page(tmp_path / "less.html", [subject])
    found = Page(tmp_path / "less.html")
    assert len(found.media["subject-0"]["samples"]) < 3 and any("have room in the page" in text for text in found.text)
    monkeypatch.setattr(page_module, "SHARE", 0.001)
    with pytest.raises(UserError, match="has no room"):
        write_page(tmp_path / "none.html", [subject])
    monkeypatch.undo()
    monkeypatch.setattr(page_module, "MOST_BYTES", whole.stat().st_size - 1)
    with pytest.raises(UserError, match="above"):
        write_page(tmp_path / "none.html", [subject])
    assert not (tmp_path / "none.html").exists()


def test_a_long_run_is_thinned():
    line = {update: float(update % 2) for update in range(0, 1_000_000, 50)}
    assert len(draw_progress({"a": line}, "loss")) < 60_000


def test_mistakes_end_in_one_line(runs, exported, tmp_path):
    bundle, image = exported[1], runs["image"]
    folders = {name: tmp_path / name for name in ("empty", "bare", "unevaluated", "torn", "logged", "edited", "noise")}
    folders["empty"].mkdir()
    for name in ("bare", "unevaluated", "logged", "edited"):
        shutil.copytree(image, folders[name])
    shutil.rmtree(folders["bare"] / "checkpoints")
    shutil.rmtree(folders["unevaluated"] / "evaluation")
    (folders["logged"] / "metrics.csv").write_text("update,name,value\n1,loss,much\n")
    (folders["edited"] / "evaluation/evaluation.csv").write_text("k,bytes,bpp,psnr\n4,1,1,1\n2,1,1,1\n")
    shutil.copytree(bundle, folders["torn"])
    with (folders["torn"] / "onnx/decoder_model.onnx").open("ab") as file:
        file.write(b"more")
    folders["noise"].mkdir()
    (folders["noise"] / "words.txt").write_text("words")
    (folders["noise"] / "bad.png").write_bytes(b"bad")
    picture = str(make_pictures(tmp_path, "a.png") / "a.png")
    for words, expected in [
        (["nowhere"], "no such folder"),
        ([folders["empty"]], "neither a run's folder nor a bundle's"),
        ([folders["bare"]], "no such checkpoint"),
        ([folders["unevaluated"]], "run varitok evaluate"),
        ([folders["logged"]], "not the log of a run"),
        ([folders["edited"]], "not an evaluation of this run's codec"),
        ([folders["torn"], "--files", picture], "altered since it was exported"),
        ([bundle], "give some images with --files"),
        ([bundle, "--files", folders["noise"] / "words.txt"], "--files has no images"),
        ([bundle, "--files", folders["noise"]], "none of the validation signals"),
        ([bundle, "--files", "nowhere.png"], "no such file or folder"),
        ([image, "--classic", image / "evaluation/evaluation.csv"], "no table of classical codecs"),
        ([image, "--classic", "nowhere.csv"], "No such file"),
        ([image, "--count", "0"], "--count=0"),
        ([image, "--seconds", "nan"], "--seconds: expected a number, got nan"),
        ([image, "--data", folders["empty"]], "no image in this folder"),
        ([image, "--out", tmp_path], "can't be written"),
    ]:
        with pytest.raises(UserError) as caught:
            main([*map(str, words), *(() if "--out" in words else ("--out", str(tmp_path / "never.html")))])
        told = str(caught.value)
        assert expected in told and "\n" not in told, (words, told)
    assert not (tmp_path / "never.html").exists()


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no Chromium here")
    with chromium() as started:
        started.show(1280, 900)
        yield started


@pytest.fixture
def opened(browser, page):
    """Open the page anew; whatever a test does there, it must not make the browser complain."""
    browser.complaints.clear()
    browser.requests.clear()
    browser.show(1280, 900)
    browser.open(page.path)
    yield browser
    assert browser.complaints == []
    assert browser.requests == [page.path.resolve().as_uri()]


SHOWN = "document.querySelector('#subject-{} .decoded {}')"


def test_in_a_browser_the_keys_move_the_slider_and_change_the_picture(opened, page):
    decoded = [picture for picture, _, _ in page.media["subject-0"]["samples"][0]]
    image = SHOWN.format(0, "img")
    assert opened.run(f"{image}.src") == decoded[-1]
    opened.run("document.querySelector('#subject-0 input').focus()")
    opened.press("ArrowLeft", 37)
    assert opened.run(f"{image}.src") == decoded[-2] and opened.run(f"{image}.alt").endswith("from 2 tokens")
    opened.press("Home", 36)
    assert opened.run(f"{image}.src") == decoded[0]
    assert opened.run(f"{image}.decode().then(() => {image}.naturalWidth)") == 16
    assert opened.run("document.querySelector('#subject-0 input').getAttribute('aria-valuetext')") == "1 token"
    told = opened.run("document.querySelector('#subject-0 output').textContent")
    assert told == page.media["subject-0"]["rungs"][0]["told"]
    assert opened.run("document.querySelector('#subject-0 tr.current').dataset.rung") == "0"
    # Each subject has a slider of its own.
    assert opened.run("document.querySelector('#subject-1 input').value") == "2"


def test_in_a_browser_sounds_play_and_play_on_when_the_slider_moves(opened, page):
    sounds = [player for _, player, _ in page.media["subject-1"]["samples"][0]]
    audio = SHOWN.format(1, "audio")
    opened.run(f"{audio}.loop = true; {audio}.play()", gesture=True)
    opened.wait(f"{audio}.currentTime > 0.02")
    slider = "document.querySelector('#subject-1 input')"
    opened.run(f"{slider}.value = 0; {slider}.dispatchEvent(new Event('input'))")
    assert opened.run(f"{audio}.src") == sounds[0] != sounds[-1]
    opened.wait(f"!{audio}.paused && {audio}.currentTime > 0.02")
    original = "document.querySelector('#subject-1 .original audio')"
    opened.run(f"{original}.loop = true; {original}.play()", gesture=True)
    opened.wait(f"{original}.currentTime > 0.02 && {audio}.paused")  # one at a time


def test_in_a_browser_clips_play(opened):
    for side in ("original", "decoded"):
        video = f"document.querySelector('#subject-2 .{side} video')"
        opened.wait(f"{video}.videoWidth === 16 && !{video}.paused && {video}.currentTime > 0")
    assert not opened.run("document.querySelector('video').controls")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_in_a_browser_it_fits_a_phone_by_day_and_by_night(opened, dark):
    opened.show(360, 780, dark=dark, mobile=True)
    assert opened.run("innerWidth") == 360 and opened.run("document.documentElement.scrollWidth") <= 360
    light = "getComputedStyle(document.body).{}.match(/[0-9]+/g).reduce((sum, part) => sum + Number(part), 0) / 765"
    paper, ink = (opened.run(light.format(name)) for name in ("backgroundColor", "color"))
    assert (paper < 0.2 and ink > 0.8) if dark else (paper > 0.9 and ink < 0.2)
    svg = "getComputedStyle(document.querySelector('.plots svg text')).fill"
    assert opened.run(svg) == opened.run("getComputedStyle(document.body).color")
    opened.show(1280, 900)
