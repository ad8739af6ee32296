"""Imports point one way: data <- codecs <- codecs/training <- export; the runtime stands alone."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHARED = ("data.decoding", "data.noise", "data.permutation", "data.storage")
WITHOUT_TORCH = (*SHARED, "export.runtime", "export.bitstream", "export.cli.main", "export.cli.encode_decode")
FOLDERS = ("data", "codecs", "export", "configs")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
# Each folder's rooms from the ground up: a room imports what stands before it, never what stands after.
FLOORS = {
    "data": (
        "weights feature_map permutation noise storage decoding batch sampler workers teachers synthetic datasets"
        " datamodule cli"
    ),
    "codecs": (
        "renamed conversion result masking padding layout distributed precision unregistered networks bottlenecks"
        " discriminators lengths codec streaming implicit build discretize allocation losses metrics modalities"
        " evaluation training"
    ),
    "codecs.training": (
        "config versions malloc schedules readout logging guard activation_checkpointing compilation codebook_health"
        " distributed ema base module prior implicit callbacks resume initial run sweep"
    ),
    "export": "runtime bitstream exporters importers adapters compare probe report cli",
}
LAZY = ("varitok", "varitok.export.cli.completion")  # import while they run what imports them
MOST_FILES = 16
MOST_OF_ONE_KIND = 20  # bottlenecks, networks, losses
ONE_KIND = ("bottlenecks", "networks", "losses")


def name_of(path: Path) -> str:
    return ".".join(("varitok", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imported(path: Path) -> set[str]:
    """Name every module that a file imports, wherever in it; `from x import y` counts as `x.y`."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *(node.module.split(".") if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


def below(name: str, *packages: str) -> bool:
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def allowed(importer: str) -> tuple[str, ...]:
    """Return the modules of ours that a module may import."""
    own = (
        "varitok.UserError",
        "varitok.progress",
        "varitok.exit_on_closed_output",
        "varitok.__version__",
    )  # and `import varitok` itself
    if below(importer, "varitok.data"):
        return (*own, "varitok.data")
    if below(importer, "varitok.codecs"):
        composer = ("varitok.configs",) if below(importer, "varitok.codecs.training.config") else ()
        return (*own, "varitok.data", "varitok.codecs", *composer)
    if below(importer, "varitok.configs"):
        return (*own, "varitok.configs")
    if below(importer, *(f"varitok.{name}" for name in WITHOUT_TORCH)):
        return (*own, "varitok.export", *(f"varitok.{name}" for name in SHARED))
    return (*own, "varitok.data", "varitok.codecs", "varitok.export")


def test_imports_point_one_way() -> None:
    for path in MODULES:
        ours = {name for name in imported(path) - {"varitok"} if below(name, "varitok", *FOLDERS)}
        wrong = {name for name in ours if not below(name, *allowed(name_of(path)))}
        assert not wrong, f"{name_of(path)} may not import {wrong}"


def test_a_room_imports_only_what_stands_below_it() -> None:
    for folder, rooms in FLOORS.items():
        floors = {f"varitok.{folder}.{room}": floor for floor, room in enumerate(rooms.split())}
        for path in (ROOT / folder.replace(".", "/")).rglob("*.py"):
            own = next(floor for room, floor in floors.items() if below(name_of(path), room))
            above = {
                name for name in imported(path) for room, floor in floors.items() if floor > own and below(name, room)
            }
            assert not above, f"{name_of(path)} imports {above}, which stand above it in FLOORS"


def test_no_modules_import_each_other_in_a_circle() -> None:
    names = {name_of(path): path for path in MODULES}
    sorter = TopologicalSorter(
        {
            name: {other for found in imported(path) for other in (found, found.rpartition(".")[0]) if other in names}
            - {name}
            for name, path in names.items()
            if name not in LAZY
        }
    )
    try:
        sorter.prepare()
    except CycleError as error:
        pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_no_folder_has_more_files_than_a_reader_takes_in() -> None:
    for folder in {path.parent for path in MODULES}:
        count = len(list(folder.glob("*.py")))
        assert count <= (MOST_OF_ONE_KIND if folder.name in ONE_KIND else MOST_FILES), f"{folder.name}: {count} modules"


def test_relative_inside_a_folder_absolute_across() -> None:
    for path in MODULES:
        own = ".".join(name_of(path).split(".")[:2])
        nodes = ast.walk(tree_of(path))
        absolute = {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        wrong = {name for name in absolute if below(name, own)}
        assert not wrong, f"{name_of(path)} imports {wrong}: import relatively inside a top-level folder"


SHUNNED = {
    "torchvision.io": "a PNG with one flipped byte ends the process; Pillow raises",
    "torchaudio.load": "needs FFmpeg's shared libraries; soundfile and PyAV bring theirs",
    "pytorch_lightning.callbacks.ModelCheckpoint": "counts every optimizer's step, and may never save",
    "pytorch_lightning.callbacks.EMAWeightAveraging": "copies the first weights over the trained ones",
    "webdataset": "executes pickles when it decodes",
}


def test_what_is_known_to_fail_is_not_used() -> None:
    for path in MODULES:
        wrong = {name for name in imported(path) if below(name, *SHUNNED)}
        assert not wrong, f"{name_of(path)} uses {wrong}: {SHUNNED}"


def test_media_files_are_opened_in_the_decoding_room_alone() -> None:
    """Another reader would disagree about orientation, alpha, depth, rate or frame times."""
    opener = re.compile(
        r"Image\.open\(|soundfile\.(read|info|blocks|SoundFile)\((?!.*\"w\")|av\.open\((?!.*\"w\")|torchaudio\.load"
    )
    for path in MODULES:
        if not below(name_of(path), "varitok.data.decoding"):
            found = opener.search(path.read_text(encoding="utf-8"))
            assert not found, f"{name_of(path)}: {found}; read through data/decoding"


def test_what_needs_no_torch_loads_none() -> None:
    modules = ["varitok", "varitok.codecs.training.config.compose", "varitok.train"]
    modules += [
        name_of(path) for path in MODULES if below(name_of(path), *(f"varitok.{name}" for name in WITHOUT_TORCH))
    ]
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n"
    code += "    importlib.import_module(name)\n    if 'torch' in sys.modules: sys.exit(name + ' loads torch')"
    done = subprocess.run(
        [sys.executable, "-c", code, *modules],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / ".pkg")},
    )
    assert done.returncode == 0, done.stderr


def test_a_wrong_import_is_seen() -> None:
    assert "varitok.codecs.codec.Codec" in imported(ROOT / "codecs" / "build.py")
    assert not below("varitok.codecs.codec.Codec", *allowed("varitok.data.datasets.images"))
    assert not below("varitok.codecs.codec.Codec", *allowed("varitok.export.runtime.load"))
