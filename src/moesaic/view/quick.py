"""`quicken(model)`: faster decoding steps on a CPU, for any architecture, from what its modules are.

Plain linear layers take the compiled product for few rows; norms do if trials show that they compute what the compiled
norm computes. Modules keep their parameters, names and hooks; only their class becomes a subclass of what it was. With
gradients, with more rows or in another dtype they do what they did.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels import attention
from moesaic.kernels.linear import few_rows_linear, few_rows_norm, suits_linear
from moesaic.view.quick_attention import quicken_attention
from moesaic.view.quick_router import quicken_router
from moesaic.view.quick_stack import quicken_stack

TRIALS = 4
ROUNDINGS = 2.0**-6
"""Two roundings of a bf16 number, which sums in another order may turn the other way."""


class QuickLinear(nn.Linear):
    """A linear layer that reads its matrix once for a row or four."""

    def forward(self, input: Tensor) -> Tensor:
        return few_rows_linear(input, self.weight, self.bias)


def _quick_norm(norm_class: Any, eps_name: str) -> Any:
    own = norm_class.forward

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        made = None if args or kwargs else few_rows_norm(hidden_states, self.weight, getattr(self, eps_name))
        return own(self, hidden_states, *args, **kwargs) if made is None else made

    return type(norm_class.__name__, (norm_class,), {"forward": forward, "__module__": norm_class.__module__, "quick": True})


def quicken(model: nn.Module) -> dict[str, int]:
    """Give a model on the CPU its quick modules; returns how many of each kind. Doing it twice changes nothing more."""
    made = {"linear": 0, "norm": 0, "attention": int(_quick_attention(model))}
    quick_norms: dict[type, type] = {}
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.device.type == "cpu" and suits_linear(module.weight):
            module.__class__ = QuickLinear
            made["linear"] += 1
        elif (eps := _norm_eps(module)) is not None:
            own = type(module)
            module.__class__ = quick_norms[own] = quick_norms.get(own) or _quick_norm(own, eps)
            made["norm"] += 1
    made["router"] = sum(quicken_router(module) for module in model.modules() if hasattr(module, "top_k"))
    if getattr(getattr(model, "config", None), "_attn_implementation", None) == attention.NAME:
        made["step"] = sum(quicken_attention(module) for module in model.modules() if hasattr(module, "layer_idx"))
    made["stack"] = int(quicken_stack(model))
    return made


def _quick_attention(model: Any) -> bool:
    """Only in place of sdpa, which it falls back to, and where the model lets its attention be chosen."""
    config = getattr(model, "config", None)
    if getattr(config, "_attn_implementation", None) != "sdpa" or not hasattr(model, "set_attn_implementation"):
        return False
    attention.register()
    try:
        model.set_attn_implementation(attention.NAME)
    except (ValueError, NotImplementedError, ImportError):
        return False
    return model.config._attn_implementation == attention.NAME


def _norm_eps(module: nn.Module) -> str | None:
    """The name of the module's epsilon if it is a root mean square norm as the compiled one is; shown by trial."""
    weight = getattr(module, "weight", None)
    if getattr(module, "quick", False):
        return None
    names = [name for name in ("variance_epsilon", "eps") if isinstance(getattr(module, name, None), float)]
    if not names or not isinstance(weight, Tensor) or weight.dim() != 1 or [*module.parameters()] != [weight]:
        return None
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16 or "." in type(module).__qualname__:
        return None
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for trial in range(TRIALS):
            x = (torch.randn(1, 1, weight.shape[0], generator=random) * 10.0 ** (trial - 2)).bfloat16()
            try:
                want = module(x)
            except (RuntimeError, TypeError, ValueError):
                return None
            got = few_rows_norm(x, weight, getattr(module, names[0]))
            if got is None or not isinstance(want, Tensor) or not torch.allclose(got, want, rtol=ROUNDINGS, atol=0):
                return None
    return names[0]
