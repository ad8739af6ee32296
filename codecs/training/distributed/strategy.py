"""Distributed strategies: data parallelism with a reducer per optimizer, and sharding (FSDP2)."""

import copy
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Annotated, Any

import torch
import torch.distributed as dist
from lightning_utilities.core.apply_func import apply_to_collection
from pytorch_lightning.overrides.distributed import prepare_for_backward
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from varitok import UserError

from ...codec import Codec
from ...distributed import broadcast_from_rank_zero, full_tensor
from ...implicit.codec import ImplicitCodec
from ..activation_checkpointing import blocks

__all__ = ["STRATEGIES", "Parallel", "Sharded", "strategy_of"]


class Parallel(DDPStrategy):
    """Data parallelism (DDP): replicas whose gradients are averaged during the backward pass.

    Codec and discriminator each have a reducer of their own (DistributedDataParallel's, arXiv 2006.15704). It runs in
    that part's own backward pass, and only in the one that completes an update. So the graph of each is the same at
    every update (`static_graph`), whether or not the discriminator has started, is used or skips an update.

    Lightning's DDP wraps the whole training module. The codec's backward pass would then wait for the gradients of a
    discriminator that hasn't started, and fail, after a step that made the replicas differ. It also averages gradients
    of every accumulated batch.

    Args:
        static: Each parameter gets a gradient in every update or in none; otherwise the run ends. If False, unused
            parameters are searched for at each update.
        timeout: Seconds that a process waits for the others in a collective.
        bucket: Megabytes of gradients in an all-reduce; it starts when they are computed.
        in_place: Gradients are views of the buckets: less memory by their size, and a copy less.
    """

    def __init__(
        self, *, static: bool = True, timeout: float = 1800.0, bucket: float = 25.0, in_place: bool = False
    ) -> None:
        unused: dict[str, Any] = {"static_graph": True} if static else {"find_unused_parameters": True}
        buckets: dict[str, Any] = {"bucket_cap_mb": bucket, "gradient_as_bucket_view": in_place}
        super().__init__(**unused, **buckets, timeout=timedelta(seconds=timeout))
        self.static = static
        self.reducers: dict[nn.Module, DistributedDataParallel] = {}
        self.due: nn.Module | None = None  # part whose gradients the next backward pass averages
        self.trained: dict[nn.Module, list[bool]] = {}  # which parameters had a gradient in the first pass

    def configure_ddp(self) -> None:
        """Broadcast rank 0's parameters and buffers, and build each part's reducer."""
        module = self.lightning_module
        assert module is not None
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(broadcast_from_rank_zero(tensor))
        for part in module.parts():  # type: ignore[operator]
            self.watch(part)

    def watch(self, part: nn.Module) -> None:
        """Build a part's reducer; a part without trainable parameters needs none."""
        if any(parameter.requires_grad for parameter in part.parameters()):
            devices = self.determine_ddp_device_ids()
            self.reducers[part] = DistributedDataParallel(part, devices, init_sync=False, **self._ddp_kwargs)

    def expect(self, part: nn.Module, complete: bool) -> None:
        """Announce the part that the next backward pass computes gradients of, and whether it completes an update."""
        # A static graph is recorded in the first pass; accumulating onto averaged gradients and averaging is exact.
        learn = self.static and part not in self.trained
        self.due = part if (complete or learn) and part in self.reducers else None

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare the announced part's reducer; other parts keep their gradients local."""
        if self.due is not None:
            prepare_for_backward(self.reducers[self.due], closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Run the all-reduce that DDP delays in a static graph's first pass; check that the graph stays static.

        Raises:
            UserError: Other parameters have a gradient than in the first pass.
        """
        part, self.due = self.due, None
        if part is None or not self.static:
            return
        there = [parameter.grad is not None for parameter in part.parameters()]
        if part not in self.trained:
            self.reducers[part].reducer._delay_all_reduce()  # type: ignore[attr-defined]
            self.trained[part] = there
        elif there != self.trained[part]:
            raise UserError(
                "trainer.strategy=ddp: some parameters have a gradient in some updates only;"
                " take trainer.strategy=ddp_find_unused_parameters_true"
            )


class Sharded(Parallel):
    """Fully sharded data parallelism (FSDP2) of the codec: parameters, EMA and optimizer state.

    Each block is all-gathered for its computation (`fully_shard`, arXiv 2304.11277), and its gradients are
    reduce-scattered. Buffers, including EMA codebooks, and the discriminator are replicated. Checkpoints are complete
    and the same as without sharding: a run resumes with or without it, on any number of processes.

    Args:
        options: See `Parallel`.
    """

    def configure_ddp(self) -> None:
        """Shard the codec and its EMA block by block; replicate the rest as `Parallel` does.

        Raises:
            UserError: The trained module isn't a codec of signals, a loss term has trainable parameters, or the guard
                rolls back.
        """
        module: Any = self.lightning_module
        codec = module.trained
        if not isinstance(codec, Codec) or isinstance(codec, ImplicitCodec):
            raise UserError("trainer.strategy=fsdp2: neither a prior nor an implicit codec can be sharded; take ddp")
        if any(parameter.requires_grad for parameter in module.objective.terms.parameters()):
            raise UserError("trainer.strategy=fsdp2: not with a loss term that has trainable parameters; take ddp")
        if module.objective.last:
            raise UserError("trainer.strategy=fsdp2: not with objective.adversarial.adaptive; take ddp")
        if module.guard.roll_back:
            raise UserError(
                "training.guard.roll_back: not with trainer.strategy=fsdp2; give training.guard.roll_back=false"
            )
        self.empty = copy.deepcopy(codec)
        for layer in self.empty.modules():
            for name, parameter in layer._parameters.items():
                if parameter is not None:
                    layer._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)
        super().configure_ddp()
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        for part in (codec, *([module.average.codec] if module.average else [])):
            for block in blocks(part):
                fully_shard(block, mesh=mesh)
            fully_shard(part, mesh=mesh)

    def watch(self, part: nn.Module) -> None:
        """Build a reducer for each part but the codec, which FSDP reduces."""
        if part is not self.lightning_module.learning:  # type: ignore[union-attr]
            super().watch(part)

    def assemble(self, sharded: nn.Module) -> nn.Module:
        """Return a complete copy of the codec, or of its EMA, in evaluation mode; every process must call it."""
        copied = copy.deepcopy(self.empty)
        copied.load_state_dict(_whole(sharded.state_dict()), assign=True)
        return copied.eval()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return the complete state dict for a checkpoint on rank 0, empty tensors on the others."""
        return _on_rank_zero(super().lightning_module_state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's complete state for a checkpoint on rank 0, empty tensors on the others."""
        return _on_rank_zero(super().optimizer_state(optimizer))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this process's shards of the optimizers' states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            shares = {index: _share(parameters[index], state) for index, state in saved["state"].items()}
            optimizer.load_state_dict(saved | {"state": shares})


def _share(parameter: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """Shard a parameter's optimizer state like the parameter."""
    if not isinstance(parameter, DTensor):
        return state
    mesh, placements = parameter.device_mesh, parameter.placements
    return {
        name: distribute_tensor(value.to(parameter.device), mesh, placements)
        if isinstance(value, Tensor) and value.shape == parameter.shape
        else value
        for name, value in state.items()
    }


def _whole(state: Any) -> dict[str, Any]:
    """Gather all sharded tensors in nested containers; every process must call it."""
    whole: dict[str, Any] = apply_to_collection(state, Tensor, full_tensor)
    return whole


def _on_rank_zero(state: Any) -> dict[str, Any]:
    """Gather all sharded tensors in nested containers to rank 0's CPU, one after the other; every process must call it.

    All at once, parameters, EMA and optimizer state would take 16 bytes a parameter on each GPU.
    """

    def gather(values: Tensor) -> Tensor:
        if not isinstance(values, DTensor):
            return values
        whole = values.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)

    gathered: dict[str, Any] = apply_to_collection(state, Tensor, gather)
    return gathered


STRATEGIES: dict[str, Callable[..., Parallel]] = {
    "auto": Parallel,
    "ddp": Parallel,
    "ddp_find_unused_parameters_true": partial(Parallel, static=False),
    "fsdp2": Sharded,
}


def strategy_of(
    trainer: dict[str, Any],
    timeout: Annotated[float, "[1, 1e9]"],
    bucket: Annotated[float, "(0, 1e6]"] = 25.0,
    in_place: bool = False,
) -> Strategy | str:
    """Return the strategy for a trainer's arguments; Lightning's own for a single process.

    Args:
        trainer: Lightning's arguments, as configured.
        timeout: Seconds that a process waits for the others in a collective.
        bucket: Megabytes of gradients in an all-reduce.
        in_place: Whether gradients are views of these buckets.

    Raises:
        UserError: There is no such strategy.
    """
    name = trainer.get("strategy", "auto")
    if name not in STRATEGIES:
        raise UserError(f"trainer.strategy={name}: no such strategy; take one of {', '.join(STRATEGIES)}")
    alone = all(trainer.get(key, 1) == 1 for key in ("devices", "num_nodes"))
    return "auto" if name == "auto" and alone else STRATEGIES[name](timeout=timeout, bucket=bucket, in_place=in_place)
