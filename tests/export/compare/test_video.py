"""The classical codecs of clips: sizes and quality fall together, and frames come back in their places."""

import pytest
import torch

from varitok.codecs.metrics.image import psnr
from varitok.data.synthetic.video import Scenes
from varitok.export.compare.video import CODECS


@pytest.fixture(scope="module")
def clip():
    return Scenes(33, frames=5)[0, 1]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_frames_come_back_smaller_and_worse(clip, codec):
    sizes, values = [], []
    for quality in (codec.settings[0], codec.settings[-1]):
        coded = codec.encode(clip, quality, 8.0)
        back = codec.decode(coded, clip.shape[1:])
        assert back.shape == clip.shape and back.dtype == torch.uint8
        sizes.append(coded.payload)
        values.append(psnr(back.transpose(0, 1), clip.transpose(0, 1)).mean().item())
    assert sizes[1] < 0.5 * sizes[0] and values[1] < values[0] - 3
    assert values[0] > 26 and coded.payload == sum(map(len, coded.packets)) < coded.file


@pytest.mark.parametrize("frames", [1, 2])
def test_frames_of_any_size_come_back(clip, frames):
    for classic in CODECS:
        assert not classic.obstacle(0, 3)
        small = clip[:, :frames, :20, :15]
        for _ in range(20 if classic.name == "H.265" else 1):  # x265's times of two frames are what memory held
            coded = classic.code(small, classic.settings[-1])
        assert coded.back.shape == small.shape and 0 < coded.payload < coded.file, classic.name


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_neither_packets_nor_headers_describe_their_encoder(clip, codec):
    coded = codec.encode(clip, codec.settings[-1], 8.0)
    written = b"".join(coded.packets) + coded.head
    assert not any(name in written for name in (b"x264", b"x265", b"http", b"SVT", b"Lavc"))
    assert coded.file - coded.payload - len(coded.head) < 1100, "the rest is boxes of MP4"
