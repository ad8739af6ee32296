"""Signals of any length within a given memory: their codes are the whole's where the codec allows it."""

import json
from itertools import pairwise

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import varitok
from varitok import UserError
from varitok.codecs.bottlenecks.fsq import FiniteScalarQuantizer
from varitok.codecs.codec import Codec
from varitok.codecs.lengths.distributions import Full
from varitok.codecs.lengths.policy import LengthPolicy, Truncate
from varitok.codecs.networks.conv_codec import ConvDecoder, ConvEncoder
from varitok.codecs.networks.resnet import ResNetDecoder, ResNetEncoder
from varitok.export.bitstream import container
from varitok.export.bitstream.media_files import decode_file, encode_file
from varitok.export.bitstream.rate_control import Target, psnr
from varitok.export.exporters.examples import EMBEDDED
from varitok.export.exporters.memory import measure_memory
from varitok.export.runtime.files import SignalFile
from varitok.export.runtime.memory import PROCESS, decode_within, encode_within, plan
from varitok.export.runtime.video import VideoBundle

from ...codecs.examples import HOP, RATE, loud
from ...processes import READS_PEAKS, peak_memory
from .test_examples import write_bundle

LITTLE = PROCESS + 0.002  # GB: the hand-made graphs have 2 MB for their activations


