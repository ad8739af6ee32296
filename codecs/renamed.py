"""Old names in configurations and checkpoints, and their new names.

`modernize` translates a saved configuration (of a checkpoint, or a run's `config.yaml`) silently. Old names in a user's
YAML or command line raise an error that names the new one. This module doesn't import torch.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["CLASSES", "KEYS", "OPTIONS", "modernize", "new_key", "new_keys", "new_state", "new_target"]

ANYWHERE = "*"

# Old keys by location: an argument of a `_target_` (its current name), at a path of the configuration, or ANYWHERE.
KEYS: dict[str, dict[str, str]] = {
    "length": {"depth": "codebooks"},
    "training": {"average": "ema_decay", "recompute": "activation_checkpointing"},
    "data": {"hop": "downsample", "lead": "causal_pad"},
    "data.clips": {"hop": "downsample", "lead": "causal_pad"},
    ANYWHERE: {
        "books": "num_codebooks",
        "hop": "hop_length",
        "hops": "hop_lengths",
        "initialise": "kmeans_init",
        "mapped_shortcuts": "conv_shortcut",
        "narrowing": "compress",
    },
}

# Options of groups, as in `GROUP=OPTION`.
OPTIONS = {
    "bottleneck": {"rvq_factorised": "rvq_factorized", "vq_factorised": "vq_factorized"},
    "data": {
        "one_clip": "single_clip",
        "one_scene": "single_scene",
        "sound_folder": "audio_folder",
        "sound_mix": "audio_mix",
    },
    "experiment": {"prior/clips": "prior/video", "prior/sounds": "prior/audio"},
}

# Classes and functions of any module.
CLASSES = {
    "Bits": "PriorBits",
    "FactoredDecoder": "ResNetDecoder",
    "FactoredEncoder": "ResNetEncoder",
    "FactorisedResidualQuantizer": "FactorizedResidualQuantizer",
    "Several": "MultiDiscriminator",
    "SoundTransformer": "AudioTransformer",
    "one_clip": "single_clip",
    "one_scene": "single_scene",
    "sound_folder": "audio_folder",
    "sound_mix": "audio_mix",
    "sound_teacher": "audio_teacher",
}
# New names of the two classes called EachFrame, by module.
EACH_FRAME = {"codecs.losses.frames": "PerFrame", "codecs.discriminators.clip": "FrameDiscriminator"}

# Components of state dict keys.
STATE = {"book": "codebook", "centre": "center", "centres": "centers"}

# Old modules in `_target_`s, without `varitok.`, and the modules that have their contents now.
MODULES = {
    "codecs.bottlenecks.factorised": "codecs.bottlenecks.factorized",
    "codecs.distributions": "codecs.lengths.distributions",
    "codecs.halting": "codecs.lengths.halting",
    "codecs.implicit": "codecs.implicit.codec",
    "codecs.lengths": "codecs.lengths.policy",
    "codecs.metrics.lpips": "codecs.losses.lpips",
    "codecs.networks.activations": "codecs.networks.layers.activations",
    "codecs.networks.attention": "codecs.networks.layers.attention",
    "codecs.networks.convolution": "codecs.networks.layers.convolution",
    "codecs.networks.factored": "codecs.networks.resnet",
    "codecs.networks.run_length": "codecs.networks.layers.run_length",
    "codecs.networks.sequence": "codecs.networks.layers.sequence",
    "codecs.networks.stft": "codecs.networks.layers.stft",
    "codecs.networks.wavelet": "codecs.networks.layers.wavelet",
    "codecs.perturbation": "codecs.bottlenecks.perturbation",
    "codecs.prior": "codecs.networks.code_prior",
    "codecs.training.bits": "codecs.training.callbacks.prior_bits",
    "codecs.training.evaluation": "codecs.training.callbacks.evaluation",
    "codecs.training.loggers": "codecs.training.logging.loggers",
    "codecs.training.samples": "codecs.training.callbacks.samples",
    "codecs.training.tensorboard_log": "codecs.training.logging.tensorboard",
    "codecs.training.wandb_log": "codecs.training.logging.wandb",
    "data.embedded": "data.synthetic.base",
    "data.feature_shards": "data.datasets.cached_features",
    "data.features": "data.datasets.features",
    "data.images": "data.datasets.images",
    "data.mix": "data.datasets.mixture",
    "data.one_clip": "data.datasets.single_clip",
    "data.scenes": "data.synthetic.video",
    "data.sound_teachers": "data.teachers.audio",
    "data.sounds": "data.datasets.audio",
    "data.synthetic": "data.synthetic.images",
    "data.teachers": "data.teachers.vision",
    "data.text_teachers": "data.teachers.text",
    "data.videos": "data.datasets.video",
    "data.voices": "data.synthetic.audio",
    "export.callback": "export.exporters.callback",
    "export.prior": "export.exporters.prior",
}
# Names that moved to another module than the rest of theirs: old module, new module.
NAMES = {
    **dict.fromkeys(
        "Curriculum FallingMinimum FixedSet Full LogUniform PowerLaw PowersOfTwo Range RoundedUp TruncatedNormal"
        " Uniform".split(),
        ("codecs.lengths", "codecs.lengths.distributions"),
    ),
    "HaltingHead": ("codecs.lengths", "codecs.lengths.halting"),
    "PatchDecoder": ("codecs.networks.sequence", "codecs.networks.patch_codec"),
    "PatchEncoder": ("codecs.networks.sequence", "codecs.networks.patch_codec"),
    "Recurrent": ("codecs.networks.sequence", "codecs.networks.layers.recurrent"),
}


def new_target(target: str) -> str:
    """Return the current name of a `_target_`; unchanged names are returned as they are."""
    module, _, name = target.rpartition(".")
    module = module.removeprefix("varitok.")
    parted, now = NAMES.get(name, ("", ""))
    found = now if parted == module else MODULES.get(module, module)
    called = EACH_FRAME.get(found, name) if name == "EachFrame" else CLASSES.get(name, name)
    return f"varitok.{found}.{called}" if (found, called) != (module, name) else target


def new_state(name: str) -> str:
    """Return the current name of a parameter or buffer in a state dict."""
    return ".".join(STATE.get(part, part) for part in name.split("."))


def new_keys(old: str) -> set[str]:
    """Return all current names of an old key, whatever its location."""
    return {table[old] for table in KEYS.values() if old in table}


def new_key(old: str, *sections: str) -> str | None:
    """Return the current name of a key; None if it has not changed.

    Args:
        old: The last component of the key.
        sections: Locations of the key: the `_target_` it is an argument of, and its parent's path.
    """
    return next((KEYS[section][old] for section in (*sections, ANYWHERE) if old in KEYS.get(section, ())), None)


def modernize(saved: Any, path: str = "") -> Any:
    """Return a saved configuration with current targets and keys.

    Args:
        saved: Plain containers and values.
        path: Path of `saved` in the whole configuration.
    """
    if isinstance(saved, list):
        return [modernize(item, path) for item in saved]
    if not isinstance(saved, Mapping):
        return saved
    target = new_target(str(saved.get("_target_", "")))
    found = {}
    for key, value in saved.items():
        now = new_key(key, target, path) or key
        found[now] = target if key == "_target_" else modernize(value, f"{path}.{now}" if path else now)
    return found
