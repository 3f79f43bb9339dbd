"""One bank's weights and everything transformers lets an experts module vary: the second argument of every kernel.

Shape legend: E experts, D model width, H inner rows (2I when gated, else I), I expert inner width, S routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moesaic.core.errors import BadInput

Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda h: F.relu(h).square(),
    "sigmoid": torch.sigmoid,
    "identity": lambda h: h,
}


def is_silu(act: str | Activation) -> bool:
    """Whether `act` is SiLU under any of the names it goes by: only SiLU has a hand-written derivative."""
    return act == "silu" or act is F.silu or isinstance(act, nn.SiLU) or type(act).__name__ == "SiLUActivation"


@dataclass(frozen=True, slots=True)
class Form:
    """What an expert does around its two products.

    When `gated`, the first product's rows are [gate, up] and the default gating is act(gate) * up; `apply_gate` replaces
    it (interleaved or clamped gating). `post` maps each pair's output before it is weighted (a norm after the expert).
    """

    act: str | Activation = "silu"
    gated: bool = True
    gate_up_bias_EH: Tensor | None = None
    down_bias_ED: Tensor | None = None
    apply_gate: Callable[[Tensor], Tensor] | None = None
    post: Callable[[Tensor], Tensor] | None = None

    @property
    def swiglu(self) -> bool:
        """Plain SwiGLU with nothing in between: what the fused paths compute."""
        return self.gated and self.apply_gate is None and self.post is None and is_silu(self.act)

    @property
    def may_learn(self) -> bool:
        """Whether a callable of the caller's may hold parameters: such a form needs a path with gradients."""
        learns = isinstance(self.act, nn.Module) and any(p.requires_grad for p in self.act.parameters())
        return learns or self.apply_gate is not None or self.post is not None

    def activate(self, h_SH: Tensor) -> Tensor:
        """The inner activations a [S, I] of the first product's rows."""
        if self.gated and self.apply_gate is not None:
            return self.apply_gate(h_SH)
        act = ACTIVATIONS[self.act] if isinstance(self.act, str) else self.act
        if not self.gated:
            return act(h_SH)
        gate_SI, up_SI = h_SH.chunk(2, dim=-1)
        return act(gate_SI) * up_SI


@dataclass(frozen=True, slots=True)
class Weights:
    """The stacked tensors of a bank: `gate_up` [E, H, D] and `down` [E, D, I], or, when `transposed`, [E, D, H] and
    [E, I, D]. H is 2I when gated, else I."""

    gate_up: Tensor
    down: Tensor
    form: Form = Form()
    transposed: bool = False

    @property
    def num_experts(self) -> int:
        return self.gate_up.shape[0]

    @property
    def inner_rows(self) -> int:
        """H: what one row of the first product holds."""
        return self.gate_up.shape[2 if self.transposed else 1]

    @property
    def model_width(self) -> int:
        return self.gate_up.shape[1 if self.transposed else 2]

    @property
    def inner_width(self) -> int:
        return self.down.shape[1 if self.transposed else 2]

    @property
    def gate_up_EHD(self) -> Tensor:
        return self.gate_up.transpose(1, 2) if self.transposed else self.gate_up

    @property
    def down_EDI(self) -> Tensor:
        return self.down.transpose(1, 2) if self.transposed else self.down

    @property
    def needs_grad(self) -> bool:
        tensors = (self.gate_up, self.down, self.form.gate_up_bias_EH, self.form.down_bias_ED)
        return self.form.may_learn or any(t is not None and t.requires_grad for t in tensors)

    def check(self, x_TD: Tensor, num_experts: int) -> None:
        """Raise BadInput naming the first tensor whose shape does not fit the others."""
        if isinstance(self.form.act, str) and self.form.act not in ACTIVATIONS:
            raise BadInput(f"unknown activation {self.form.act!r}: one of {', '.join(ACTIVATIONS)}, or a callable")
        if self.gate_up.dim() != 3 or self.down.dim() != 3:
            raise BadInput(f"expert weights are 3-D: got gate_up {_shape(self.gate_up)}, down {_shape(self.down)}")
        layout = "[E, D, H]" if self.transposed else "[E, H, D]"
        if x_TD.dim() != 2 or x_TD.shape[1] != self.model_width:
            raise BadInput(
                f"x is {_shape(x_TD)} but gate_up {_shape(self.gate_up)}, read as {layout}, wants [T, {self.model_width}]"
            )
        if self.num_experts != num_experts or self.down.shape[0] != num_experts:
            raise BadInput(f"dispatch over {num_experts} experts; gate_up holds {self.num_experts}, down {self.down.shape[0]}")
        if self.form.gated and self.form.apply_gate is None and self.inner_rows != 2 * self.inner_width:
            raise BadInput(f"gated experts need H = 2I: gate_up gives H {self.inner_rows}, down gives I {self.inner_width}")
        if not self.form.gated and self.inner_rows != self.inner_width:
            raise BadInput(f"experts without a gate need H = I: gate_up gives {self.inner_rows}, down gives {self.inner_width}")
        for name, bias, width in (
            ("gate_up_bias", self.form.gate_up_bias_EH, self.inner_rows),
            ("down_bias", self.form.down_bias_ED, self.model_width),
        ):
            if bias is not None and tuple(bias.shape) != (num_experts, width):
                raise BadInput(f"{name} is {_shape(bias)}, expected [{num_experts}, {width}]")


def compute_dtype(x_TD: Tensor, weights: Weights) -> torch.dtype:
    """The dtype products run in: autocast's where it is on, else the weights' (as transformers' experts do)."""
    device = x_TD.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.gate_up.dtype


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
