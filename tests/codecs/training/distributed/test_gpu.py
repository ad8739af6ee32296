"""Two processes on one GPU are one and learn what one process learns; a sharded run ends with its bundle.

NCCL refuses two processes on one GPU. gloo takes tensors of GPUs, and as "cuda:gloo" no others, as NCCL does.
"""

import torch

from varitok.codecs.distributed import full_tensor
from varitok.codecs.precision import allow_tf32
from varitok.codecs.training.distributed.strategy import Parallel
from varitok.codecs.training.run import build_run

from ....devices import on_devices
from .processes import in_processes
from .test_strategy import CASES, CONSTANT, SHARDED, compose

CHOSEN = ("gan", "accumulated")
ALLOWED = {"cpu": 2e-4, "cuda": 2e-3}  # kernels differ with the size of a batch


def fit(folder, device, *words):
    """Train; return the state that the run ends with."""
    run = build_run(compose(f"trainer.accelerator={device}", "trainer.precision=32-true", *words), folder)
    allow_tf32(False)  # whose rounding would differ with the size of a batch
    run.trainer.fit(run.module, run.data)
    if SHARDED in words:
        return {}  # moved to the CPU by now, where NCCL gathers nothing
    return {name: full_tensor(value).cpu() for name, value in run.module.state_dict().items()}


def fit_all(rank, folder, device):
    """Train each case as one of two nodes, which share a device."""
    if device == "cuda":
        Parallel._get_process_group_backend = lambda self: "cuda:gloo"
    two = ["trainer.devices=1", "+trainer.num_nodes=2", "trainer.strategy=ddp"]
    return {name: fit(folder / name, device, *two, *CASES[name]) for name in CHOSEN}


@on_devices
def test_two_processes_on_one_device_stay_one_and_learn_what_one_learns(device, tmp_path, record_property):
    first, second = in_processes(fit_all, tmp_path, device, nodes=2)
    for name in CHOSEN:
        alone = fit(tmp_path / f"{name}_alone", device, *CASES[name], "loader.batch_size=6")
        differ = [key for key, value in first[name].items() if not torch.equal(value, second[name][key])]
        record_property(f"{name}, tensors in which the processes differ", len(differ))
        assert not differ
        away = max((value.double() - alone[key].double()).abs().max().item() for key, value in first[name].items())
        record_property(f"{name}, largest difference from one process", away)
        for key, value in first[name].items():
            torch.testing.assert_close(
                value,
                alone[key],
                atol=ALLOWED[device],
                rtol=5 * ALLOWED[device],
                msg=lambda text, key=key: f"{key}: {text}",
            )


def fit_sharded(rank, folder, device):
    return fit(folder, device, *CASES["sharded"], *CONSTANT, "export=bundle", "export.formats=[safetensors]")


@on_devices
def test_a_sharded_run_ends_with_its_bundle(device, tmp_path):
    """On a GPU by NCCL, whose collectives take no tensor of the CPU."""
    in_processes(fit_sharded, tmp_path, device, count=1)
    assert (tmp_path / "checkpoints/last.ckpt").is_file()
    assert (tmp_path / "bundle/model.safetensors").is_file()
