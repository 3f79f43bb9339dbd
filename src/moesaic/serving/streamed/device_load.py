"""Put a device over a model's experts: one that streams from disk, or one that is loaded in host memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.serving.streamed import budget
from moesaic.serving.streamed.below import Below, Disk, Memory
from moesaic.serving.streamed.device_tier import DeviceTier
from moesaic.serving.streamed.devices import Device, device_of
from moesaic.trace import sweep
from moesaic.trace.hardware import Hardware
from moesaic.trace.policies.history import History
from moesaic.trace.policies.policy import Policy, Shape
from moesaic.view import View

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine


def over_disk(view: View, engine: Engine, device: str | Device, memory: int | str, **how: Any) -> DeviceTier:
    """A device over a streaming engine; `how` as in `over_memory`."""
    return _tier(view, Disk(engine), device, memory, **how)


def over_memory(
    model: Any,
    device: str | Device,
    memory: int | str,
    *,
    policy: str | Policy = "lru",
    history: History | None = None,
    hardware: Hardware | None = None,
) -> DeviceTier:
    """Move a model in host memory to a device, but for its experts, which pass through `memory` bytes there.

    Args:
        model: loaded with `experts="moesaic"`, on the CPU; its experts stay in its own parameters.
        device: "cuda", "cuda:1", "stand-in", or a built one.
        policy, history: what the device keeps, and who computes what it misses.
        hardware: the machine as that policy is to see it; None: measured, where it matters.

    Raises BadInput for a budget too small, or a policy that needs what a running model cannot give.
    """
    return _tier(View(model), Memory(View(model)), device, memory, policy=policy, history=history, hardware=hardware)


def _tier(
    view: View,
    below: Below,
    device: str | Device,
    memory: int | str,
    *,
    policy: str | Policy = "lru",
    history: History | None = None,
    hardware: Hardware | None = None,
) -> DeviceTier:
    built = sweep.build(policy, option="--device-policy") if isinstance(policy, str) else policy
    if not built.exact:
        raise BadInput(f"policy {built.entry.name} changes the model, which must be trained for it: replay it")
    if history is not None and built.learns:
        built.learn(history)
    blocks = list(view)
    shape = Shape(
        np.array([block.num_experts for block in blocks], np.int64),
        np.array([block.expert_bytes for block in blocks], np.int64),
        max(block.top_k for block in blocks),
    )
    given = budget.budget_of(shape.total_bytes, memory, None)
    plan = budget.divide(given, shape.total_bytes, sorted(set(shape.bytes_L.tolist())))
    upper = device_of(device)
    try:
        return DeviceTier(view, below, upper, built, plan, shape, hardware)
    except BaseException:
        upper.close()
        raise