class Led(VideoBundle):
    """A causal codec of clips that was exported without streaming graphs."""

    def run_encoder(self, signal):
        return super().run_encoder(np.concatenate([signal[:, :, :1]] * self.causal_pad + [signal], axis=2))

    def run_decoder(self, codes):
        return super().run_decoder(codes)[:, :, self.causal_pad :]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Return bundles whose codecs look no further than a step."""
    folder, made = tmp_path_factory.mktemp("bundles"), {}
    for name in ("audio", "video"):
        write_bundle(folder / name, name)
        made[f"{name}, streams"] = varitok.load(folder / name)
        made[name] = varitok.load(folder / name)
        del made[name].config["streaming"]
    made["video, led"] = Led(folder / "video", made["video"].config | {"lead": 3}, ["CPUExecutionProvider"])
    return made


@given(data=st.data(), share=st.floats(0, 1))
def test_what_does_not_fit_is_coded_in_parts_as_the_whole(bundles, data, share):
    name = data.draw(st.sampled_from(sorted(bundles)))
    bundle = bundles[name]
    sides = (40, 24) if bundle.axes == 3 else ()
    length = data.draw(st.integers(1, 60 if sides else 2000))
    values = np.random.default_rng(length).uniform(-1, 1, (1, bundle.channels, length, *sides)).astype(np.float32)
    most = 120 if bundle.axes == 3 else 1e4
    bundle.memory = dict.fromkeys(("encoder", "decoder"), (0.0, most**share, 0.0))
    whole = bundle.encode_values(values)
    file = SignalFile(length, lambda count: (values[:, :, at : at + count] for at in range(0, length, count)))
    coded = encode_within(bundle, file, LITTLE)
    np.testing.assert_array_equal(coded.codes, whole)
    assert coded.size == values.shape[2:]
    assert coded.whole == (whole.shape[2] <= plan(bundle, "encoder", sides, LITTLE).whole)
    back = np.concatenate(list(decode_within(bundle, whole, coded.size, LITTLE)), axis=2)
    assert back.shape == values.shape
    wanted = bundle.run_decoder(whole)[(..., *map(slice, values.shape[2:]))]
    np.testing.assert_allclose(back, wanted, rtol=0, atol=1e-6)


def test_the_plan_follows_from_the_memory(bundles):
    sound, clip, streams = (bundles[name] for name in ("audio", "video", "audio, streams"))
    sound.memory = {"encoder": (0.0, 500.0, 1e-2)}
    clip.memory = streams.memory = {"encoder": (0.0, 200.0, 0.0)}
    budgets = [LITTLE, 0.4, 0.5, 1, 2, 32]
    plans = [plan(sound, "encoder", (), memory) for memory in budgets]
    assert all(a.steps < b.steps and not (a.streams or a.tile) for a, b in pairwise(plans))
    assert plans[-1].whole < 6 * plans[-2].whole, "activations that grow with the square are not counted"
    assert plan(streams, "encoder", (), 2).streams
    large = [plan(clip, "encoder", (240, 320), memory) for memory in budgets[2:]]
    assert large[0].tile and not large[-1].tile and large[0].tile[0] * large[0].tile[1] < 240 * 320
    with pytest.raises(UserError, match=r"--memory 0\.3: .*audio needs 0\.3\d GB; give that or more"):
        plan(sound, "encoder", (), 0.3)


def test_the_tiles_of_an_image_follow_from_the_memory(tmp_path):
    write_bundle(tmp_path / "photo", "photo")
    bundle, seen = varitok.load(tmp_path / "photo"), []
    bundle.memory = dict.fromkeys(("encoder", "decoder"), (0.0, 200.0, 0.0))
    size = 100, 300
    values = np.random.default_rng(0).uniform(-1, 1, (1, 3, *size)).astype(np.float32)
    whole, graph = bundle.encode(values), bundle.run_encoder
    bundle.run_encoder = lambda part: seen.append(part.shape[2:]) or graph(part)

    def coded(memory):
        seen.clear()
        found = encode_within(bundle, SignalFile(1, lambda count: iter([values])), memory)
        np.testing.assert_array_equal(found.codes, whole)
        (back,) = decode_within(bundle, whole, size, memory)
        np.testing.assert_allclose(back, bundle.decode(whole, size), rtol=0, atol=1e-6)
        assert found.size == size and all(max(shape) <= max(seen[0]) for shape in seen)
        return max(seen[0])

    sides = [coded(PROCESS + memory) for memory in (0.0025, 0.005, 1)]
    assert sides[0] < sides[1] < sides[2] == 300 and bundle.encode_values(values).any() and seen[-1] == size
    bundle.config["image_size"] = 64
    assert coded(1) == 300, "convolutions code as much at once as there is memory for"
    bundle.memory = dict.fromkeys(("encoder", "decoder"), (0.0, 200.0, 1e-3))
    assert coded(1) == 64 and coded(PROCESS + 0.0025) < 64, "what attends has tiles of the size of training"
    assert np.array_equal(bundle.encode_values(values), whole) and max(seen[-1]) <= 64
    with pytest.raises(UserError, match=r"--memory 0\.3: .*photo needs 0\.3\d GB; give that or more"):
        coded(0.3)


def test_a_quality_is_measured_in_parts(bundles, tmp_path):
    bundle = bundles["audio"]
    wave = np.repeat(np.random.default_rng(0).uniform(-0.9, 0.9, 300), HOP) * np.linspace(0, 1, 300 * HOP)
    soundfile.write(tmp_path / "a.wav", wave, RATE)
    for memory, share in ((2, 1.0), (LITTLE, 4e3)):
        bundle.memory = dict.fromkeys(("encoder", "decoder"), (0.0, share, 0.0))
        encode_file(
            bundle, tmp_path / "a.wav", tmp_path / f"{memory}.vtk", target=Target(quality=psnr(20)), memory=memory
        )
    assert (tmp_path / "2.vtk").read_bytes() == (tmp_path / f"{LITTLE}.vtk").read_bytes()
    other = psnr(20)._replace(name="mel", combine=None)
    with pytest.raises(UserError, match=r"mel needs the whole signal, which doesn't fit in 0\.352 GB"):
        encode_file(bundle, tmp_path / "a.wav", tmp_path / "a.vtk", target=Target(quality=other), memory=LITTLE)


@pytest.mark.parametrize("ends", [KeyboardInterrupt, UserError("no space")])
def test_what_is_interrupted_leaves_no_file(bundles, tmp_path, monkeypatch, ends):
    bundle, out = bundles["audio"], tmp_path / "out" / "a.wav"
    bundle.memory = {"encoder": (0.0, 1.0, 0.0), "decoder": (0.0, 4e3, 0.0)}
    soundfile.write(tmp_path / "a.wav", np.zeros(2000), RATE)
    encode_file(bundle, tmp_path / "a.wav", tmp_path / "a.vtk")
    written = []

    def run_decoder(codes):
        written.extend(out.parent.iterdir())
        if len(written) > 2:
            raise ends
        return type(bundle).run_decoder(bundle, codes)

    monkeypatch.setattr(bundle, "run_decoder", run_decoder)
    with pytest.raises((KeyboardInterrupt, UserError)):
        decode_file(bundle, tmp_path / "a.vtk", out, memory=LITTLE)
    assert {path.name for path in written} == {"a.wav.partial"} and not list(out.parent.iterdir())


@pytest.mark.slow
@READS_PEAKS
def test_a_long_sound_stays_within_the_memory(exported_sounds, tmp_path):
    folder, minutes = exported_sounds[1], 10
    assert measure_memory(varitok.load(folder)) == json.loads((folder / "export.json").read_text())["memory"]
    noise, peaks = np.random.default_rng(0).uniform(-0.5, 0.5, RATE), []
    soundfile.write(tmp_path / "a.flac", np.tile(noise, 60 * minutes), RATE)
    for words in (["encode", folder, tmp_path / "a.flac"], ["decode", folder, tmp_path / "a.vtk"]):
        peaks.append(peak_memory([*words, "--memory", "0.5"]))
    assert soundfile.info(tmp_path / "a.wav").frames == 60 * minutes * RATE
    assert max(peaks) < 0.5e9


# Networks whose tiles are as the whole in their middle: without norms, and with norms of each position.
FORM = {"width": 8, "base": 4, "dims": 2, "channels": 3}
KERNELS = dict.fromkeys(("kernel", "last_kernel", "residual_kernel"), 3)
STAGES = {"strides": [2, 2, 2], "multipliers": [1, 1, 1, 1], "depth": 1, "middle": 0, "units": "joint"}
CONVOLUTIONS = {
    "convolutions": (ConvEncoder, ConvDecoder, FORM | {"strides": [[8, 8]], "dilations": [1], **KERNELS}),
    "conv2d": (ResNetEncoder, ResNetDecoder, FORM | {"causal": False, "attention": False, **STAGES}),
}


@pytest.mark.slow
@READS_PEAKS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_large_photo_stays_within_a_gigabyte(once, tmp_path, name):
    encoder, decoder, form = CONVOLUTIONS[name]
    length = LengthPolicy(Full(), Truncate())
    codec = loud(Codec(encoder(**form), FiniteScalarQuantizer([8, 5, 5]), decoder(**form), length))
    folder, _ = once(name, codec, image_size=64, formats=["onnx"])
    with Image.open(EMBEDDED / "photos/0075.webp") as photo:
        photo.resize((3000, 2000), Image.Resampling.BICUBIC).save(tmp_path / "a.png")
    peaks = [
        peak_memory(["encode", folder, tmp_path / "a.png", "--memory", "1", "--coding", "packed"]),
        peak_memory(["decode", folder, tmp_path / "a.vtk", "--out", tmp_path / "back", "--memory", "1"]),
    ]
    assert max(peaks) < 1e9
    bundle, size = varitok.load(folder), (2000, 3000)
    tile = plan(bundle, "encoder", size, 1).tile
    assert tile and 64 < max(tile) < 2000, "convolutions aren't bound to the size of training, but to the memory"
    with Image.open(tmp_path / "a.png") as photo:
        whole = bundle.encode(photo)
    assert whole.shape == (1, 1, 250, 375) and len(np.unique(whole)) > 20
    # Tiles overlap by more than this codec's convolutions see, so that all codes are the whole's, and not the centers'
    # alone; but sums of another order may round to another level.
    tiled = container.read(tmp_path / "a.vtk").codes()
    assert (tiled == whole).mean() > 0.999
    with Image.open(tmp_path / "back/a.png") as back:
        off = np.abs(np.asarray(back) - bundle.pixels(bundle.decode(tiled, size))[0].astype(int))
    # Half of the first tile, as far as no other covers it: the last ones begin where they end with the image.
    tile = plan(bundle, "decoder", size, 1).tile
    rows, columns = (
        min(side // 2, most - side) if side < most else most for side, most in zip(tile, size, strict=True)
    )
    assert min(rows, columns) > 100 and off[:rows, :columns].max() <= 1, "a tile's center is not as the whole"
    assert (off <= 1).mean() > 0.9, "more than the borders, which are cross-faded, differs"
