"""Some experts of a fused bank as parameters of their own, so that an optimiser can touch these and nothing else.

A gradient mask on `gate_up_proj` [E, 2I, D] would leave weight decay and momentum to work on every expert. Here the chosen
expert's rows leave the stacked tensor, run by themselves while they learn, and are written back at the end.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels import dispatch_slots, expert_mlp
from moesaic.view import implementation
from moesaic.view.block import Block


class Slice(nn.Module):
    """Copies [1, ...] of one expert's rows of every stacked tensor, under the stacked tensors' names."""

    def __init__(self, block: Block, expert: int) -> None:
        super().__init__()
        self.expert = expert
        stacked = {id(tensor) for tensor in block.bank.stacked()}
        for name, tensor in block.experts.named_parameters(recurse=False):
            if id(tensor) in stacked:
                self.register_parameter(name, nn.Parameter(tensor.detach()[expert : expert + 1].clone()))

    def run(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """This expert's part of the experts call, [T, D]."""
        form, up = implementation.form_of(experts), "gate_up_proj" if experts.has_gate else "up_proj"
        own: Any = self
        dispatch = dispatch_slots(torch.where(ids_TK == self.expert, 0, -1), weights_TK, 1)
        return expert_mlp(
            x_TD, dispatch, getattr(own, up), own.down_proj, act=form.act, gated=form.gated,
            gate_up_bias=getattr(self, f"{up}_bias", None), down_bias=getattr(self, "down_proj_bias", None),
            transposed=experts.is_transposed, apply_gate=form.apply_gate, post=form.post,
        )  # fmt: skip


class SlicedExperts(nn.Module):
    """Mixed into the class of a block's experts module while some of its experts are apart."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        own: Any = self
        apart_TK = torch.zeros_like(top_k_index, dtype=torch.bool)
        y_TD = torch.zeros_like(hidden_states)
        for part in own.__dict__["apart"]:
            apart_TK = apart_TK | (top_k_index == part.expert)
            y_TD = y_TD + part.run(own, hidden_states, top_k_index, top_k_weights)
        skips = getattr(own.config, "_experts_implementation", None) == implementation.NAME
        rest_TK = top_k_index.masked_fill(apart_TK, -1) if skips else top_k_index
        return y_TD + super().forward(hidden_states, rest_TK, top_k_weights.masked_fill(apart_TK, 0))


@cache
def _sliced_class(own: Any) -> Any:
    return type(f"Sliced{own.__name__}", (SlicedExperts, own), {})


def take_out(block: Block, experts: list[int]) -> list[Slice]:
    """Let these experts of a block run from parameters of their own. `put_back` ends it."""
    module: Any = block.experts
    parts = [Slice(block, expert) for expert in experts]
    module.__dict__["apart"] = parts  # no submodules: the model's own parameters stay its own
    own: Any = type(module)
    module.__class__ = _sliced_class(own)
    return parts


@torch.no_grad()
def put_back(block: Block) -> None:
    """Write the experts that are apart into the stacked tensors, in their dtype, and run as before."""
    module: Any = block.experts
    for part in module.__dict__.pop("apart"):
        for name, value in part.named_parameters():
            stored = getattr(module, name)
            stored.data[part.expert] = value[0].to(stored.dtype)
    module.__class__ = type(module).__mro__[2]
