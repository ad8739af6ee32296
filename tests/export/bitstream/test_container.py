"""Containers: round trips; a cut one decodes to its beginning; a damaged one is reported in one line."""

import io
import random
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from varitok import UserError
from varitok.export.bitstream import container
from varitok.export.bitstream.container import Header, Writer, read, read_all, write
from varitok.export.bitstream.entropy_coding import Packed, coding_of
from varitok.export.bitstream.packing import Codebook, Packing

BUNDLE = bytes(range(8))
SHAPES = {
    "image": ("image", (Codebook(4096), Codebook(7)), (), ()),
    "sound": ("audio", (Codebook(1024),) * 8, (), (24000,)),
    "rates": ("audio", (Codebook(21, 4), Codebook(300, 2), Codebook(2, 1)), (), (24000,)),
    "grid": ("video", (Codebook(64000),), (3, 4), (24, 32, 8000)),
    "blocks": ("video", (Codebook(512), Codebook(512)), (16,), (64, 64, 0)),
}
LAYOUTS = {
    f"{name}-{coding}": Header(modality, BUNDLE, coding, b"", *rest)
    for name, (modality, *rest) in SHAPES.items()
    for coding in ("packed", "adaptive")
}
# The adaptive coding takes its time.
BROKEN = [
    pytest.param(name, marks=[pytest.mark.slow] * (name.endswith("adaptive") and name != "rates-adaptive"))
    for name in LAYOUTS
]
layouts = st.sampled_from(sorted(LAYOUTS))


def codes_of(header, steps, seed=0):
    chance = np.random.default_rng(seed)
    made = [chance.integers(0, codebook.size, (steps, *header.inner)) for codebook in header.codebooks]
    repeated = [
        np.repeat(one[:: codebook.stride], codebook.stride, axis=0)[:steps]
        for one, codebook in zip(made, header.codebooks, strict=True)
    ]
    return np.stack(repeated)[None]


def reached(steps, downsample=320):
    return (np.arange(steps) + 1) * downsample


def written(header, codes, units=None):
    file = io.BytesIO()
    coding = coding_of(header.coding, header.codebooks)
    payload = write(file, header, codes, reached(codes.shape[2]) if units is None else units, coding)
    assert payload < file.tell()
    return file.getvalue()


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(container, "CHUNK", 16)


