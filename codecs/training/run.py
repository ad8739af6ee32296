"""Construction of a run's trainer, training module and data from its configuration."""

import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator
from torch import nn

from varitok import UserError
from varitok.data.datamodule import DataModule
from varitok.data.storage.listing import list_splits

from ..build import build, build_codec, check_values
from ..implicit.codec import ImplicitCodec
from ..modalities.registry import modality_of
from ..precision import allow_tf32
from .base import MakeOptimizer, Training
from .callbacks.checkpoints import Checkpoints, WholeFiles
from .callbacks.progress import Progress
from .callbacks.stopping import Stopping
from .config.launch import detect_launch
from .config.locations import with_absolute_paths
from .distributed.agreement import Agreement
from .distributed.strategy import strategy_of
from .distributed.watchdog import Watchdog
from .guard import Guard
from .implicit import ClipTraining
from .initial import keep_trainable, load_initial
from .malloc import keep_freed_memory, let_segments_grow
from .module import CodecTraining
from .prior import PriorTraining
from .resume import check_resume, find_checkpoint, holds_weights_alone

__all__ = ["Run", "build_run"]

# Not float16: codes are computed in float32, and gradient scaling would not cover every optimizer step.
PRECISIONS = ("auto", "32-true", "bf16-mixed")
TAKEN = {  # Lightning's arguments that are wrong or without effect here, and the keys that have their meaning
    "accumulate_grad_batches": "training.accumulate",
    "check_val_every_n_epoch": "callbacks.evaluation.every",
    "fast_dev_run": "debug=one_batch",
    "gradient_clip_algorithm": "optim.clip",
    "gradient_clip_val": "optim.clip",
    "limit_train_batches": "updates",
    "limit_val_batches": "data.val_length, or a smaller val/",
    "log_every_n_steps": "training.log_every",
    "max_epochs": "updates",
    "max_steps": "updates",
    "min_epochs": "updates",
    "min_steps": "updates",
    "overfit_batches": "loader.overfit=true",
    "val_check_interval": "callbacks.evaluation.every",
}


class Run(NamedTuple):
    """A run that `fit` starts or resumes; its parts are the arguments of `trainer.fit`.

    Attributes:
        trainer: Lightning's trainer, with callbacks and loggers.
        module: Training module of the codec or prior.
        data: Data module.
        resume: Checkpoint to resume, or None.
    """

    trainer: pl.Trainer
    module: Training
    data: DataModule
    resume: str | None

    def fit(self) -> None:
        """Train to the end.

        Raises:
            UserError: The GPU's memory doesn't suffice.
        """
        try:
            self.trainer.fit(self.module, self.data, ckpt_path=self.resume, weights_only=True)
        except torch.OutOfMemoryError as error:
            size = re.search(r"(GPU \d+ has )a total capacity of (\S+ \w+)", str(error))
            gpu = f": {size[1]}{size[2]}" if size else ""
            raise UserError(f"out of memory{gpu}; give {', '.join(self._smaller())}") from error

    def _smaller(self) -> list[str]:
        """List what a run may set that needs less memory."""
        size, budget = self.data.batch_size, self.data.budget
        found = ["a smaller loader.budget"] if budget else []
        if not budget and size > 1:
            found = [f"loader.batch_size={size // 2} training.accumulate={2 * self.module.accumulate}"]
        if isinstance(self.module, CodecTraining) and not self.module.recompute.forgetful:
            found.append("training.activation_checkpointing=[encoder,decoder]")
        return [*found, "trainer=fsdp2 on several GPUs"]


