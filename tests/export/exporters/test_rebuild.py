"""A bundle's codec is rebuilt in torch from data alone, and a bundle takes tensors as it takes arrays."""

import hashlib
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

import varitok
from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.implicit.codec import ImplicitCodec
from varitok.codecs.modalities.registry import modality_of
from varitok.configs import __file__ as configs
from varitok.export.exporters import rebuild as module
from varitok.export.exporters.bundle import architecture, export_bundle
from varitok.export.exporters.bundle_folder import add
from varitok.export.exporters.frozen import freeze

from ...codecs.examples import SIZE, shrink, shrink_scales
from ...composing import composed

# Of that size it takes minutes; and a codebook whose entries are alike before the first batch decides by rounding.
LEFT_OUT = ("video/hitvideo", "video/landiff_semantic_small")
QUICK = ("image/demo", "audio/demo")
EXPERIMENTS = sorted(
    path.relative_to(Path(configs).parent / "experiment").with_suffix("").as_posix()
    for path in (Path(configs).parent / "experiment").rglob("*.yaml")
    if path.parent.name not in ("base", "prior")
)
CHOSEN = [name for name in EXPERIMENTS if name not in LEFT_OUT]


def configuration(name):
    """Compose a preset; a folder of data, which it leaves to the user, is none."""
    config = composed(f"experiment={name}")
    for key in OmegaConf.missing_keys(config):
        OmegaConf.update(config, key, "FOLDER")
    return config


def preset(name):
    """Build a preset's codec, narrow and shallow; return it with its configuration."""
    config = configuration(name)
    shrink(config.codec)
    shrink_scales(config)
    return build_codec(config).eval(), config


def exported_preset(name, folder, formats=("safetensors",)):
    """Export a preset's codec, narrow and shallow, without streams."""
    torch.manual_seed(0)
    codec, config = preset(name)
    if not isinstance(codec, ImplicitCodec):
        about = {"architecture": architecture(config), "image_size": OmegaConf.select(config, "data.image_size")}
        export_bundle(codec, folder, **about, formats=formats, streaming=False)
    return codec


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    exported_preset("image/demo", folder)
    return folder


def test_classes_of_presets_are_found_in_every_folder():
    pages = [
        path.read_text() for group in ("codec", "bottleneck") for path in (Path(configs).parent / group).rglob("*.yaml")
    ]
    names = set(re.findall(r"_target_: varitok\.codecs\.[\w.]+\.(\w+)", "\n".join(pages)))
    assert {"SequenceTransformer", "residual"} <= names
    told = {"type": "Nowhere", "parts": [{"type": name} for name in sorted(names)]}
    with pytest.raises(UserError, match="has no 'Nowhere'"):
        module.frozen_of({"architecture": told}, {})


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CHOSEN])
def test_every_preset_is_rebuilt_from_its_bundle(name, tmp_path):
    codec = exported_preset(name, tmp_path / "bundle")
    if isinstance(codec, ImplicitCodec):
        return  # a network that paints one clip is no codec
    rebuilt = varitok.load_torch(tmp_path / "bundle")
    golden = load_file(tmp_path / "bundle" / "golden.safetensors")
    names = modality_of(codec).graph
    signal, codes = golden[names.signal], golden[names.codes]
    with torch.inference_mode():
        found = rebuilt.encode(signal)
        assert torch.equal(found, codes) if codes.dtype == torch.int64 else torch.allclose(found, codes, atol=1e-5)
        back = rebuilt.decode(codes)
    most = max(int(key.rpartition(".")[2]) for key in golden if key.startswith(f"{names.back}."))
    torch.testing.assert_close(back, golden[f"{names.back}.{most}"])
    assert not rebuilt.training
    torch.manual_seed(1)
    again, _ = preset(name)
    try:
        again.load_state_dict(module.trainable_state(tmp_path / "bundle"))
    except UserError as told:
        assert name not in QUICK and "a bundle lacks what" in str(told)
        return
    for key, value in freeze(again, streaming=False).state_dict().items():
        torch.testing.assert_close(value, rebuilt.state_dict()[key], msg=key)


