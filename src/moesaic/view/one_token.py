"""A decoding step's shortest way through an experts call, where there is one: the bits are those of the long way."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moesaic.kernels import Weights, few_rows

_SUITS: WeakKeyDictionary[Any, tuple[tuple[int, int], bool]] = WeakKeyDictionary()
"""Experts modules that were asked before, with the addresses of the weights that the answer is about."""


def one_token(experts: Any, form_of: Any, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor | None:
    """y [1, D] of a single token of bf16 on a CPU without gradients; None where the long way has to be taken."""
    gate_up, down = getattr(experts, "gate_up_proj", None), experts.down_proj
    plain = x_1D.dtype is down.dtype is torch.bfloat16 and x_1D.is_cpu and down.is_cpu
    traced = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu")
    if gate_up is None or not plain or traced:
        return None
    here = gate_up.data_ptr(), down.data_ptr()
    known = _SUITS.get(experts)
    if known is None or known[0] != here:
        suits = few_rows.suits(Weights(gate_up, down, form_of(experts), experts.is_transposed), torch.bfloat16)
        known = _SUITS[experts] = here, suits
    return few_rows.one_token(x_1D, ids_1K, weights_1K, gate_up, down) if known[1] else None
