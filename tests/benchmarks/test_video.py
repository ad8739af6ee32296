"""The benchmark of clips: the plain rendering is the same codec, and the table is written."""

import importlib.util
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "video.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("benchmark_video", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@torch.no_grad()
def test_the_plain_rendering_is_the_same_codec(script):
    codec = script.make("vidtok_small", "cpu")
    clip = torch.rand(2, 3, 12, 16, 24) * 2 - 1
    encoder, decoder = script.PlainEncoder(codec.encoder), script.PlainDecoder(codec.decoder)
    latents = codec.encoder(clip)
    torch.testing.assert_close(encoder(clip), latents, rtol=1e-4, atol=1e-4)
    back = codec.decoder(latents, None, [3, 2, 3])
    torch.testing.assert_close(decoder(latents, None, [3, 2, 3]), back, rtol=1e-4, atol=1e-4)
    for plain, ours in ((encoder, codec.encoder), (decoder, codec.decoder)):
        assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in ours.parameters())


@pytest.mark.slow
def test_it_writes_its_table(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "STEPS", (2,))
    out = tmp_path / "t.csv"
    small = ["--codec", "vidtok_small", "--size", "16", "--rounds", "1", "--forms", "ours", "bf16"]
    script.main([*small, "--only", "step", "decode", "--out", str(out)])
    lines = [line for line in out.read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "task,form,ms,speedup,latent_frames,mib"
    assert [line.split(",")[:2] for line in lines[1:]] == [
        [task, form] for task in ("step", "decode") for form in ("plain", "ours", "bf16")
    ]
    script.main([*small, "--child", "encode", "chunks", "2"])
    assert float(capsys.readouterr().out.splitlines()[-1]) >= 0
