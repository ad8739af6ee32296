"""The classic coders of clips: sizes and quality fall together, frames come back in their places, mistakes are told."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from varitok.codecs.metrics.image import psnr
from varitok.data.scenes import Scenes

from ..data.clips import frames, write

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "classic_video.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("classic_video", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["classic_video"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def clip():
    return Scenes(5, 33)[0, 1]


@pytest.mark.parametrize("kind", ["H.264", "H.265", "AV1", "VP9"])
def test_frames_come_back_smaller_and_worse(script, clip, kind):
    settings = script.FORMATS[kind].settings
    sizes, values = [], []
    for quality in (settings[0], settings[-1]):
        coded = script.encode(kind, quality, clip, 8.0)
        back = script.decode(kind, coded, clip.shape[1:])
        assert back.shape == clip.shape and back.dtype == torch.uint8
        sizes.append(coded.payload)
        values.append(psnr(back.transpose(0, 1), clip.transpose(0, 1)).mean().item())
    assert sizes[1] < 0.5 * sizes[0] and values[1] < values[0] - 3
    assert values[0] > 26 and coded.payload == sum(map(len, coded.packets))


def test_the_script_writes_its_table(script, tmp_path, capsys):
    (tmp_path / "val").mkdir()
    (tmp_path / "train").mkdir()
    for split in ("train", "val"):
        write(tmp_path / split / "a.mp4", frames(6))
    (tmp_path / "val" / "b.mp4").write_bytes(b"broken")
    out = tmp_path / "t.csv"
    script.main([str(tmp_path), "--size", "32", "--frames", "4", "--codecs", "H.264", "--out", str(out)])
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "codec,crf,bytes,bpp,psnr,ssim,flicker" and len(lines) == 9
    assert "1 clips" in out.read_text() and "b.mp4" in capsys.readouterr().err


def test_a_mistake_is_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        script.main([str(tmp_path / "gone"), "--out", str(tmp_path / "t.csv")])
    assert stop.value.code == 2 and "no such folder" in capsys.readouterr().err
