"""Random banks and dispatches for the kernel tests, and one function that runs a case and returns all gradients."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels import expert_mlp


def interleaved_clamped_gate(h_SH: Tensor) -> Tensor:
    """gpt-oss's gating: gate and up alternate, both are clamped, and up is shifted by one."""
    gate_SI, up_SI = h_SH[:, ::2].clamp(max=1.5), h_SH[:, 1::2].clamp(-1.5, 1.5)
    return (up_SI + 1) * gate_SI * torch.sigmoid(1.702 * gate_SI)


@dataclass
class Case:
    T: int = 63
    E: int = 3
    K: int = 2
    D: int = 24
    I: int = 16
    dtype: torch.dtype = torch.float32
    routing: str = "random"
    bias: bool = False
    how: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        return self.how.get("device", "cpu")

    def experts_TK(self) -> Tensor:
        if self.routing == "one expert":
            return torch.full((self.T, self.K), self.E - 1)
        if self.routing == "empty slots":
            return torch.randint(-1, self.E + 1, (self.T, self.K))  # -1 and E are both outside
        if self.routing == "no pairs":
            return torch.full((self.T, self.K), -1)
        if self.routing == "half the experts":
            return torch.randint(0, self.E // 2 + 1, (self.T, self.K)) * 2 % self.E
        return torch.rand(self.T, self.E).topk(self.K).indices

    def leaves(self) -> dict[str, Tensor]:
        """Leaves that require grad, the same for the same seed."""
        H = 2 * self.I if self.how.get("gated", True) else self.I
        gate_up, down = torch.randn(self.E, H, self.D) / self.D**0.5, torch.randn(self.E, self.D, self.I) / self.I**0.5
        if self.how.get("transposed"):
            gate_up, down = gate_up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        made = {"x": torch.randn(self.T, self.D), "weights": torch.rand(self.T, self.K), "gate_up": gate_up, "down": down}
        if self.bias:
            made |= {"gate_up_bias": torch.randn(self.E, H), "down_bias": torch.randn(self.E, self.D)}
        return {name: t.to(self.device, self.dtype).requires_grad_() for name, t in made.items()}

    def run(self, backend: str, grad: bool = True) -> dict[str, Tensor]:
        """The output and the gradient of every leaf under a fixed random cotangent."""
        torch.manual_seed(7)
        experts_TK = self.experts_TK().to(self.device)
        leaves = self.leaves()
        how = {k: v for k, v in self.how.items() if k != "device"}
        dispatch = Dispatch.of_slots(experts_TK, leaves["weights"], self.E)
        biases = {k: v for k, v in leaves.items() if k.endswith("bias")}
        with torch.set_grad_enabled(grad):
            y = expert_mlp(leaves["x"], dispatch, leaves["gate_up"], leaves["down"], backend=backend, **biases, **how)
        if not grad:
            return {"y": y}
        if not y.requires_grad:  # the naive twin of no pairs at all touches nothing
            return {"y": y, **{name: torch.zeros_like(leaf) for name, leaf in leaves.items()}}
        grads = torch.autograd.grad(y, list(leaves.values()), torch.randn_like(y))
        return {"y": y, **dict(zip(leaves, grads, strict=True))}


def relative_error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||, or ||got|| where want is zero."""
    got, want = got.detach().double(), want.detach().double()
    scale = want.norm()
    return float((got - want).norm() / scale) if scale > 0 else float(got.norm())


SHAPES = [
    {"T": 1},
    {"T": 1, "E": 64, "K": 8},
    {"T": 63, "K": 1},
    {"T": 63, "E": 64, "K": 4},
    {"T": 1000, "E": 3, "K": 2, "D": 40, "I": 24},
    {"T": 1000, "E": 64, "K": 8, "D": 33, "I": 17},
    {"routing": "one expert"},
    {"T": 1000, "E": 64, "routing": "one expert", "K": 1},
    {"routing": "empty slots"},
    {"routing": "half the experts", "E": 64},
    {"routing": "no pairs"},
]
"""Awkward sizes and routings; D and I that are not multiples of anything a kernel likes."""

FORMS = [
    {"bias": True},
    {"how": {"transposed": True}},
    {"bias": True, "how": {"transposed": True}},
    {"how": {"act": "gelu"}},
    {"bias": True, "how": {"gated": False, "act": "relu2"}},
    {"how": {"gated": False, "act": torch.tanh, "transposed": True}},
    {"bias": True, "how": {"apply_gate": interleaved_clamped_gate, "transposed": True}},
    {"how": {"post": lambda y_SD: torch.nn.functional.rms_norm(y_SD, y_SD.shape[-1:])}},
]
"""Every way in which transformers lets an experts module differ."""


def names(case: dict[str, Any]) -> str:
    words = [f"{k}={v}" for k, v in case.items() if k != "how"]
    return "-".join(words + [f"{k}={getattr(v, '__name__', v)}" for k, v in case.get("how", {}).items()])
