"""What a wheel holds is what git tracks, and a checkout shows the same package."""

import re
import shutil
import subprocess
import sys
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
LISTED = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
ROOTS = [name.removeprefix(".pkg/varitok/") for name in LISTED if not name.endswith("__init__.py")]

in_checkout = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False).stdout


def tracked(*roots: str) -> set[str]:
    """Name the files that git tracks, or would if they were added, and that are there."""
    names = git("ls-files", "--cached", "--others", "--exclude-standard", "--", *roots).splitlines()
    return {name for name in names if (ROOT / name).is_file()}


def test_links_are_the_wheels_roots() -> None:
    links = {path.name: path for path in (ROOT / ".pkg" / "varitok").iterdir() if path.is_symlink()}
    assert set(links) == set(ROOTS)
    for name, link in links.items():
        assert link.resolve() == (ROOT / name).resolve()
        assert not link.readlink().is_absolute()


def test_no_other_init() -> None:
    """`codecs/__init__.py` would shadow the standard library's `codecs`."""
    found = {path.relative_to(ROOT).as_posix() for root in ROOTS for path in (ROOT / root).rglob("__init__.py")}
    assert found == {"configs/__init__.py"}


@in_checkout
def test_no_source_is_ignored() -> None:
    """A `data/` in .gitignore leaves the folder out of the wheel, silently."""
    for root in ROOTS:
        done = subprocess.run(["git", "-C", str(ROOT), "check-ignore", "--no-index", f"{root}/new.py"], check=False)
        assert done.returncode == 1, f"{root} is ignored"


def test_versions_agree() -> None:
    import varitok

    assert PROJECT["project"]["version"] == varitok.__version__


def test_constraints_are_plain_pins_within_bounds() -> None:
    from packaging.utils import canonicalize_name

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    assert all(re.fullmatch(r"==[0-9][0-9.a-z]*", str(pin.specifier)) and not pin.url for pin in pins)
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [
        *PROJECT["project"]["dependencies"],
        *(each for name in ("train", "video", "teachers", "dev") for each in extras[name]),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name == "varitok":  # another extra
            continue
        name = canonicalize_name(requirement.name)
        mine = [pin for pin in pins if canonicalize_name(pin.name) == name]
        assert mine, f"{name} is not pinned"
        for pin in mine:
            (version,) = pin.specifier
            assert requirement.specifier.contains(version.version), f"{pin} is outside {requirement}"


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_every_python_has_one_pin_of_each(python: str) -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line) for line in lines]
    here = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    assert len(here) == len(set(here))
    assert {"torch", "numpy", "onnxruntime", "matplotlib", "pillow"} <= set(here)


@in_checkout
def test_editable_install_finds_every_folder(tmp_path: Path) -> None:
    """Nothing but a path may be installed: a package of that name beside it would hide the links."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    into = ["--target", str(tmp_path), "-e", str(ROOT)]
    done = subprocess.run([*install, *into], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "varitok").exists()
    (path,) = tmp_path.glob("*.pth")
    assert Path(path.read_text().strip()) == ROOT / ".pkg"


@in_checkout
def test_wheel_holds_what_git_tracks(tmp_path: Path) -> None:
    """Built by way of the sdist, from a copy of what git tracks, as a release is."""
    copy = tmp_path / "checkout"
    for name in tracked("."):
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    links = copy / ".pkg" / "varitok"
    links.mkdir(parents=True, exist_ok=True)
    for root in ROOTS:
        (links / root).unlink(missing_ok=True)
        (links / root).symlink_to(Path("../..") / root)
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(copy)]
    done = subprocess.run(build, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("varitok/")}
        metadata = {name for name in archive.namelist() if not name.startswith("varitok/")}
    assert held == {"varitok/__init__.py", *(f"varitok/{name}" for name in tracked(*ROOTS))}
    assert any(name.endswith("licenses/LICENSE") for name in metadata)


def _with_what_they_need(names: list[str]) -> list[Distribution]:
    """Return installed distributions and those that they require, as an installer would find them; no extras."""
    found: dict[str, Distribution] = {}
    waiting = [Requirement(name) for name in names]
    for requirement in waiting:  # it grows as we go
        if requirement.name.lower() in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[requirement.name.lower()] = here = distribution(requirement.name)
        waiting += map(Requirement, here.requires or [])
    return list(found.values())


@pytest.mark.slow
def test_the_base_install_runs_a_bundle(tmp_path: Path) -> None:
    """In a fresh environment of nothing but the project's own requirements, without extras: no torch."""
    from varitok.export.exporters.bundle import export_bundle

    from .codecs.examples import SIZE, sound_codec, tiny_codec

    export_bundle(tiny_codec().eval(), tmp_path / "image", formats=["onnx"])
    export_bundle(sound_codec().eval(), tmp_path / "sound", formats=["onnx"])
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    for part in _with_what_they_need(PROJECT["project"]["dependencies"]):
        for file in part.files or []:
            if ".." not in file.parts:  # a script
                (site / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file.locate(), site / file)
    (site / "varitok.pth").write_text(str(ROOT / ".pkg"))
    code = f"""
import importlib.util, sys
import numpy as np, varitok
for absent in ("torch", "torchaudio", "hydra", "av"):
    assert importlib.util.find_spec(absent) is None, absent
codec = varitok.load("image")
photos = np.random.default_rng(0).integers(0, 256, (2, 40, 30, 3), dtype=np.uint8)  # to be resized
assert codec.decode(codec.encode(photos, tokens=3)).shape == (2, 3, {SIZE}, {SIZE})
codec = varitok.load("sound")
wave = np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
assert codec.decode(codec.encode(wave, codec.sample_rate)).shape[-1] >= 1000
"""
    python = tmp_path / "venv" / "bin" / "python"
    done = subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
