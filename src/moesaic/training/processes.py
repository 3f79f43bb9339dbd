"""The processes of a run under torchrun: which one this is, and the few numbers that all must agree on."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moesaic.core.errors import BadInput


@dataclass(frozen=True)
class Processes:
    """This process among `world`; without torchrun the only one, and every method is then free of communication."""

    rank: int = 0
    world: int = 1

    @classmethod
    def join(cls, device: str) -> tuple[Processes, str]:
        """Join the group that torchrun describes; returns it and the device of this process (its own GPU on cuda).

        gloo on a CPU, nccl on cuda. Raises BadInput for a world that cannot be joined.
        """
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1:
            return cls(), device
        kind = torch.device(device).type
        if kind == "cuda":
            device = f"cuda:{int(os.environ.get('LOCAL_RANK', '0'))}"
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            try:
                dist.init_process_group("nccl" if kind == "cuda" else "gloo")
            except (RuntimeError, ValueError) as error:
                raise BadInput(f"torchrun: this process cannot join the other {world - 1} ({error})") from error
        return cls(dist.get_rank(), dist.get_world_size()), device

    @property
    def first(self) -> bool:
        """The one that writes."""
        return self.rank == 0

    def mean(self, values: list[float], device: str = "cpu") -> list[float]:
        """The mean of every number over the processes, in float64."""
        return values if self.world == 1 else [value / self.world for value in self.sum(values, device)]

    def sum(self, values: list[float], device: str = "cpu") -> list[float]:
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.tolist()

    def leave(self) -> None:
        """Nothing is left to say to the others: all leave together, or a group would end under one that still uses it."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def wait(self) -> None:
        """Until all have come here."""
        if self.world > 1:
            dist.barrier()
