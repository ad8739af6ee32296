"""Codecs, live and frozen, and bundles of whole runs have the codes and signals on a GPU that they have on the CPU."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import varitok
from varitok.codecs.build import build_codec
from varitok.codecs.implicit.codec import ImplicitCodec
from varitok.codecs.modalities.registry import MODALITIES
from varitok.codecs.precision import allow_tf32, exact_float32
from varitok.export.exporters.frozen import freeze
from varitok.export.exporters.parity import draw
from varitok.export.exporters.torchscript import load_torchscript

from ...codecs.examples import TINY_CLIP, TINY_RUN, TINY_SOUND
from ...devices import on_devices, share_equal
from .test_rebuild import CHOSEN, configuration

SMALL = [name for name in CHOSEN if name.endswith(("/demo", "_small", "_64"))]
SMALL.sort(key=lambda name: not name.endswith("/demo"))  # the quickest first
ERROR = 1e-3  # of a signal, relative to its peak
# One sum in another order may change a token's code, and with it those of all later codebooks.
LEAST = {"cpu": 0.999, "cuda": 0.9}
TINY = {"image": [*TINY_RUN, "updates=2"], "audio": TINY_SOUND, "video": TINY_CLIP}
ROOT = Path(__file__).parents[3]


@pytest.fixture
def torchs_precision():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def signals(codec, frozen):
    """Draw signals `(b, c, *grid)`, a few steps long."""
    kind = torch.int64 if codec.bottleneck.codebook_sizes else torch.float32
    axes = codec.layout.axes.split()[2:]
    size = frozen.decode(torch.zeros(1, codec.bottleneck.rows, *(1 for _ in axes), dtype=kind)).shape[1:]
    return draw(4, codec.layout.trial_sizes(tuple(size))[-1], torch.Generator().manual_seed(0))


@pytest.mark.usefixtures("torchs_precision")
@on_devices
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_a_codec_codes_as_on_the_cpu(device, name, record_property):
    codec = build_codec(configuration(name)).eval()
    if isinstance(codec, ImplicitCodec):
        pytest.skip("the network of one clip has no encoder")
    frozen = freeze(codec)
    signal = signals(codec, frozen)
    codes, size = codec.encode(signal), signal.shape[2:]
    back = codec.decode(codes, size)
    codec.to(device)
    shares = {}
    for precision in ("tf32", "ieee"):
        allow_tf32(precision == "tf32")
        shares[precision] = share_equal(codes, codec.encode(signal.to(device)))
        painted = codec.decode(codes.to(device), size).cpu()
        error = ((painted - back).abs().max() / back.abs().max()).item()
        record_property(f"{precision}, equal codes", shares[precision])
        record_property(f"{precision}, signal error", error)
    assert error < ERROR
    frozen.to(device)
    with exact_float32():  # whatever the caller allows, as evaluation and `varitok tokenize` do
        assert share_equal(codes, codec.encode(signal.to(device))) == shares["ieee"]
        found = frozen.encode(signal.to(device))
        assert frozen.decode(found).device.type == device
    shares["frozen"] = share_equal(codes, found)
    record_property("frozen, equal codes", shares["frozen"])
    assert min(shares["ieee"], shares["frozen"]) >= LEAST[device]


def command(modality, device, folder):
    """Return the command line of a small run with samples, evaluations and checkpoints on the way, and a bundle."""
    words = [f"experiment={modality}/demo", "updates=20", "checkpoint.every=10", "loader.workers=2"]
    words += ["callbacks.samples.every=10", "callbacks.evaluation.every=10", "data.val_length=8"]
    words = TINY[modality] if device == "cpu" else words
    words = [*words, f"trainer.accelerator={device}", "export=whole"]
    words += ["export.formats=[safetensors,torchscript]"]  # ONNX Runtime's is the CPU's
    words += [] if find_spec("av") else ["callbacks.samples=null"]  # of clips they are MP4 files
    return [sys.executable, str(ROOT / "train.py"), *words, f"hydra.run.dir={folder}"]


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Return a function that starts a modality's run; on a GPU, those of all modalities at once."""
    runs = {}

    def start(device, modality):
        for name in [modality] if device == "cpu" else TINY:
            if (device, name) not in runs:
                folder = tmp_path_factory.mktemp(f"{device}_{name}")
                words, pipe = command(name, device, folder), subprocess.PIPE
                runs[device, name] = folder, subprocess.Popen(words, stdout=pipe, stderr=subprocess.STDOUT, text=True)
        return runs[device, modality]

    yield start
    for _, process in runs.values():
        process.kill()


@on_devices
@pytest.mark.parametrize("modality", TINY)
def test_a_whole_run_leaves_a_bundle(started, device, modality, record_property):
    folder, process = started(device, modality)
    told = process.communicate()[0]
    assert process.returncode == 0, told[-2000:]
    bundle = folder / "bundle"
    golden = load_file(bundle / "golden.safetensors")
    frozen, (script, _) = varitok.load_torch(bundle).to(device), load_torchscript(bundle / "codec.ts")
    names = MODALITIES[modality].graph
    signal, codes = golden[names.signal].to(device), golden[names.codes]
    with torch.no_grad(), exact_float32():
        found, scripted = frozen.encode(signal), script.to(device).encode(signal)
        share = share_equal(codes, found)
        record_property("bundle, equal codes", share)
        assert share >= LEAST[device] and share_equal(found, scripted) >= LEAST[device]
        back = frozen.decode(codes.to(device))
        torch.testing.assert_close(script.decode(codes.to(device)), back, rtol=1e-3, atol=1e-3)
    most = max(int(key.rpartition(".")[2]) for key in golden if key.startswith(f"{names.back}."))
    torch.testing.assert_close(back.cpu(), golden[f"{names.back}.{most}"], rtol=1e-3, atol=1e-3)