@given(st.sampled_from(sorted(SHAPES)), st.integers(1, 40), st.integers(0, 9))
def test_bits_come_back_and_are_as_few_as_are_counted(name, steps, seed):
    header = LAYOUTS[f"{name}-packed"]
    packing, codes = Packing(header.codebooks, header.inner), codes_of(header, steps, seed)[0]
    data = packing.pack(codes)
    places = int(np.prod(header.inner))
    bits = places * sum(
        -(-steps // codebook.stride) * (codebook.size - 1).bit_length() for codebook in header.codebooks
    )
    assert packing.bits(steps) == bits and len(data) == packing.size(steps) == -(-bits // 8)
    assert np.array_equal(packing.unpack(data, steps), codes)
    for kept in range(1, steps + 1):  # a prefix of the bits is a shorter code
        part = data[: packing.size(kept)]
        assert np.array_equal(packing.unpack(part, kept), codes[:, :kept])
        assert kept <= packing.steps(len(part), steps) and packing.bits(packing.steps(len(part), steps)) <= 8 * len(
            part
        )


@given(layouts, st.integers(1, 40), st.integers(1, 64))
def test_what_is_written_is_read(tmp_path_factory, name, steps, chunk):
    header, path = LAYOUTS[name], tmp_path_factory.mktemp("a") / "a.vtk"
    codes = codes_of(header, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(container, "CHUNK", chunk)
        data = written(header, codes)
    path.write_bytes(data)
    found = read(path)
    assert found.header == header and np.array_equal(found.codes(), codes)
    assert found.complete and found.units == 320 * steps and sum(found.sizes.values()) == len(data)


@pytest.mark.parametrize("name", BROKEN)
def test_a_cut_file_gives_what_arrived(name, tmp_path, small_chunks):
    header, path, codes = LAYOUTS[name], tmp_path / "a.vtk", codes_of(LAYOUTS[name], 8)
    data, before = written(header, codes), 0
    for cut in range(len(data)):
        path.write_bytes(data[:cut])
        try:
            found = read(path)
            arrived = found.codes()
        except UserError as error:
            assert before == 0 and re.search("cut before the first code|not a container", str(error))
            continue
        steps = arrived.shape[2]
        assert steps >= before > 0 or not before
        assert not found.complete and np.array_equal(arrived, codes[:, :, :steps])
        before = steps
    assert before == 8


@pytest.mark.parametrize("every", [pytest.param(1, marks=pytest.mark.slow), 9])  # 9: a bit of nearly each byte
@pytest.mark.parametrize("name", BROKEN)
def test_a_flipped_bit_is_noticed(name, every, tmp_path, small_chunks):
    header, path, codes = LAYOUTS[name], tmp_path / "a.vtk", codes_of(LAYOUTS[name], 6)
    data = written(header, codes)
    for place in range(0, 8 * len(data), every):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = read(path)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
        else:  # without its end, or with a payload longer than the file, it is a cut one; complete chunks are right
            assert not found.complete
            assert found.steps == 0 or np.array_equal(found.codes(end=found.steps), codes[:, :, : found.steps])


def test_files_one_behind_the_other_are_one_file_of_several(tmp_path):
    path = tmp_path / "a.vtk"
    parts = [
        (LAYOUTS[name], codes_of(LAYOUTS[name], steps))
        for name, steps in (("sound-packed", 5), ("sound-adaptive", 9), ("grid-packed", 2))
    ]
    path.write_bytes(b"".join(written(*part) for part in parts))
    for found, (header, codes) in zip(read_all(path), parts, strict=True):
        assert found.header == header and np.array_equal(found.codes(), codes)
    with pytest.raises(UserError, match="holds 3 signals"):
        read(path)
    path.write_bytes(path.read_bytes() + b"and more")
    with pytest.raises(UserError, match="not a container"):
        list(read_all(path))


def test_a_stream_is_written_as_it_comes(tmp_path):
    header, codes = LAYOUTS["rates-packed"], codes_of(LAYOUTS["rates-packed"], 11)
    with (tmp_path / "a.vtk").open("wb") as file:
        writer = Writer(file, header, Packed(header.codebooks))
        for begin, end in ((0, 4), (4, 8), (8, 11)):
            writer.write(codes[0, :, begin:end], 320 * (end - begin))
        with pytest.raises(ValueError, match="don't follow"):
            writer.write(codes[0, :, :4], 1)  # the last chunk ended within a codebook's stride
        writer.close()
    found = read(tmp_path / "a.vtk")
    assert np.array_equal(found.codes(), codes) and found.units == 11 * 320
    with pytest.raises(ValueError, match="no entry"):
        Writer(io.BytesIO(), header, Packed(header.codebooks)).write(np.full((3, 4), 21), 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_some_steps_are_read_without_the_others(name, tmp_path, small_chunks):
    header, path, codes = LAYOUTS[name], tmp_path / "a.vtk", codes_of(LAYOUTS[name], 24)
    path.write_bytes(written(header, codes))
    found = read(path)
    assert len(found.chunks) > 2 and found.steps == 24
    for begin in range(24):
        for end in {begin + 1, (begin + 25) // 2, 24}:
            assert np.array_equal(found.codes(begin=begin, end=end), codes[:, :, begin:end])
    damaged = found.chunks[0]._replace(payload=bytes(len(found.chunks[0].payload)))
    later = found._replace(chunks=(damaged, *found.chunks[1:]))
    assert np.array_equal(later.codes(begin=damaged.steps), codes[:, :, damaged.steps :])
    with pytest.raises(UserError, match="it has 24 steps, not 20 to 25"):
        found.codes(begin=20, end=25)


def test_sizes_beyond_all_bounds_are_refused_before_memory_is_taken(tmp_path):
    varint, checksum = container._varint, container._checksum
    path = tmp_path / "a.vtk"

    def head(*numbers):
        body = container.MAGIC + bytes([1, 1]) + BUNDLE + b"\0" + b"".join(map(varint, numbers))
        return body + checksum(body)

    absurd = {
        "codebooks": head(1, 4097, 64, 1, 0, 0),
        "entries": head(1, 1, 1 << 63, 1, 0, 0),
        "stride": head(1, 1, 64, 65, 0, 0),
        "one entry": head(1, 1, 1, 1, 0, 0),
        "no codebooks": head(0, 0, 0),
        "axes": head(1, 1, 64, 1, 5, 1, 1, 1, 1, 1, 0),
        "places": head(1, 1, 64, 1, 2, 1 << 24, 1 << 24, 0),
        "steps": head(1, 1, 64, 1, 0, 0) + varint(1 << 40) + varint(1) + varint(1),
        "payload": head(1, 1, 64, 1, 0, 0) + varint(1 << 20) + varint(1) + varint(1 << 30),
        "endless number": head(1, 1, 64, 1, 0, 0) + b"\xff" * 100,
        "coding": container.MAGIC + bytes([1, 1]) + BUNDLE + b"\4",
        "version": container.MAGIC + bytes([2, 1]) + BUNDLE,
        "nothing": b"",
    }
    for what, data in absurd.items():
        path.write_bytes(data)
        with pytest.raises(UserError) as told:
            read(path)
        assert str(told.value).startswith(f"{path}: ") and "\n" not in str(told.value), what
    with pytest.raises(UserError, match="can't be read"):
        read(tmp_path / "b.vtk")


def test_the_specifications_example_is_what_is_written():
    text = (Path(container.__file__).parent / "CONTAINER.md").read_text()
    (example,) = re.findall(r"```\n((?:[0-9a-f]{2}[^\n]*\n)+)```", text)
    data = bytes.fromhex("".join(line.partition("  ")[0] for line in example.splitlines()))
    header = Header("audio", BUNDLE, "packed", b"", (Codebook(1024), Codebook(1024)), (), (16000,))
    codes, units = np.array([[[1, 2, 3], [1023, 0, 512]]]), np.array([320, 640, 800])
    assert data == written(header, codes, units)
    (adaptive,) = re.findall(r"bytes:\n`([0-9a-f ]{23})`", text)
    assert bytes.fromhex(adaptive) in written(header._replace(coding="adaptive"), codes, units)


@pytest.mark.slow
def test_ten_thousand_damaged_files_are_refused_or_right(tmp_path):
    chance, path = random.Random(0), tmp_path / "a.vtk"
    good = []
    for header in LAYOUTS.values():
        codes = codes_of(header, 9)
        good.append((written(header, codes), codes))
    refused = 0
    for _ in range(10_000):
        data, codes = chance.choice(good)
        damaged = bytearray(data)
        way = chance.randrange(4)
        for _ in range(chance.randint(1, 4)):
            place = chance.randrange(len(damaged))
            if way == 0:
                damaged[place] = chance.randrange(256)
            elif way == 1:
                del damaged[place : place + chance.randint(1, 8)]
            elif way == 2:
                damaged[place:place] = chance.randbytes(chance.randint(1, 8))
            else:
                damaged = damaged[: max(1, place)]
            if not damaged:
                break
        path.write_bytes(damaged)
        try:
            found = [(one.steps, one.codes()) for one in read_all(path)]
        except UserError:
            refused += 1
            continue
        assert way == 3 or len(found) == 1
        assert all(np.array_equal(read[:, :, :steps], codes[:, :, :steps]) for steps, read in found)
    assert refused > 5_000


def test_a_payload_that_no_encoder_writes_is_reported_with_its_chunk(tmp_path, monkeypatch):
    header, path = Header("audio", BUNDLE, "adaptive", b"", (Codebook(1000),), (), (24000,)), tmp_path / "a.vtk"
    coding = coding_of("adaptive", header.codebooks)
    monkeypatch.setattr(coding, "encode", lambda codes: b"\xff" * 8)
    with path.open("wb") as file:
        write(file, header, np.zeros((1, 1, 3), np.int64), reached(3), coding)
    with pytest.raises(UserError, match="damaged: no encoder writes the payload of chunk 0"):
        read(path).codes()
