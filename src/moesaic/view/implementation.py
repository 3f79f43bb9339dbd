"""`experts_implementation="moesaic"`: our kernels behind the one experts call of every transformers MoE."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor
from transformers.integrations import moe as transformers_moe

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import Form, dispatch_slots, expert_mlp
from moesaic.view.one_token import one_token

NAME = "moesaic"

STREAMED = "streamed"
"""Attribute of an experts module whose weights are elsewhere: called with x, dispatch and the chosen ids [T, K] (or None)."""


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts call: x [T, D], ids [T, K] (outside [0, E): empty slot), weights [T, K] -> y [T, D]."""
    streamed = getattr(self, STREAMED, None)
    if streamed is not None and hasattr(
        streamed, "routed"
    ):  # it sorts the pairs itself, where it has brought their ids to the host
        return streamed.routed(hidden_states, top_k_index, top_k_weights)
    if streamed is None and hidden_states.shape[0] == 1:
        y_1D = one_token(self, form_of, hidden_states, top_k_index, top_k_weights)
        if y_1D is not None:
            return y_1D
    dispatch = dispatch_slots(top_k_index, top_k_weights, self.down_proj.shape[0])
    if streamed is not None:
        return streamed(hidden_states, dispatch, top_k_index)
    return run(self, hidden_states, dispatch)


def run(experts: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
    """Run a dispatch on a bank as stored: gated or not, biased, transposed, interleaved, own gate, normed output."""
    streamed = getattr(experts, STREAMED, None)
    if streamed is not None:
        return streamed(x_TD, dispatch, None)
    if experts.down_proj.element_size() < 2:
        raise BadInput(
            f"{type(experts).__name__} stores {experts.down_proj.dtype} with scales, which our kernels do not read; "
            'load it dequantised, or with experts_implementation="grouped_mm"'
        )
    form = form_of(experts)
    return expert_mlp(
        x_TD,
        dispatch,
        experts.gate_up_proj if experts.has_gate else experts.up_proj,
        experts.down_proj,
        act=form.act,
        gated=form.gated,
        gate_up_bias=form.gate_up_bias_EH,
        down_bias=form.down_bias_ED,
        transposed=experts.is_transposed,
        apply_gate=form.apply_gate,
        post=form.post,
    )


def form_of(experts: Any) -> Form:
    """What the module does around its two products."""
    up_name = "gate_up_proj" if experts.has_gate else "up_proj"
    return Form(
        act=getattr(experts, "act_fn", "silu"),
        gated=experts.has_gate,
        gate_up_bias_EH=getattr(experts, up_name + "_bias") if experts.has_bias else None,
        down_bias_ED=experts.down_proj_bias if experts.has_bias else None,
        apply_gate=experts._apply_gate if has_own_gate(experts) else None,
        post=experts.post_expert_norm if getattr(experts, "has_post_expert_norm", False) else None,
    )


def has_own_gate(experts: Any) -> bool:
    """Whether the architecture brings a gate of its own instead of the decorator's act(gate) * up."""
    own = getattr(type(experts), "_apply_gate", None)  # none: the bank of one of our layers
    return bool(experts.has_gate) and own is not None and own.__module__ != transformers_moe.__name__


def register() -> None:
    """Make the name known to transformers; called when `moesaic.view` is imported."""
    transformers_moe.ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    except ImportError:
        return
    ALL_FP8_EXPERTS_FUNCTIONS.register(NAME, _fp8_forward)


def _fp8_forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
    warnings.warn("moesaic has no FP8 kernels yet: these experts run transformers' own FP8 code", stacklevel=2)
    return inspect.unwrap(type(self).forward)(self, *args, **kwargs)
