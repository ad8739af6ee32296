"""Entropy coding: as few bits as chances allow, the same on both sides, and of a cut file all that is certain."""

import json
import math
import shutil
from bisect import bisect_right

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import varitok
from varitok import UserError
from varitok.codecs.networks.code_prior import Prior
from varitok.export.bitstream import container
from varitok.export.bitstream import entropy_coding as entropy
from varitok.export.bitstream.entropy_coding import Adaptive, Static, codebooks_of, coding_of, frequencies
from varitok.export.bitstream.packing import Codebook
from varitok.export.bitstream.range_coder import Cut, Damage, RangeDecoder, RangeEncoder
from varitok.export.bitstream.symbols import Symbols
from varitok.export.cli.main import main
from varitok.export.exporters.prior import Tokenizer, export_prior
from varitok.export.runtime.load import load

BOOKS = {
    "one": ((Codebook(4096),), ()),
    "several": ((Codebook(256),) * 3, ()),
    "rates": ((Codebook(21, 4), Codebook(3000, 2), Codebook(2, 1)), ()),
    "grid": ((Codebook(64000),), (3, 2)),
    "large": ((Codebook(1 << 36),), (2,)),
}


def codes_of(codebooks, inner, steps, seed=0):
    chance = np.random.default_rng(seed)
    made = [chance.integers(0, codebook.size, (steps, *inner)) for codebook in codebooks]
    return np.stack(
        [np.repeat(one[:: b.stride], b.stride, axis=0)[:steps] for one, b in zip(made, codebooks, strict=True)]
    )


@given(st.lists(st.integers(1, 1 << 20), min_size=2, max_size=9), st.data())
def test_a_range_coder_needs_the_bits_that_chances_say(chances, data):
    ends, total = np.cumsum(chances).tolist(), sum(chances)
    symbols = data.draw(st.lists(st.integers(0, len(chances) - 1), min_size=1, max_size=40))
    encoder, bits = RangeEncoder(), 0.0
    for symbol in symbols:
        encoder.encode(ends[symbol] - chances[symbol], chances[symbol], total)
        bits -= math.log2(chances[symbol] / total)
    written = encoder.finish()
    assert 8 * len(written) <= bits + 8 + 1e-4 * len(symbols)

    def find(slot):
        symbol = bisect_right(ends, slot)
        return symbol, ends[symbol] - chances[symbol], chances[symbol]

    decoder = RangeDecoder(written)
    assert [decoder.decode(total, find) for _ in symbols] == symbols
    for cut in range(len(written) + 1):
        decoder, arrived = RangeDecoder(written[:cut], whole=False), []
        with pytest.raises(Cut):
            while True:
                arrived.append(decoder.decode(total, find))
        # What is certain is right, and behind the last byte anything may follow.
        assert arrived[: len(symbols)] == symbols[: len(arrived)]


def test_what_no_encoder_writes_is_damage():
    with pytest.raises(Damage):
        RangeDecoder(b"\xff" * 9).decode((1 << 24) - 1, lambda slot: (slot, slot, 1))


