"""Files of clips: the frames displayed at each time, whatever the file; broken files are reported."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from varitok.data.decoding import video as video_files
from varitok.data.decoding.errors import BadSample
from varitok.data.decoding.video import VideoFile, frames_in

from ..clips import frames, numbers, write, write_sound
from ..media import write_matrix


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("clips")


@pytest.fixture(scope="module")
def clip(folder):
    return write(folder / "a.mp4", frames(), options={"g": "7", "bf": "2"})


KINDS = {
    "mp4": ("libx264", "yuv444p"),
    "mkv": ("libx265", "yuv444p"),  # with B-frames, as is usual
    "webm": ("libvpx-vp9", "yuv444p"),
    "avi": ("mpeg4", "yuv420p"),
    "gif": ("gif", "rgb8"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_container_gives_its_frames(folder, kind):
    codec, pixels = KINDS[kind]
    path = write(folder / f"kind.{kind}", frames(12), codec=codec, pixels=pixels)
    with VideoFile(path) as video:
        whole = video.read()
        assert video.length == 12 and (video.height, video.width) == (48, 64)
        assert video.frame_rate == pytest.approx(10, rel=0.02)
        tolerance = 2 if kind == "gif" else 0  # of eight bits in all
        found = np.array(numbers(whole))
        assert (np.abs(found - np.arange(12)) <= tolerance).all()
        assert np.array_equal(video.read(5, 3), whole[5:8])
    assert whole[0, :, :24, 0].mean() == pytest.approx(200, abs=15)


@settings(max_examples=25)
@given(start=st.integers(0, 19), count=st.integers(0, 25))
def test_a_stretch_is_that_of_the_whole(clip, start, count):
    with VideoFile(clip) as video:
        assert numbers(video.read(start, count)) == list(range(20))[start : start + count]


@pytest.mark.parametrize(("rate", "wanted"), [(5, range(0, 20, 2)), (20, [i // 2 for i in range(40)]), (10, range(20))])
def test_another_rate_shows_what_is_shown_then(clip, rate, wanted):
    with VideoFile(clip, rate) as video:
        assert video.length == len(wanted)
        found = numbers(video.read())
        assert all(abs(a - b) <= (rate == 20) for a, b in zip(found, wanted, strict=True))
        assert numbers(video.read(4, 3)) == found[4:7]


def test_a_variable_rate_is_understood(folder):
    times = [0, 1, 2, 10, 11, 19]
    path = write(folder / "vfr.mkv", frames(6), times=times)
    with VideoFile(path, 10.0) as video:
        found = numbers(video.read(0, 19))
    assert found == [0, 1, *[2] * 8, 3, *[4] * 8]


def test_frames_are_resized_as_they_are_decoded(clip):
    with VideoFile(clip) as video:
        small = video.read(2, 4, (12, 20))
        assert small.shape == (4, 12, 20, 3) and numbers(small) == [2, 3, 4, 5]
        assert small[:, :, :8, 0].mean() == pytest.approx(200, abs=5)


MATRICES = {  # (a, b, c, d) of the display matrix, and how a displayed frame becomes the stored one
    "none": ((1, 0, 0, 1), lambda pixels: pixels),
    "clockwise": ((0, 1, -1, 0), np.rot90),
    "half": ((-1, 0, 0, -1), lambda pixels: pixels[::-1, ::-1]),
    "counterclockwise": ((0, -1, 1, 0), lambda pixels: np.rot90(pixels, -1)),
    "mirrored": ((-1, 0, 0, 1), lambda pixels: pixels[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda pixels: pixels[::-1]),
    "transposed": ((0, 1, 1, 0), lambda pixels: pixels.swapaxes(0, 1)),
    "transposed on the other diagonal": ((0, -1, -1, 0), lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1)),
}


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.integers(1, 6), min_size=2, max_size=12),
    rate=st.sampled_from([None, 4.0, 10.0, 12.5]),
    name=st.sampled_from(list(MATRICES)),
)
def test_frames_are_shown_at_their_times_and_upright(folder, steps, rate, name):
    """Times may vary; an output frame is the one displayed at its time, within half a frame."""
    matrix, undo = MATRICES[name]
    times = [0, *np.cumsum(steps[:-1]).tolist()]
    pictures = frames(len(times))
    pictures[:, :10, :32, 1] = 250  # a corner is green, so no two orientations look alike
    plain = write(folder / "plain.mp4", pictures, times=times)
    write_matrix(plain, folder / "turned.mp4", matrix)
    with VideoFile(folder / "turned.mp4", rate) as video:
        whole = video.read()
        assert whole.shape == (frames_in(video.seconds, video.frame_rate), video.height, video.width, 3)
    with VideoFile(plain) as video:
        native = video.frame_rate
    back = np.stack([undo(displayed) for displayed in whole])
    assert np.abs(back[0].astype(int) - pictures[numbers(back)[0]]).mean() < 4
    for number, index in enumerate(numbers(back)):
        moment = number / (rate or native)
        assert times[index] / 10 <= moment + 0.5 / native + 1e-6
        assert index == len(times) - 1 or times[index + 1] / 10 >= moment + 0.5 / native - 1e-6


@settings(max_examples=25, deadline=None)
@given(counts=st.lists(st.integers(1, 7), min_size=1, max_size=8), rate=st.sampled_from([5.0, 10.0, 23.0]))
def test_segments_read_one_after_the_other_are_the_whole(clip, counts, rate):
    with VideoFile(clip, rate) as video:
        whole = video.read()
        start = 0
        for count in counts:
            part = video.read(start, count)
            np.testing.assert_array_equal(part, whole[start : start + count])
            start += count


def test_an_image_is_a_clip_of_one_frame(folder):
    Image.fromarray(frames(1)[0]).save(folder / "one.png")
    with VideoFile(folder / "one.png", 8.0) as video:
        assert video.length == 1 and video.read().shape == (1, 48, 64, 3)
        assert video.read(0, 5, (24, 32)).shape == (1, 24, 32, 3)
    with VideoFile(write(folder / "one.mp4", frames(1)), 8.0) as video:
        assert video.length == 1 and video.read().shape == (1, 48, 64, 3)


@pytest.mark.parametrize("size", [(33, 51), (2, 2), (17, 64)])
def test_odd_sizes_are_read(folder, size):
    path = write(folder / f"odd{size[0]}.mkv", frames(3, *size), codec="ffv1", pixels="bgr0")
    with VideoFile(path) as video:
        assert video.read().shape == (3, *size, 3)


def _zeros(path):
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 5] = bytes(len(data) // 5)
    return bytes(data)


BROKEN = {
    "empty.mp4": lambda path: b"",
    "text.mp4": lambda path: b"not a clip at all" * 50,
    "cut.mp4": lambda path: path.read_bytes()[: path.stat().st_size // 2],
    "list.mp4": lambda path: b"#EXTM3U\n#EXTINF:1,\na.mp4\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_told_by_its_name(folder, clip, name):
    path = folder / name
    path.write_bytes(BROKEN[name](clip))
    with pytest.raises(BadSample, match=name), VideoFile(path) as video:
        video.read()


def test_a_damaged_middle_is_never_black_frames(folder):
    noise = np.random.default_rng(0).integers(0, 256, (30, 48, 64, 3), np.uint8)
    clip = write(folder / "whole.mkv", noise, options={"g": "30", "crf": "20"})
    path = folder / "damaged.mkv"
    path.write_bytes(_zeros(clip))
    with pytest.raises(BadSample, match="damaged"), VideoFile(path) as video:
        video.read()


def test_a_file_that_ends_early_is_told(folder):
    clip = write(folder / "long.avi", frames(40), codec="mpeg4", pixels="yuv420p")
    path = folder / "early.avi"
    path.write_bytes(clip.read_bytes()[: clip.stat().st_size * 6 // 10])
    with pytest.raises(BadSample, match="early"), VideoFile(path) as video:
        video.read()


def test_what_holds_no_frames_is_told(folder, tmp_path):
    with pytest.raises(BadSample, match="has no video frames"):
        VideoFile(write_sound(folder / "sound.mp4"))
    with pytest.raises(BadSample, match=r"gone\.mp4: No such file"):
        VideoFile(tmp_path / "gone.mp4")
    with pytest.raises(BadSample, match="not a regular file"):
        VideoFile(tmp_path)


def test_a_pipe_that_never_delivers_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadSample, match="not a regular file"):
        VideoFile(tmp_path / "pipe.mp4")


def test_a_decoder_that_does_not_end_is_stopped(clip, monkeypatch):
    monkeypatch.setattr(video_files, "PATIENCE", -1.0)
    with pytest.raises(BadSample, match="took longer than"), VideoFile(clip) as video:
        video.read()


def test_what_would_fill_the_memory_is_refused(clip, monkeypatch):
    with VideoFile(clip) as video:
        with pytest.raises(BadSample, match="are too many for one read"):
            video.read(0, 20, (40_000, 40_000))
        with pytest.raises(ValueError, match="negative"):
            video.read(-1)
    monkeypatch.setattr(video_files, "MOST_PIXELS", 1000)
    with pytest.raises(BadSample, match="64 x 48 pixels are too many"):
        VideoFile(clip)
