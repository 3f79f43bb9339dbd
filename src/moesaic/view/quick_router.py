"""Router modules whose decoding step runs as one pass (kernels/route.py), found by what they are and by trial.

A module qualifies if all it holds is a matrix [E, D] and it returns (logits [1, E], weights [1, K], ids [1, K]) as a softmax
top-k router does, normalised or not. Its class becomes a subclass of what it was; more tokens, gradients or another dtype
go to its own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moesaic.kernels.route import softmax_topk, suits

TRIALS = 3
TOLERANCE = 2.0**-6


def quicken_router(module: Any) -> bool:
    """Give a router its quick step; False where it has none, or has it already."""
    weight, k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or not isinstance(k, int) or [*module.parameters()] != [weight] or [*module.buffers()]:
        return False
    if quick_convention(module) is not None or not suits(weight, k):
        return False
    found = next((normalise for normalise in (False, True) if _same(module, k, normalise)), None)
    if found is None:
        return False
    own, normalise = type(module), found

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if (
            x is None
            or x.dtype is not torch.bfloat16
            or x.numel() != self.weight.shape[1]
            or not x.is_cpu
            or torch.is_grad_enabled()
            or torch.compiler.is_compiling()
            or torch._C._is_torch_function_mode_enabled()  # a policy changes what the module's own selection sees
        ):
            return own.forward(self, *args, **kwargs)
        logits_1E, weights_1K, ids_1K = softmax_topk(x, self.weight, self.top_k, normalise)
        return logits_1E, weights_1K.to(self.quick[1]), ids_1K

    kind = {"forward": forward, "__module__": own.__module__, "__qualname__": own.__qualname__}
    module.quick = normalise, _own(module, torch.zeros(1, weight.shape[1], dtype=torch.bfloat16))[1].dtype
    module.__class__ = type(own.__name__, (own,), kind)
    return True


def quick_convention(module: Any) -> tuple[bool, torch.dtype] | None:
    """Whether a quick router normalises, and the dtype of its weights; None of another module."""
    return getattr(module, "quick", None)


def _own(module: Any, x_1D: Tensor) -> tuple[Tensor, ...]:
    with torch.inference_mode():
        return module(x_1D)


def _same(module: Any, k: int, normalise: bool) -> bool:
    random = torch.Generator().manual_seed(0)
    for _ in range(TRIALS):
        x_1D = torch.randn(1, module.weight.shape[1], generator=random).bfloat16()
        try:
            made = _own(module, x_1D)
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError):
            return False
        with torch.no_grad():
            want = softmax_topk(x_1D, module.weight.detach(), k, normalise)
        if not isinstance(made, tuple) or len(made) != 3 or not all(isinstance(part, Tensor) for part in made):
            return False
        if [part.shape for part in made] != [part.shape for part in want] or made[2].dtype is not torch.int64:
            return False
        if made[0].dtype is not torch.bfloat16 or not _near(made[0], want[0]) or not _near(made[1], want[1]):
            return False
        # Nearly equal logits may change places in another order of summing: their weights are as near.
        if not _near(made[0].gather(1, made[2]), want[0].gather(1, want[2])):
            return False
    return True


def _near(got: Tensor, want: Tensor) -> bool:
    return bool((got.float() - want.float()).norm() <= TOLERANCE * want.float().norm())
