"""Sums over the processes of a data-parallel run; on one process, nothing."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor


def world(group: Any = None) -> int:
    """How many processes hold different tokens: 1 without torch.distributed."""
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(value: Tensor, group: Any = None) -> Tensor:
    """The sum of `value` over the group (all processes by default), detached; `value` itself when there is one process.

    A collective: every process of the group must call it, in the same order.
    """
    if world(group) == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total, group=group)
    return total
