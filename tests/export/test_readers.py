"""One file, one signal: training, the runtime and `encode | decode` read the same pixels, samples and frame times.

The live page reads the same files in `report/live/test_live.py`.
"""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from varitok.data.batch import normalize
from varitok.data.datasets.audio import AudioDataset
from varitok.data.datasets.images import ImageDataset, ImageFiles
from varitok.data.datasets.video import VideoDataset
from varitok.data.decoding.audio import decode_audio
from varitok.data.decoding.images import decode_image
from varitok.data.decoding.video import VideoFile
from varitok.export.bitstream import container
from varitok.export.bitstream.media_files import decode_file, encode_file
from varitok.export.runtime.audio import AudioBundle
from varitok.export.runtime.images import ImageBundle
from varitok.export.runtime.video import VideoBundle

from ..data.media import RATE, write_clips, write_images, write_sounds

SIDE = 24
PIXELS = {"channels": 3, "codebook_sizes": [256] * 3, "quantizer": "none"}


class LosslessImages(ImageBundle):
    """Each pixel is a token, each channel a codebook; the decoder returns the encoder's input."""

    def run_encoder(self, signal):
        return np.rint((signal + 1) * 127.5).astype(np.int64).reshape(len(signal), 3, -1)

    def run_decoder(self, codes):
        return codes.reshape(len(codes), 3, SIDE, SIDE).astype(np.float32) / np.float32(127.5) - 1


class LosslessClips(VideoBundle):
    def run_encoder(self, signal):
        return np.rint((signal + 1) * 127.5).astype(np.int64)

    def run_decoder(self, codes):
        return codes.astype(np.float32) / np.float32(127.5) - 1


class LosslessSounds(AudioBundle):
    def run_encoder(self, signal):
        return np.clip(np.rint(signal * 32768), -32768, 32767).astype(np.int64) + 32768

    def run_decoder(self, codes):
        return (codes - 32768).astype(np.float32) / 32768


def _bundle(kind, folder, **config):
    folder.mkdir()
    config["modality"] = kind.modality
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "export.json").write_text(json.dumps({"files": {"config.json": {"sha256": "0" * 64}}}))
    return kind(folder, config, ["CPUExecutionProvider"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("readers")


def _read(bundle, path):
    with bundle.open_file(path) as file:
        return file.read(), file


def test_images(folder):
    (folder / "images").mkdir()
    bundle = _bundle(LosslessImages, folder / "pixels", image_size=SIDE, tokens=SIDE**2, **PIXELS)
    files = write_images(folder / "images")
    dataset = ImageFiles(list(files.values()), image_size=SIDE, train=False)
    for index, (name, path) in enumerate(files.items()):
        trained = dataset[0, index]
        values, _ = _read(bundle, path)
        np.testing.assert_array_equal(values[0], normalize(trained).numpy(), err_msg=name)
        np.testing.assert_array_equal(bundle.values(Image.open(path)), values, err_msg=name)
        coded, back = folder / f"{name}.vtk", folder / f"{name}.back.png"
        encode_file(bundle, path, coded, coding="packed")
        decode_file(bundle, coded, back)
        np.testing.assert_array_equal(decode_image(back), trained.permute(1, 2, 0).numpy(), err_msg=name)
    assert len(files) == 24


@pytest.mark.parametrize("channels", [1, 2])
def test_sounds(folder, channels):
    (folder / f"sounds{channels}").mkdir()
    config = {"channels": channels, "tokens": 0, "codebook_sizes": [65536] * channels, "quantizer": "none"}
    bundle = _bundle(LosslessSounds, folder / f"samples{channels}", sampling_rate=RATE, hop_length=1, **config)
    files = write_sounds(folder / f"sounds{channels}")
    dataset = AudioDataset(list(files.values()), None, RATE, channels=channels, train=False)
    for index, (name, path) in enumerate(files.items()):
        trained = dataset[0, index].numpy()
        values, file = _read(bundle, path)
        np.testing.assert_array_equal(values[0], trained, err_msg=name)
        assert file.length == trained.shape[1]
        coded, back = folder / f"{name}{channels}.vtk", folder / f"{name}{channels}.back.wav"
        encode_file(bundle, path, coded, coding="packed")
        decode_file(bundle, coded, back)
        np.testing.assert_allclose(decode_audio(back), trained, rtol=0, atol=1 / 32768, err_msg=name)
    assert len(files) == 16


def test_clips(folder):
    (folder / "clips").mkdir()
    files = write_clips(folder / "clips")
    bundle = _bundle(LosslessClips, folder / "frames", hop=[1, 1, 1], lead=0, tokens=0, **PIXELS)
    for name, path in files.items():
        with VideoFile(path) as clip:
            height, width, rate = clip.height, clip.width, clip.frame_rate
        trained = VideoDataset([path], None, height, width, train=False)[0, 0]
        values, file = _read(bundle, path)
        np.testing.assert_array_equal(values[0], normalize(trained).numpy(), err_msg=name)
        assert (file.length, file.frame_rate) == (trained.shape[1], rate), name
        coded, back = folder / f"{name}.vtk", folder / f"{name}.back.mp4"
        encode_file(bundle, path, coded, coding="packed")
        assert container.read(coded).header.signal == (height, width, round(1000 * rate))
        decode_file(bundle, coded, back)
        with VideoFile(back) as clip:  # H.264 is lossy: brightness numbers the frames
            assert clip.length == file.length and clip.frame_rate == pytest.approx(rate, abs=0.01), name
            blue = clip.read()[:, -8:, -8:, 2].mean((1, 2))
        assert np.abs(blue - trained[2, :, -8:, -8:].float().mean((1, 2)).numpy()).max() < 7, name
    assert len(files) == 11


def test_an_error_of_the_caller_is_not_the_files(tmp_path):
    """It keeps its traceback: it would be our bug, not a file that can't be read."""
    pixels = _bundle(LosslessImages, tmp_path / "pixels", image_size=SIDE, tokens=SIDE**2, **PIXELS)
    frames = _bundle(LosslessClips, tmp_path / "frames", hop=[1, 1, 1], lead=0, tokens=0, **PIXELS)
    config = {"channels": 1, "tokens": 0, "codebook_sizes": [65536], "quantizer": "none"}
    samples = _bundle(LosslessSounds, tmp_path / "samples", sampling_rate=RATE, hop_length=1, **config)
    image, clip, sound = (write(tmp_path) for write in (write_images, write_clips, write_sounds))
    for bundle, path in (
        (pixels, image["rgb.png"]), (frames, clip["plain.mkv"]), (samples, sound["16_bits.wav"])
    ):  # fmt: skip
        with pytest.raises(ZeroDivisionError), bundle.open_file(path):
            1 / 0  # noqa: B018


def test_a_crop_of_training_is_that_of_evaluation_but_for_rounding():
    """torchvision resizes a training crop; Pillow resizes for evaluation and the runtime."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        side = int(rng.integers(SIDE, 200))
        pixels = torch.from_numpy(rng.integers(0, 256, (3, side, side), dtype=np.uint8))
        crops = [
            ImageDataset(lambda *_, p=pixels: p, 1, image_size=SIDE, least_scale=1.0, flip=False, train=train)[0, 0]
            for train in (True, False)
        ]
        assert (crops[0].int() - crops[1].int()).abs().max() <= 1
