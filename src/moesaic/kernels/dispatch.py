"""The one door to every kernel: checks, chooses a backend, and says why."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import get
from moesaic.core.routing import Dispatch
from moesaic.kernels import few_rows, many_rows
from moesaic.kernels.packing import PackedBank, budget_reason
from moesaic.kernels.slots import dispatch_slots
from moesaic.kernels.weights import Activation, Form, Weights, compute_dtype


class Choice(NamedTuple):
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


def choose(x_TD: Tensor, weights: Weights, *, needs_grad: bool | None = None) -> Choice:
    """The backend that `backend="auto"` takes for this input."""
    device = x_TD.device.type
    if needs_grad is None:
        needs_grad = torch.is_grad_enabled() and (x_TD.requires_grad or weights.needs_grad)
    if device == "cuda":
        from moesaic.kernels import triton

        missing = triton.missing(weights, compute_dtype(x_TD, weights))
        return (
            Choice("torch", f"no Triton path: {missing}") if missing else Choice("triton", "fused grouped products on the GPU")
        )
    if device == "cpu" and not needs_grad:
        dtype = compute_dtype(x_TD, weights)
        if many_rows.suits(weights, dtype):
            return Choice("cpu", "inference on a CPU; compiled passes over the weights as stored")
        few = "a compiled pass for a few rows per expert, else " if few_rows.suits(weights, dtype) else ""
        return Choice("cpu", f"inference on a CPU; {few}{budget_reason(weights, dtype)}")
    return Choice("torch", "gradients are needed" if needs_grad else f"no path of its own for {device}")


def explain(weights: Weights, *, device: str = "cpu", training: bool = False) -> str:
    """One line for people: which backend runs these weights on that device, and why."""
    probe_TD = torch.empty(1, weights.model_width, dtype=weights.gate_up.dtype, device=device)
    backend, reason = choose(probe_TD, weights, needs_grad=training)
    return f"{backend}: {reason}"


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
    packed: PackedBank | None = None,
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
        packed: a bank made by `pack` from these weights, for inference on a CPU; it follows changes of the weights.

    Products run in the weights' dtype (autocast's where it is on); a token's pairs are summed in fp32 or better, in a
    fixed order. Raises BadInput for shapes that do not fit.
    """
    weights = Weights(gate_up, down, Form(act, gated, gate_up_bias, down_bias, apply_gate, post), transposed)
    weights.check(x_TD, dispatch.num_experts)
    if x_TD.shape[0] != dispatch.tokens:
        raise BadInput(f"x holds {x_TD.shape[0]} tokens, the dispatch {dispatch.tokens}")
    grad = torch.is_grad_enabled() and (x_TD.requires_grad or dispatch.weight_S.requires_grad or weights.needs_grad)
    name = choose(x_TD, weights, needs_grad=grad).backend if backend == "auto" else backend
    if name == "cpu":
        if grad and backend == "cpu":
            raise BadInput("the cpu kernel has no backward: use backend='auto' or 'torch', or run under torch.no_grad()")
        if packed is not None:
            from moesaic.kernels.cpu import best

            packed.follow(gate_up, down)
            return best(x_TD, dispatch, weights, packed)
    return get("kernels", name).build(x_TD, dispatch, weights)


def expert_mlp_slots(x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up: Tensor, down: Tensor, **how) -> Tensor:
    """`expert_mlp` from the pair of tensors a transformers block hands to its experts; ids outside [0, E) are empty."""
    return expert_mlp(x_TD, dispatch_slots(experts_TK, weights_TK, gate_up.shape[0]), gate_up, down, **how)


def expert_mlp_stored(
    x_TD: Tensor,
    dispatch: Dispatch,
    store,
    *,
    act: str | Activation = "silu",
    gated: bool = True,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    apply_gate: Callable[[Tensor], Tensor] | None = None,
    post: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Inference on a CPU from a store that has no stacked tensors: a packed bank whose source is gone,
    experts streamed from elsewhere (anything with `dtype`, `ready`, `first` and `second`, see `cpu.Store`)."""
    from moesaic.kernels.cpu import run

    if x_TD.shape[0] != dispatch.tokens:
        raise BadInput(f"x holds {x_TD.shape[0]} tokens, the dispatch {dispatch.tokens}")
    return run(x_TD, dispatch, Form(act, gated, gate_up_bias, down_bias, apply_gate, post), store)
