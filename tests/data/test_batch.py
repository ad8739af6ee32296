"""Batches: their contents, and the way from bytes to floats and back."""

import pickle

import torch

from varitok.data.batch import Sample, collate, normalize, sample_generator, to_uint8
from varitok.data.decoding.errors import BadSample


def test_bytes_survive_the_way_to_floats_and_back() -> None:
    levels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    signal = normalize(levels)
    assert signal.dtype == torch.float32
    assert (signal.min(), signal.max()) == (-1, 1)
    assert torch.equal(to_uint8(signal), levels)
    assert torch.equal(normalize(signal), signal)


def test_floats_are_rounded_to_the_nearest_byte_and_clamped() -> None:
    signal = torch.tensor([-3.0, -1.0, 0.6 / 127.5 - 1, 1.4 / 127.5 - 1, 1.0, 2.0])
    assert to_uint8(signal).tolist() == [0, 0, 1, 1, 255, 255]


def test_a_batch_holds_what_could_be_read_and_names_the_rest() -> None:
    signal = torch.zeros(3, 5, 4, dtype=torch.uint8)
    batch = collate([Sample(signal), Sample(None, ("a: broken",)), Sample(signal, ("b: broken", "c: broken"))])
    assert batch.signal.shape == (2, 3, 5, 4)
    assert batch.lengths.tolist() == [5, 5]
    assert batch.bad == ("a: broken", "b: broken", "c: broken")


def test_a_batch_of_nothing_is_empty() -> None:
    batch = collate([Sample(None, ("a: broken",))])
    assert len(batch.signal) == len(batch.lengths) == 0
    assert batch.bad == ("a: broken",)


def test_chance_depends_on_seed_epoch_and_index() -> None:
    keys = [(seed, (epoch, index)) for seed in range(3) for epoch in range(3) for index in range(3)]
    draws = [int(torch.randint(2**62, (), generator=sample_generator(*key))) for key in keys]
    assert len(set(draws)) == len(keys)
    assert draws == [int(torch.randint(2**62, (), generator=sample_generator(*key))) for key in keys]


def test_a_bad_sample_crosses_from_a_worker():
    error = pickle.loads(pickle.dumps(BadSample("a.png", "torn")))
    assert str(error) == "a.png: torn"


def test_a_shorter_clip_stays_as_its_last_frame_and_a_sound_ends_in_silence() -> None:
    clip, sound = torch.arange(24, dtype=torch.uint8).view(1, 3, 2, 4), torch.ones(1, 3)
    clips = collate([Sample(clip), Sample(clip[:, :2])])
    assert clips.lengths.tolist() == [3, 2] and not clips.whole
    assert torch.equal(clips.signal[1], torch.cat([clip[:, :2], clip[:, 1:2]], dim=1))
    sounds = collate([Sample(sound), Sample(sound[:, :1])])
    assert sounds.signal.tolist() == [[[1, 1, 1]], [[1, 0, 0]]]
