"""Imports point one way: data <- codecs <- codecs/training <- export; the runtime stands alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Of varitok.export.
WITHOUT_TORCH = (
    *("runtime", "graphs", "clips", "stream", "tiles", "packing", "symbols", "range_coder", "entropy", "container"),
    *("rate", "files", "hub", "command"),
)
FOLDERS = ("data", "codecs", "export", "configs")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return ".".join(("varitok", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Name every module that a file imports, wherever in it; `from x import y` counts as `x.y`."""
    package = name_of(path).split(".") if path.name == "__init__.py" else name_of(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
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
    """Tell what of ours a module may import."""
    own = (
        "varitok.UserError",
        "varitok.at_least",
        "varitok.watched",
        "varitok.__version__",
    )  # and `import varitok` itself
    if below(importer, "varitok.data"):
        return (*own, "varitok.data")
    if below(importer, "varitok.codecs"):
        return (*own, "varitok.data", "varitok.codecs")
    if below(importer, "varitok.configs"):
        return (*own, "varitok.configs")
    if below(importer, *(f"varitok.export.{name}" for name in WITHOUT_TORCH)):
        return (*own, "varitok.export")
    return (*own, "varitok.data", "varitok.codecs", "varitok.export")


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path: Path) -> None:
    ours = {name for name in imported(path) - {"varitok"} if below(name, "varitok", *FOLDERS)}
    wrong = {name for name in ours if not below(name, *allowed(name_of(path)))}
    assert not wrong, f"{name_of(path)} may not import {wrong}"


@pytest.mark.parametrize("path", [path for path in MODULES if "training" not in path.parts], ids=name_of)
def test_only_training_and_export_import_training(path: Path) -> None:
    if not below(name_of(path), "varitok.export"):
        assert not {name for name in imported(path) if below(name, "varitok.codecs.training")}


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != ROOT], ids=name_of)
def test_relative_inside_a_folder_absolute_across(path: Path) -> None:
    own = ".".join(name_of(path).split(".")[:2])
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    absolute = {node.module or "" for node in tree if isinstance(node, ast.ImportFrom) and not node.level}
    assert not {name for name in absolute if below(name, own)}, "import relatively inside a top-level folder"


SHUNNED = {
    "torchvision.io": "a PNG with one flipped byte ends the process; Pillow raises",
    "torchaudio.load": "needs FFmpeg's shared libraries; soundfile and PyAV bring theirs",
    "pytorch_lightning.callbacks.ModelCheckpoint": "counts every optimizer's step, and may never save",
    "pytorch_lightning.callbacks.EMAWeightAveraging": "copies the first weights over the trained ones",
    "webdataset": "executes pickles when it decodes",
}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_what_is_known_to_fail_is_not_used(path: Path) -> None:
    assert not {name for name in imported(path) if below(name, *SHUNNED)}


@pytest.mark.parametrize(
    "module",
    ["varitok", "varitok.configs.compose", "varitok.train", *(f"varitok.export.{name}" for name in WITHOUT_TORCH)],
)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={"PYTHONPATH": str(ROOT / ".pkg")},
    )
    assert done.returncode == 0, done.stderr or f"{module} loads torch"


def test_a_wrong_import_is_seen() -> None:
    assert "varitok.codecs.codec.Codec" in imported(ROOT / "codecs" / "build.py")
    assert not below("varitok.codecs.codec.Codec", *allowed("varitok.data.images"))
    assert not below("varitok.codecs.codec.Codec", *allowed("varitok.export.runtime"))