def build_run(config: DictConfig, folder: Path) -> Run:
    """Build a run's trainer, module and data, in the order in which mistakes are found fastest.

    >>> import hydra
    >>> with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
    ...     config = hydra.compose("train", ["experiment=image/demo", "updates=2", "export=none"])
    >>> config.callbacks = {}  # neither samples nor evaluation
    >>> config.trainer.enable_progress_bar = False
    >>> run = build_run(config, Path("run"))
    >>> run.fit()
    >>> Path("run/checkpoints/last.ckpt").is_file()
    True

    Args:
        config: The composed configuration (see configs/train.yaml).
        folder: The run's folder.

    Raises:
        UserError: A value, a name or a path in the configuration is wrong.
    """
    _quieten()
    folder.mkdir(parents=True, exist_ok=True)
    plain: dict[str, Any] = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    options = _options(plain)
    pl.seed_everything(options["seed"], workers=True, verbose=False)
    resume = find_checkpoint(config.resume, folder)
    if resume and holds_weights_alone(resume):  # an imported run: there is no update to continue from
        config.init_from, resume = str(resume), None
    on_gpu = _trains_on_gpu(plain["trainer"])
    if on_gpu:
        if plain["loader"].get("bucket") or plain["loader"].get("budget"):
            let_segments_grow()
        # Or what data sets compute on "cuda" would all go to the first.
        torch.cuda.set_device(_gpu_of(plain["trainer"]))
    data = DataModule(
        build(config.data),
        **check_values(DataModule, plain["loader"], "loader"),
        features=_features(plain),
        **{name: options[name] for name in ("updates", "accumulate", "seed")},
    )
    module = (
        _prior_training(config, options)
        if OmegaConf.select(config, "prior")
        else _codec_training(config, options, data)
    )
    stored = with_absolute_paths(plain)  # once data is there, which may have been downloaded
    if resume:
        check_resume(resume, module, stored)
    loggers = [build(entry, folder=str(folder)) for entry in config.logger.values() if entry]
    for logger in loggers:
        logger.log_hyperparams(plain)
    files = WholeFiles(on_gpu=on_gpu)
    checkpoints = Checkpoints(stored, files, **check_values(Checkpoints, plain["checkpoint"], "checkpoint"))
    callbacks: list[pl.Callback] = [Progress()] if config.trainer.enable_progress_bar else []
    callbacks += [build(entry) for entry in (*config.callbacks.values(), config.export) if entry]
    precision = _precision(plain["trainer"].get("precision", PRECISIONS[0]), module, on_gpu)
    silence = check_values(Watchdog, {"silence": plain["processes"]["silence"]}, "processes")
    callbacks += [Watchdog(**silence), Agreement(resume), Stopping(checkpoints), checkpoints]
    if on_gpu and _repeats_shapes(module, data):
        plain["trainer"].setdefault("benchmark", not plain["trainer"].get("deterministic"))
    trainer = _trainer(plain, precision, logger=loggers, callbacks=callbacks, default_root_dir=folder, plugins=[files])
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    return Run(trainer, module, data, None if resume is None else str(resume))


def _trains_on_gpu(arguments: dict[str, Any]) -> bool:
    return torch.cuda.is_available() and arguments.get("accelerator", "auto") in ("auto", "gpu", "cuda")


def _gpu_of(arguments: dict[str, Any]) -> int:
    """Return the index of this process's GPU."""
    local, devices = detect_launch().local, arguments.get("devices")
    return int(devices[local]) if isinstance(devices, list) and local < len(devices) else local


def _precision(asked: str, module: Training, on_gpu: bool) -> str:
    """Return the precision of training, as Lightning calls it, and let a GPU use TF32.

    Raises:
        UserError: There is no such precision.
    """
    if asked not in PRECISIONS:
        raise UserError(f"trainer.precision={asked}: not supported; take {' or '.join(PRECISIONS)}")
    if on_gpu:
        allow_tf32()
    if asked != "auto":
        return asked
    codec = getattr(module, "codec", None)
    return modality_of(codec).precision if on_gpu and codec is not None else "32-true"


def _repeats_shapes(module: Training, data: DataModule) -> bool:
    """Return whether all batches have one shape, for which cuDNN may time its algorithms once."""
    fixed = not (data.bucket or data.budget) and len(data.splits.train.shapes) <= 1
    # With one grid axis, evaluation has recordings of any length.
    return fixed and isinstance(module, CodecTraining) and len(module.codec.downsample) != 1


