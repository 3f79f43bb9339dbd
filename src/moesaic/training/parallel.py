"""Data-parallel training of one objective: DDP, or FSDP2, which also cuts weights and moments into shards.

Both average gradients over processes, so that a recipe's batch is the same whatever their number. Tensors are made whole
before they are written, and cut when they are read: a checkpoint knows nothing of how many processes made it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.training.processes import Processes

Kind = Literal["ddp", "fsdp"]


class Objective(nn.Module):
    """The model with what is computed of it, as one module: what DDP and FSDP hook into."""

    def __init__(self, model: nn.Module, loss: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model
        self._loss = [loss]  # in a list: a bound method of the trainer, not a part of this module

    def forward(self, *args: Any) -> Any:
        return self._loss[0](*args)


def spread(model: Any, loss: Callable[..., Any], kind: Kind, processes: Processes, device: str) -> Callable[..., Any]:
    """`loss` over the processes. With FSDP the parameters of `model` are shards afterwards: make the optimiser later."""
    if processes.world == 1:
        return loss
    if kind == "fsdp":
        return _sharded(Objective(model, loss), model, processes, device)
    from torch.nn.parallel import DistributedDataParallel

    # An expert that no token of this process chose has no gradient here, and may have one elsewhere.
    return DistributedDataParallel(Objective(model, loss), broadcast_buffers=False, find_unused_parameters=True)


def _sharded(objective: Objective, model: Any, processes: Processes, device: str) -> Callable[..., Any]:
    """Block by block where blocks share no parameter, else as a whole: a shared one would be cut twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(torch.device(device).type, (processes.world,))
    blocks: Any = getattr(model.get_decoder(), "layers", None) or []
    uses = Counter(id(parameter) for block in blocks for parameter in block.parameters())
    if all(count == 1 for count in uses.values()):
        for block in blocks:
            fully_shard(block, mesh=mesh)
    fully_shard(objective, mesh=mesh)
    return objective


@contextmanager
def gathering(objective: Any, last: bool) -> Iterator[None]:
    """Of several micro-steps only the last one's backward talks to the other processes."""
    if last or not isinstance(objective, nn.Module):
        yield
    elif hasattr(objective, "no_sync"):
        with objective.no_sync():  # type: ignore[operator]
            yield
    else:
        objective.set_requires_gradient_sync(False)  # type: ignore[operator]
        try:
            yield
        finally:
            objective.set_requires_gradient_sync(True)  # type: ignore[operator]


@torch.no_grad()
def agree_on_buffers(model: nn.Module, processes: Processes) -> None:
    """Average what controllers and running means hold, each having seen its own tokens."""
    if processes.world > 1:
        for buffer in model.buffers():
            if buffer.is_floating_point():
                dist.all_reduce(buffer)
                buffer.div_(processes.world)


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or what its shards make together. A collective."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """`tensor` as `like` is kept: itself, or this process's shard of it. Every process holds the whole."""
    if not hasattr(like, "placements") or tensor.shape != like.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def random_states(device: str, processes: Processes) -> dict[str, Tensor]:
    """The random state of every process, by name. A collective."""
    own = {"rng": torch.get_rng_state()}
    if torch.device(device).type == "cuda":
        own["rng_cuda"] = torch.cuda.get_rng_state()
    if processes.world == 1:
        return own
    states: dict[str, Tensor] = {}
    for name, state in own.items():
        there = state.to(device)
        parts = [torch.empty_like(there) for _ in range(processes.world)]
        dist.all_gather(parts, there)
        states |= {name if rank == 0 else f"{name}_of_{rank}": part.cpu() for rank, part in enumerate(parts)}
    return states
