"""Published weights as a run: a configuration and a checkpoint, from which all else in varitok starts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from varitok import UserError
from varitok.codecs.build import build_codec
from varitok.codecs.codec import Codec
from varitok.codecs.training.config.compose import save_resolved

from .family import Family, Layout, Sizes
from .registry import recognize
from .source import Source, read_source, shorten
from .transfer import transfer

__all__ = ["Imported", "import_weights", "write_run"]


class Imported(NamedTuple):
    """Imported weights.

    Attributes:
        codec: The codec, in evaluation mode.
        config: Configuration of the run, resolved.
        family: What was imported.
        layout: The form in which it was published.
        notes: What a user should know.
    """

    codec: Codec
    config: DictConfig
    family: Family
    layout: Layout
    notes: list[str]


def import_weights(
    path: str | Path, name: str | None = None, *, data: str = "data", weights: str | None = None
) -> Imported:
    """Build a codec from published weights.

    Args:
        path: File of weights, or a folder with weights and a config.json.
        name: Family, a name in `registry.FAMILIES`; None: recognize it.
        data: Folder of training data that the configuration names.
        weights: Which of several sets of weights in a file to take.

    Raises:
        UserError: The file can't be read, is of another family, lacks tensors, has others, or contradicts its
            config.json.
    """
    family, layout, source, sizes = recognize(read_source(Path(path), weights), name)
    _check_claims(source, sizes.claims)
    config = _configure(family, sizes, source, data)
    codec = build_codec(config).eval()
    filled = transfer(source, codec, family.names(codec))
    left = [one for one in source.shapes if one not in source.taken]
    left = [one for one in left if not any(re.fullmatch(pattern, one) for pattern in family.ignored)]
    if left:
        raise UserError(f"{source.path}: {family.name} has no place for {shorten(left)}")
    if empty := sorted(set(codec.state_dict()) - set(filled)):
        raise UserError(f"{source.path}: gives no {shorten(empty)}")
    return Imported(codec, config, family, layout, source.notes)


def _check_claims(source: Source, claims: Mapping[str, Any]) -> None:
    """Compare a config.json with the tensors."""
    for key, value in claims.items():
        said = source.config.get(key, value)
        if (list(said) if isinstance(said, tuple) else said) != value:
            raise UserError(f"{source.path}: its configuration says {key}={said}, its tensors {value}")


def _configure(family: Family, sizes: Sizes, source: Source, data: str) -> DictConfig:
    """Compose the experiment's configuration with the sizes of the source."""
    with _composer():
        config = hydra.compose("train", [f"experiment={family.experiment}"])
    rate = source.config.get("sampling_rate")
    values = {"data.root": data} | sizes.values | dict(family.fixed) | ({"data.sample_rate": rate} if rate else {})
    for key, value in values.items():
        OmegaConf.update(config, key, value, force_add=True)
    OmegaConf.resolve(config)
    return config


def _composer() -> Any:
    GlobalHydra.instance().clear()
    return hydra.initialize_config_module("varitok.configs", version_base="1.3")


def write_run(imported: Imported, folder: Path) -> Path:
    """Write a run's folder, and return the path of its checkpoint.

    The checkpoint has weights only. A run that resumes it starts at update 0, as from `init_from`.

    Raises:
        UserError: The folder has a run already, or can't be written.
    """
    target = folder / "checkpoints" / "last.ckpt"
    if target.exists():
        raise UserError(f"{folder}: has a run already; give another --out")
    state = {f"codec.{name}": value for name, value in imported.codec.state_dict().items()}
    plain = OmegaConf.to_container(imported.config, resolve=True)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name("last.ckpt.partial")
        torch.save({"state_dict": state, "varitok": {"config": plain}}, partial)
        partial.replace(target)
        save_resolved(imported.config, folder)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder}: can't be written ({error})") from error
    return target
