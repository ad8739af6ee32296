"""What has started a process, told by its environment, and what the trainer makes of it."""

import pytest
from omegaconf import OmegaConf

from varitok import UserError
from varitok.codecs.training.config import launch
from varitok.codecs.training.config.launch import Launch, detect_launch, match_launch

TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train"}
SUBMITIT = {"SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1", "SUBMITIT_LOCAL_JOB_ID": "123456_7"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Launch("", 0, 1, 1)),
        (TORCHRUN, Launch("torchrun", 5, 8, 2, 1)),
        (SRUN | {"SLURM_LOCALID": "1"}, Launch("srun", 3, 4, 2, 1)),
        (SRUN | TORCHRUN, Launch("torchrun", 5, 8, 2, 1)),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, Launch()),
        ({"SLURM_JOB_ID": "77"}, Launch()),
        (SUBMITIT, Launch("submitit", 1, 2, 1, 1)),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, Launch("", 1, local=1)),
        ({"NODE_RANK": "1", "LOCAL_RANK": "0"}, Launch("", 1)),
    ],
)
def test_a_process_knows_its_place(environment, expected):
    assert detect_launch(environment) == expected


def followed(monkeypatch, environment, sweep="", **trainer):
    monkeypatch.setattr(launch.os, "environ", dict(environment))
    monkeypatch.setattr(launch, "detect_launch", lambda: detect_launch(environment))
    config = OmegaConf.create({"devices": 1} | trainer)
    OmegaConf.set_struct(config, True)
    match_launch(config, sweep)
    return OmegaConf.to_container(config), launch.os.environ


def test_the_trainer_has_the_processes_that_were_started(monkeypatch):
    assert followed(monkeypatch, TORCHRUN)[0] == {"devices": 4, "num_nodes": 2}
    assert followed(monkeypatch, TORCHRUN, devices=-1)[0] == {"devices": 4, "num_nodes": 2}
    trainer, environment = followed(monkeypatch, SRUN)
    assert trainer == {"devices": 2, "num_nodes": 2} and environment["SLURM_NTASKS_PER_NODE"] == "2"
    trainer, environment = followed(monkeypatch, SUBMITIT, "submitit_local")
    assert trainer == {"devices": 2, "num_nodes": 1}
    assert environment["LOCAL_RANK"] == "1" and environment["MASTER_PORT"] == "18456"
    assert followed(monkeypatch, {}, devices=2)[0] == {"devices": 2}


@pytest.mark.parametrize(
    ("environment", "sweep", "devices", "told"),
    [
        (TORCHRUN, "", 2, r"trainer\.devices=2: torchrun has started 4; give trainer\.devices=1"),
        (TORCHRUN, "basic", 1, r"trainer\.devices=8: a sweep trains on one device"),
        ({}, "basic", 2, r"trainer\.devices=2: a sweep trains on one device.*hydra\.launcher\.tasks_per_node"),
        ({}, "submitit_slurm", 2, r"trainer\.devices=2: a sweep trains on one device.*hydra\.launcher\.tasks_per_node"),
    ],
)
def test_what_does_not_fit_is_told(monkeypatch, environment, sweep, devices, told):
    with pytest.raises(UserError, match=told):
        followed(monkeypatch, environment, sweep, devices=devices)
