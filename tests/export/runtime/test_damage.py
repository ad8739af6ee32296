"""Any damage to a bundle's files is reported in one line, or harmless."""

import random
import shutil

import numpy as np
import onnx
import pytest

import varitok
from varitok import UserError
from varitok.export.exporters.bundle_folder import add
from varitok.export.runtime.bundle import DECODER, ENCODER

from ...codecs.examples import SIZE


@pytest.fixture
def copied(exported, tmp_path):
    shutil.copytree(exported[1], tmp_path / "bundle")
    return tmp_path / "bundle"


def coded(folder):
    bundle = varitok.load(folder)
    codes = bundle.encode(np.full((SIZE, SIZE, 3), 77, np.uint8))
    return codes, bundle.decode(codes)


DAMAGES = {
    "flipped": lambda data, chance: _flipped(bytearray(data), chance),
    "truncated": lambda data, chance: data[: chance.randrange(len(data))],
    "extended": lambda data, chance: data + chance.randbytes(chance.randint(1, 9)),
}


def _flipped(data, chance):
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["config.json", "export.json", ENCODER, DECODER])
def test_a_damaged_file_is_told_or_changes_nothing(exported, copied, name, damage):
    expected = coded(exported[1])
    whole, chance, told = (copied / name).read_bytes(), random.Random(0), 0
    for _ in range(40):
        (copied / name).write_bytes(DAMAGES[damage](whole, chance))
        try:
            found = coded(copied)
        except UserError as error:
            told += 1
            assert "\n" not in str(error)
        else:
            assert name == "export.json", "only of what nothing reads may a byte be another"
            assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))
    assert told == 40 if name != "export.json" else told


def test_a_graph_of_unknown_operations_is_told(copied):
    model = onnx.load(copied / ENCODER)
    model.graph.node[0].op_type = "Nonesuch"
    onnx.save(model, copied / ENCODER)
    add(copied, "onnx")
    with pytest.raises(UserError, match="ONNX Runtime can't read it"):
        coded(copied)


def test_graphs_that_are_each_other_are_told(copied):
    decoder = (copied / DECODER).read_bytes()
    (copied / ENCODER).write_bytes(decoder)
    add(copied, "onnx")
    with pytest.raises(UserError, match="can't run it"):
        coded(copied)