def test_names_are_told_apart():
    """A name in a bundle stands for one class."""
    seen = {}
    for name in module._modules():
        part = importlib.import_module(f"varitok.codecs.{name}")
        for each in getattr(part, "__all__", ()):
            found = getattr(part, each)
            if isinstance(found, type):
                assert seen.setdefault(each, found) is found, each


def change(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_is_damaged_or_absurd_is_told_in_one_line(bundle, tmp_path):
    import shutil

    def told(spoil):
        folder = shutil.copytree(bundle, tmp_path / "copy", dirs_exist_ok=True)
        spoil(folder)
        with pytest.raises(UserError) as error:
            varitok.load_torch(folder)
        shutil.rmtree(folder)
        assert "\n" not in str(error.value)
        return str(error.value)

    about = json.loads((bundle / "config.json").read_text())["architecture"]

    def nested(**encoder):
        return {"architecture": about | {"codec": about["codec"] | {"encoder": about["codec"]["encoder"] | encoder}}}

    assert "doesn't say how its codec was built" in told(lambda f: change(f, architecture=None))
    assert "this varitok has no 'os.system'" in told(lambda f: change(f, **nested(type="os.system")))
    assert "is no argument" in told(lambda f: change(f, **nested(_target_="os.system")))
    assert "far more than its weights have" in told(lambda f: change(f, **nested(width=1 << 20, heads=1)))
    assert "is not as config.json has it" in told(lambda f: change(f, **nested(depth=3)))
    assert "format" in told(lambda f: change(f, format_version=99))
    assert "one clip" in told(lambda f: change(f, modality="clip"))
    assert "missing" in told(lambda f: (f / "model.safetensors").unlink())
    weights = bundle / "model.safetensors"
    assert "altered" in told(lambda f: (f / "model.safetensors").write_bytes(weights.read_bytes()[:-1]))

    def resealed(folder, data):
        (folder / "model.safetensors").write_bytes(data)
        export = json.loads((folder / "export.json").read_text())
        export["files"]["model.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
        (folder / "export.json").write_text(json.dumps(export))

    assert "can't be read" in told(lambda f: resealed(f, b"\xff" * 100))
    state = load_file(weights)
    fewer = tmp_path / "fewer.safetensors"
    save_file({name: state[name] for name in sorted(state)[1:]}, fewer)
    assert "is not as config.json has it" in told(lambda f: resealed(f, fewer.read_bytes()))


def test_torch_is_loaded_by_none_but_what_needs_it(bundle):
    code = "import sys, varitok; varitok.load_torch; sys.exit('torch' in sys.modules)"
    package = str(Path(varitok.__file__).parent.parent)
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": package}, check=False).returncode == 0


def test_tensors_go_in_and_come_out(exported):
    found = varitok.load(exported[1])
    signal = torch.rand(2, 3, SIZE, SIZE) * 2 - 1
    codes = found.encode(signal, tokens=4)
    assert isinstance(codes, torch.Tensor) and codes.dtype == torch.int64
    assert (codes.numpy() == found.encode(signal.numpy(), tokens=4)).all()
    assert torch.equal(found.encode(signal.bfloat16()), found.encode(signal.bfloat16().float()))
    back = found.decode(codes)
    assert isinstance(back, torch.Tensor) and (back.numpy() == found.decode(codes.numpy())).all()
    with pytest.raises(UserError, match="float values must be numbers in"):
        found.encode(3 * signal)


def test_a_part_that_is_added_takes_the_place_of_the_one_before(bundle, tmp_path):
    import shutil

    folder = shutil.copytree(bundle, tmp_path / "copy")
    for name in ("one", "two"):
        shutil.rmtree(folder / "more", ignore_errors=True)
        (folder / "more").mkdir()
        (folder / "more" / name).write_text("x")
        add(folder, "more")
    files = json.loads((folder / "export.json").read_text())["files"]
    assert "more/two" in files and "more/one" not in files and "config.json" in files
