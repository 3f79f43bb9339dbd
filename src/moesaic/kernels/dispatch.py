"""The one door to every kernel: checks, chooses a backend, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import get
from moesaic.core.routing import Dispatch
from moesaic.kernels.weights import Activation, Weights


class Choice(NamedTuple):
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


def choose(x_TD: Tensor, weights: Weights, *, needs_grad: bool | None = None) -> Choice:
    """The backend that `backend="auto"` takes for this input."""
    if needs_grad is None:
        needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weights.needs_grad)
    return Choice("torch", "gradients are needed" if needs_grad else "runs everywhere")


def expert_mlp(
    x_TD: Tensor,
    dispatch: Dispatch,
    gate_up: Tensor,
    down: Tensor,
    *,
    act: str | Activation = "silu",
    gated: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    transposed: bool = False,
    apply_gate: Callable[[Tensor], Tensor] | None = None,
    post: Callable[[Tensor], Tensor] | None = None,
    backend: str = "auto",
) -> Tensor:
    """A bank of MLP experts over a dispatch: y_t = sum over t's pairs of weight * post(down_e(act(gate_e x) * up_e x)).

    Args:
        x_TD: tokens, `[T, D]`, any float dtype; the result has its shape and dtype.
        dispatch: pairs sorted by expert.
        gate_up: `[E, H, D]` with H = 2I when gated, else I; `[E, D, H]` if transposed.
        down: `[E, D, I]`; `[E, I, D]` if transposed.
        act: the name or callable of the activation.
        apply_gate: replaces the default gating: rows `[S, H]` to activations `[S, I]`.
        post: maps each pair's output `[S, D]` before it is weighted.
        backend: "auto" or a registered kernel's name.

    Products run in the weights' dtype (autocast's where it is on); a token's pairs are summed in fp32 or better, in a
    fixed order. Raises BadInput for shapes that do not fit.
    """
    weights = Weights(gate_up, down, act, gated, gate_up_bias, down_bias, transposed, apply_gate, post)
    weights.check(x_TD, dispatch.num_experts)
    if x_TD.shape[0] != dispatch.tokens:
        raise BadInput(f"x holds {x_TD.shape[0]} tokens, the dispatch {dispatch.tokens}")
    name = choose(x_TD, weights).backend if backend == "auto" else backend
    return get("kernels", name).build(x_TD, dispatch, weights)