@pytest.mark.parametrize("name", BOOKS)
@pytest.mark.parametrize("limit", [16, 512, 1 << 16])
def test_symbols_are_the_codes_and_see_only_what_is_before(name, limit):
    codebooks, inner = BOOKS[name]
    symbols, codes = Symbols(codebooks, None, limit), codes_of(codebooks, inner, 8)
    assert symbols.sizes.max() <= limit and symbols.vocabulary == symbols.sizes.sum()
    for kept in range(1, len(codebooks) + 1):
        row, structure = symbols.row(codes[:kept]), symbols.structure(kept, 8, inner)
        assert np.array_equal(symbols.codes(row, kept, 8, inner), codes[:kept])
        local = row - symbols.offsets[structure.kinds]
        assert (local >= 0).all() and (local < symbols.sizes[structure.kinds]).all()
        assert (structure.sources < np.arange(len(row))[:, None]).all()
        named = structure.sources[:, 1:]
        assert (structure.kinds[named] == structure.kinds[:, None])[named >= 0].all(), "neighbors are of its own kind"
        contexts = symbols.contexts(structure, row)
        for count in (0, 1, len(row) // 2):  # a symbol's context doesn't depend on later ones
            assert np.array_equal(symbols.contexts(structure, row[:count])[: count + 1], contexts[: count + 1])


@pytest.mark.parametrize("name", BOOKS)
def test_adaptive_codes_come_back_and_are_fewer_where_they_repeat(name):
    codebooks, inner = BOOKS[name]
    coding = Adaptive(codebooks, Symbols(codebooks, None, entropy.COUNTED))
    codes = codes_of(codebooks, inner, 40)
    assert np.array_equal(coding.decode(coding.encode(codes), 40, inner, True), codes)
    alike = np.repeat(codes[:, :4], 10, axis=1)
    assert len(coding.encode(alike)) < 0.7 * len(coding.encode(codes))


def test_frequencies_are_shared_out_to_the_last():
    assert frequencies(np.array([0, 0, 3])).tolist() == [1, 1, entropy.TOTAL - 2]
    assert frequencies(np.array([5, 5])).sum() == entropy.TOTAL
    found = [entropy.WEIGHTS[i] / (1 << 32) for i in (0, 64, 640)]
    assert found == pytest.approx([1, math.exp(-1), math.exp(-10)], rel=1e-3)


@pytest.mark.parametrize("name", ["rates", "grid"])
def test_codes_are_drawn_as_often_as_the_model_says(name):
    codebooks, inner = BOOKS[name]
    symbols = Symbols(codebooks, None, entropy.COUNTED)
    weights = [np.where(np.arange(size) == 1, 9 * size, 1) for size in symbols.sizes]
    coding = Static(codebooks, symbols, np.concatenate([frequencies(each) for each in weights]), b"")
    codes, again = (coding.draw(120, inner, np.random.default_rng(0)) for _ in range(2))
    assert codes.shape == (len(codebooks), 120, *inner) and np.array_equal(codes, again)
    assert (codes == 1).mean() == pytest.approx(0.9, abs=0.06)
    assert np.array_equal(coding.decode(coding.encode(codes), 120, inner, True), codes)


@pytest.mark.parametrize("name", BOOKS)
def test_delayed_groups_hold_nothing_that_depends_on_each_other(name):
    codebooks, inner = BOOKS[name]
    symbols, codes = Symbols(codebooks, None, 64, "delayed"), codes_of(codebooks, inner, 8)
    structure, row = symbols.structure(len(codebooks), 8, inner), symbols.row(codes)
    assert np.array_equal(symbols.codes(row, len(codebooks), 8, inner), codes)
    assert (structure.sources < (np.arange(len(row)) - structure.behind)[:, None]).all(), (
        "sources are of earlier groups"
    )
    assert [row[part].tolist() for part in structure.groups] and sum(
        part.stop - part.start for part in structure.groups
    ) == len(row)
    last = max(size - 1 for size in (8, len(symbols.sizes), *inner))
    assert last < len(structure.groups) <= 8 + len(symbols.sizes) - 1 + sum(side - 1 for side in inner)


@pytest.fixture(scope="module", params=["serial", "delayed"])
def with_prior(exported, tmp_path_factory, request):
    """A bundle with a prior in it that has learned nothing but isn't indifferent."""
    torch.manual_seed(0)
    tokenizer = Tokenizer(str(exported[1]), request.param)
    prior = Prior(
        tokenizer.sizes,
        tokenizer.places,
        tokenizer.sources,
        width=16,
        depth=1,
        heads=2,
        window=8,
        order=request.param,
    )
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp("prior") / "bundle"
    export_prior(prior, torch.arange(sum(tokenizer.counted)), exported[1], folder)
    return folder, prior


def bundle_codes(bundle, seed=0):
    chance = np.random.default_rng(seed)
    return np.stack([chance.integers(0, size, bundle.tokens) for size in bundle.codebook_sizes])


def test_what_torch_says_is_what_onnx_runtime_decodes(with_prior):
    folder, prior = with_prior
    bundle = varitok.load(folder)
    codes = bundle_codes(bundle)
    exact, symbols = prior.exact(), Symbols(codebooks_of(bundle), 0, entropy.LIMIT, prior.order)
    structure, row = symbols.structure(*codes.shape, ()), symbols.row(codes)
    seen = torch.from_numpy(symbols.contexts(structure, row))[None]
    with torch.no_grad():
        logits = exact(seen, torch.zeros(1, *exact.state_shape, dtype=torch.float64))[0][0].numpy()
    coding, encoder = coding_of("learned", codebooks_of(bundle), bundle), RangeEncoder()
    for symbol, kind, (chances,) in zip(
        row, structure.kinds, coding._frequencies(logits[None], structure.kinds), strict=True
    ):
        local = int(symbol - symbols.offsets[kind])
        encoder.encode(int(chances[:local].sum()), int(chances[local]), int(chances.sum()))
    by_torch = encoder.finish()
    assert by_torch == coding.encode(codes)
    for threads in (1, 2):
        coding.graph = entropy.open_graph(folder / entropy.GRAPH, threads)
        assert np.array_equal(coding.decode(by_torch, codes.shape[1], (), True), codes)


@given(st.integers(1, 6), st.lists(st.integers(0, 1 << 30), min_size=1, max_size=5), st.booleans())
def test_codes_decoded_together_are_those_decoded_alone(with_prior, kept, seeds, spoiled):
    bundle = varitok.load(with_prior[0])
    coding = coding_of("learned", codebooks_of(bundle), bundle)
    codes = [bundle_codes(bundle, seed)[:, :kept] for seed in seeds]
    written = [coding.encode(each) for each in codes]
    damaged = [b"\xff" * 40] if spoiled else []
    found = coding.decode_together(written + damaged, codes[0].shape[1], (), True)
    for each, back in zip(codes, found, strict=False):
        assert np.array_equal(each, back)
    halves = [data[: len(data) // 2] for data in written]
    for half, back in zip(halves, coding.decode_together(halves, codes[0].shape[1], (), False), strict=True):
        assert np.array_equal(back, coding.decode(half, codes[0].shape[1], (), False))


@pytest.mark.parametrize("name", entropy.CODINGS)
def test_any_prefix_of_the_bytes_gives_the_steps_that_arrived(with_prior, name):
    bundle = varitok.load(with_prior[0])
    codes, coding = bundle_codes(bundle), coding_of(name, codebooks_of(bundle), bundle)
    data, before = coding.encode(codes), 0
    for size in range(len(data)):
        found = coding.decode(data[:size], codes.shape[1], (), False)
        assert before <= found.shape[1] <= codes.shape[1] and np.array_equal(found, codes[:, : found.shape[1]])
        before = found.shape[1]
    assert before >= codes.shape[1] - 3


def test_a_bundle_with_a_prior_encodes_by_it_and_without_it_nothing_is_read(with_prior, exported, tmp_path, capsys):
    from PIL import Image

    folder, photo = with_prior[0], tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(photo)

    def run(*words):
        main([*map(str, words)])
        return capsys.readouterr().out

    def refused(*words):
        with pytest.raises(SystemExit) as left:
            main([*map(str, words)])
        told = capsys.readouterr().err
        assert left.value.code == 2 and told.count("\n") == 1
        return told

    pictures = {}
    for coding in (None, *entropy.CODINGS):
        out = tmp_path / str(coding)
        (told,) = json.loads(
            run("encode", folder, photo, "--out", out, "--json", *(["--coding", coding] if coding else []))
        )
        assert told["coding"] == coding or (coding is None and told["coding"] == "learned")
        about = json.loads(run("info", out / "a.vtk", "--json"))
        assert about["coding"] == told["coding"] and about["bytes"]["payload"] == told["payload bytes"]
        run("decode", folder, out / "a.vtk", "--out", out)
        pictures[coding] = (out / "a.png").read_bytes()
    assert len(set(pictures.values())) == 1
    # The codec is the same one: its own bundle decodes what needs no prior, and only that.
    run("decode", exported[1], tmp_path / "packed" / "a.vtk", "--out", tmp_path / "plain")
    assert "need a prior that" in refused("decode", exported[1], tmp_path / "learned" / "a.vtk", "--force")
    assert "has no prior, which static coding needs" in refused("encode", exported[1], photo, "--coding", "static")


def test_a_folder_is_decoded_together_and_one_damaged_file_ends_no_other(with_prior, tmp_path, capsys):
    bundle, codes = varitok.load(with_prior[0]), tmp_path / "codes"
    codes.mkdir()
    coding = coding_of("learned", codebooks_of(bundle), bundle)
    for number, kept in enumerate((bundle.tokens, 2, bundle.tokens, bundle.tokens)):
        made = bundle_codes(bundle, number)[None, :, :kept]
        with (codes / f"{number}.vtk").open("wb") as file:
            container.write(file, container.header_of(bundle, made, (), coding), made, np.ones(kept, np.int64), coding)
    data = (codes / "2.vtk").read_bytes()
    (codes / "2.vtk").write_bytes(data[:-6] + bytes([data[-6] ^ 1]) + data[-5:])
    with pytest.raises(SystemExit) as left:
        main(["decode", str(with_prior[0]), str(codes), "--out", str(tmp_path / "together")])
    told = capsys.readouterr()
    assert left.value.code == 1 and "2.vtk: damaged" in told.err and "1 of 4 files failed" in told.err
    for number in (0, 1, 3):
        main(["decode", str(with_prior[0]), str(codes / f"{number}.vtk"), "--out", str(tmp_path / "alone")])
        alone, together = (tmp_path / where / f"{number}.png" for where in ("alone", "together"))
        assert alone.read_bytes() == together.read_bytes()


def test_the_order_of_a_prior_is_stated_and_was_serial(with_prior, tmp_path):
    folder = shutil.copytree(with_prior[0], tmp_path / "bundle")
    about = json.loads((folder / entropy.CONFIG).read_text())
    assert about["order"] == with_prior[1].order
    bundle = load(folder, verify=False)
    data = coding_of("learned", codebooks_of(bundle), bundle).encode(bundle_codes(bundle))
    if about.pop("order") == "serial":  # as in bundles that don't state it
        (folder / entropy.CONFIG).write_text(json.dumps(about))
        earlier = load(folder, verify=False)
        assert coding_of("learned", codebooks_of(earlier), earlier).encode(bundle_codes(bundle)) == data
    (folder / entropy.CONFIG).write_text(json.dumps({**about, "order": "reversed"}))
    with pytest.raises(UserError, match=r"config\.json: order reversed is not known; update varitok$"):
        coding_of("learned", codebooks_of(later := load(folder, verify=False)), later)


def test_a_broken_prior_is_told(with_prior, exported, tmp_path):
    folder = shutil.copytree(with_prior[0], tmp_path / "bundle")
    path = folder / entropy.FREQUENCIES
    table = np.load(path)
    for broken in (table[:-1], np.zeros_like(table), table.astype(float)):
        np.save(path, broken)
        with pytest.raises(UserError, match="not the frequencies of this bundle's codebooks"):
            coding_of("static", codebooks_of(bundle := load(folder, verify=False)), bundle)
    path.write_bytes(b"\x93NUMPY")
    with pytest.raises(UserError, match=r"frequencies\.npy: can't be read"):
        coding_of("static", codebooks_of(bundle := load(folder, verify=False)), bundle)
    shutil.copy(folder / "onnx" / "decoder_model.onnx", folder / entropy.GRAPH)
    with pytest.raises(UserError, match="not a prior of this bundle's codebooks"):
        coding_of("learned", codebooks_of(bundle := load(folder, verify=False)), bundle)
    (folder / entropy.GRAPH).write_bytes(b"no graph")
    with pytest.raises(UserError, match="ONNX Runtime can't read it"):
        coding_of("learned", codebooks_of(bundle := load(folder, verify=False)), bundle)
    with pytest.raises(UserError, match="altered since it was exported"):
        varitok.load(folder)
