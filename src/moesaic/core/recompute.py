"""Forward passes that run twice: activation checkpointing repeats them inside the backward pass."""

from __future__ import annotations

import torch


def recomputing() -> bool:
    """True inside a backward pass: a forward that runs there is activation recomputation and must not count again."""
    return torch._C._current_graph_task_id() != -1