def _trainer(plain: dict[str, Any], precision: str, **parts: Any) -> pl.Trainer:
    """Build Lightning's trainer; refuse arguments that are wrong, or impossible on this machine."""
    arguments = plain["trainer"] | {"precision": precision}
    for key, value in arguments.items():
        # trainer/default.yaml has one of them.
        if key in TAKEN and value is not None and (key, value) != ("log_every_n_steps", 1):
            raise UserError(f"trainer.{key}: set {TAKEN[key]} instead")
    processes = {name: value for name, value in plain["processes"].items() if name != "silence"}  # the watchdog's
    strategy = strategy_of(arguments, **check_values(strategy_of, processes, "processes"))
    try:
        return pl.Trainer(
            **arguments | {"strategy": strategy},
            **parts,
            max_epochs=1,  # one pass over the loader, which repeats the dataset as needed
            limit_val_batches=0,  # the evaluation callback has its own loop
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    except (MisconfigurationException, TypeError, ValueError) as error:
        given = " ".join(f"trainer.{key}={value}" for key, value in arguments.items())
        raise UserError(f"{given}: {' '.join(str(error).split())}") from error


def _features(plain: dict[str, Any]) -> dict[str, str]:
    """Return the shards of cached teacher features by teacher name."""
    teachers = ((plain.get("objective") or {}).get("teachers") or {}).items()
    return {name: teacher["cached"] for name, teacher in teachers if teacher and teacher.get("cached")}


def _codec_training(config: DictConfig, options: dict[str, Any], data: DataModule) -> CodecTraining:
    codec = build_codec(config)
    if not codec.bounded:
        for name in ("mean", "deviation"):
            codec.get_buffer(f"feature_{name}").copy_(getattr(data.splits.train, name).flatten())
    if config.init_from:
        added = load_initial(codec, config)
        frozen = [keep_trainable(codec, part, added) for part in options["freeze"]]
        options = options | {"freeze": [name for names in frozen for name in names]}
    training = ClipTraining if isinstance(codec, ImplicitCodec) else CodecTraining
    return training(
        codec,
        build(config.objective),
        optimizer=_optimizer(config.optim.codec, "optim.codec"),
        discriminator_optimizer=config.optim.discriminator
        and _optimizer(config.optim.discriminator, "optim.discriminator"),
        **options,
    )


def _prior_training(config: DictConfig, options: dict[str, Any]) -> PriorTraining:
    source = build(config.prior.source)
    prior = build(config.prior.network, sizes=source.sizes, places=source.places, sources=source.sources)
    return PriorTraining(prior, source, optimizer=_optimizer(config.optim.codec, "optim.codec"), **options)


def _optimizer(config: DictConfig, where: str) -> MakeOptimizer:
    """Build what makes an optimizer; make one of a single parameter, because torch checks values only then."""
    make: MakeOptimizer = build(config)
    try:
        values = make([{"params": [nn.Parameter(torch.zeros(1, 1))]}]).defaults
    except Exception as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}") from error
    if not values["lr"] > 0:
        raise UserError(f"{where}.lr={values['lr']}: must be above 0; training.freeze keeps parts as they are")
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{where}.{key}={value}: must be finite")
    return make


def _options(plain: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments common to all trainings."""
    optim = {name: plain["optim"][name] for name in ("warmup", "final", "clip")}
    loop = plain["training"]
    guard = check_values(Guard, loop["guard"], "training.guard")
    return (
        check_values(Training, {name: plain[name] for name in ("updates", "seed")}, "")
        | check_values(Training, optim, "optim")
        | check_values(Training, loop | {"guard": guard}, "training")
    )


def _quieten() -> None:
    """Silence Lightning's warnings about intended settings, its advertising, and what rank 0 logs already."""
    if detect_launch().rank:
        logging.getLogger(list_splits.__module__).setLevel(logging.WARNING)
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    logging.raiseExceptions = False  # a full disk would print a traceback at each line of run.log
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",  # the moving average, and frozen parts
        ".*have no `validation_step`.*",
        ".*manual optimization and every_n_train_steps.*",  # checkpoints follow whole updates
        ".*your dataloader is not resumable.*",  # its sampler is: it starts at the resumed update
        ".*The dirpath has changed.*",
        ".*LeafSpec.*",
        ".*returned a view tensor.*",  # from a sharded codec; no reconstruction is modified in place
    ):
        warnings.filterwarnings("ignore", message)
