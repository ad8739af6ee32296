"""Construction of a run's trainer, training module and data from its configuration."""

import logging
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytorch_lightning as pl
from lightning_fabric.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.accelerators import CPUAccelerator

from varitok import UserError, require_min
from varitok.data.datamodule import DataModule
from varitok.data.storage.listing import list_splits

from ..build import build, build_codec, checkpoint_of, misfit, read_checkpoint
from ..implicit.codec import ImplicitCodec
from .base import Training
from .callbacks.checkpoints import Checkpoints, WholeFiles
from .callbacks.progress import Progress
from .callbacks.stopping import Stopping
from .config.launch import detect_launch
from .config.locations import with_absolute_paths
from .distributed.strategy import strategy_of
from .distributed.watchdog import Watchdog
from .implicit import ClipTraining
from .malloc import keep_freed_memory
from .module import CodecTraining
from .prior import PriorTraining
from .resume import check_resume, find_checkpoint

__all__ = ["Run", "build_run"]

# Not float16: codes are computed in float32, and gradient scaling would not cover every optimizer step.
PRECISIONS = ("32-true", "bf16-mixed")


class Run(NamedTuple):
    """The arguments of `trainer.fit`.

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


def build_run(config: DictConfig, folder: Path) -> Run:
    """Build a run's trainer, module and data, in the order in which mistakes are found fastest.

    >>> import hydra
    >>> with hydra.initialize_config_module("varitok.configs", version_base="1.3"):
    ...     config = hydra.compose("train", ["experiment=image/demo", "updates=2", "export=none"])
    >>> config.callbacks = {}  # neither samples nor evaluation
    >>> config.trainer.enable_progress_bar = False
    >>> run = build_run(config, Path("run"))
    >>> run.trainer.fit(run.module, run.data)
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
    pl.seed_everything(config.seed, workers=True, verbose=False)
    loop = config.training
    require_min({"training.log_every": (loop.log_every, 1), "processes.timeout": (config.processes.timeout, 1)})
    resume = find_checkpoint(config.resume, folder)
    data = DataModule(
        build(config.data),
        **plain["loader"],
        features=_features(plain),
        updates=config.updates,
        accumulate=loop.accumulate,
        seed=config.seed,
    )
    module = (
        _prior_training(config, plain) if OmegaConf.select(config, "prior") else _codec_training(config, plain, data)
    )
    stored = with_absolute_paths(plain)  # once data is there, which may have been downloaded
    if resume:
        check_resume(resume, module, stored)
    loggers = [build(entry, folder=str(folder)) for entry in config.logger.values() if entry]
    for logger in loggers:
        logger.log_hyperparams(plain)
    files = WholeFiles()
    checkpoints = Checkpoints(stored, files, **plain["checkpoint"])
    callbacks: list[pl.Callback] = [Progress()] if config.trainer.enable_progress_bar else []
    callbacks += [build(entry) for entry in (*config.callbacks.values(), config.export) if entry]
    callbacks += [Watchdog(plain["processes"]["silence"]), Stopping(checkpoints), checkpoints]
    trainer = _trainer(plain, logger=loggers, callbacks=callbacks, default_root_dir=folder, plugins=[files])
    if isinstance(trainer.accelerator, CPUAccelerator):
        keep_freed_memory()
    return Run(trainer, module, data, None if resume is None else str(resume))


def _trainer(plain: dict[str, Any], **parts: Any) -> pl.Trainer:
    """Build Lightning's trainer; refuse arguments that are wrong, or impossible on this machine."""
    arguments = plain["trainer"]
    if (precision := arguments.get("precision", PRECISIONS[0])) not in PRECISIONS:
        raise UserError(f"trainer.precision={precision}: not supported; take {' or '.join(PRECISIONS)}")
    strategy = strategy_of(arguments, plain["processes"]["timeout"])
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


def _codec_training(config: DictConfig, plain: dict[str, Any], data: DataModule) -> CodecTraining:
    codec = build_codec(config)
    if not codec.bounded:
        for name in ("mean", "deviation"):
            codec.get_buffer(f"feature_{name}").copy_(getattr(data.splits.train, name).flatten())
    if config.init_from:
        state, _ = read_checkpoint(checkpoint_of(str(config.init_from)))
        if odd := misfit(state, codec.state_dict()):
            raise UserError(f"init_from={config.init_from}: its codec isn't the one that this run builds ({odd})")
        codec.load_state_dict(state)
    training = ClipTraining if isinstance(codec, ImplicitCodec) else CodecTraining
    return training(
        codec,
        build(config.objective),
        optimizer=build(config.optim.codec),
        discriminator_optimizer=build(config.optim.discriminator),
        freeze=plain["training"]["freeze"],
        **_options(config, plain),
    )


def _prior_training(config: DictConfig, plain: dict[str, Any]) -> PriorTraining:
    source = build(config.prior.source)
    prior = build(config.prior.network, sizes=source.sizes, places=source.places, sources=source.sources)
    return PriorTraining(prior, source, optimizer=build(config.optim.codec), **_options(config, plain))


def _options(config: DictConfig, plain: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments common to all trainings."""
    optim = {name: config.optim[name] for name in ("warmup", "final", "clip")}
    names = ("accumulate", "ema_decay", "compile", "activation_checkpointing", "guard", "log_every")
    loop = {name: plain["training"][name] for name in names}
    return {"updates": config.updates, "seed": config.seed, **optim, **loop}


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
