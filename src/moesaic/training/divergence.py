"""When a run has gone wrong: numbers that are not numbers, and losses that rise and stay; and which tensor began it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn


class DivergenceRule(BaseModel):
    """When training counts as diverged. Smoothed values are means over about `1 / (1 - SMOOTH)` steps."""

    model_config = ConfigDict(extra="forbid")

    loss_rise: float = Field(default=1.5, gt=0, description="nats by which the loss exceeds the lowest smoothed loss so far")
    grad_ratio: float = Field(default=1000.0, gt=1, description="times the smoothed gradient norm")
    patience: int = Field(default=25, gt=0, description="steps in a row of either")


SMOOTH = 0.95


class Watch:
    """Told loss and gradient norm of every step; `why` is empty until the run has diverged.

    A step in doubt (above a limit) does not enter the smoothed values, and while a run is in doubt nothing should take the
    place of an older checkpoint. `state` and `restore` make a resumed run decide as the whole one would.
    """

    def __init__(self, rule: DivergenceRule) -> None:
        self.rule = rule
        self.mass = self.loss = self.norm = 0.0
        self.lowest = math.inf
        self.doubts = 0
        self.since = -1

    def told(self, step: int, loss: float, norm: float) -> str:
        """Why the run has diverged; "" while it has not."""
        mean = self.norm / self.mass if self.mass else norm
        risen = loss > self.lowest + self.rule.loss_rise
        burst = self.mass > 0.5 and norm > self.rule.grad_ratio * mean
        if not (risen or burst):
            self.doubts = 0
            self.mass = SMOOTH * self.mass + 1 - SMOOTH
            self.loss = SMOOTH * self.loss + (1 - SMOOTH) * loss
            self.norm = SMOOTH * self.norm + (1 - SMOOTH) * norm
            self.lowest = min(self.lowest, self.loss / self.mass)
            return ""
        self.since = step if self.doubts == 0 else self.since
        self.doubts += 1
        if self.doubts < self.rule.patience:
            return ""
        if risen:
            return f"loss {loss:.3f}, lowest before {self.lowest:.3f}, for {self.doubts} steps from step {self.since}"
        return f"gradient norm {norm:.3g}, usual {mean:.3g}, for {self.doubts} steps from step {self.since}"

    @property
    def in_doubt(self) -> bool:
        return self.doubts > 0

    def state(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in ("mass", "loss", "norm", "doubts", "since")}
        return {**kept, "lowest": self.lowest if math.isfinite(self.lowest) else None}

    def restore(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, math.inf if value is None else value)


def bad_gradient(model: nn.Module) -> str:
    """The first parameter whose gradient is not finite, in words; "" when all are."""
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if grad is not None and not _finite(grad):
            return f"the gradient of {name} has {_count(grad)} of {grad.numel()} entries that are not finite"
    return ""


def bad_parameter(model: nn.Module) -> str:
    """The first parameter or buffer that is not finite, in words; "" when all are."""
    for name, parameter in model.named_parameters():
        if not _finite(parameter):
            return f"{name} has {_count(parameter)} of {parameter.numel()} entries that are not finite"
    for name, buffer in model.named_buffers():  # which may hold infinities on purpose, such as a mask added to scores
        if buffer.is_floating_point() and buffer.isnan().any():
            return f"{name} holds NaN"
    return ""


def bad_output(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The first module whose output is not finite when `forward` runs once more, in words; "" when none is."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple | list) else (output,)
        for tensor in tensors:
            if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.isnan().any():
                found.append(f"the output of {names[module] or 'the model'} is not finite first")

    handles = [module.register_forward_hook(look) for module in names]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(_local(tensor)).all())


def _count(tensor: Tensor) -> int:
    return int((~torch.isfinite(_local(tensor))).sum())


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
