"""Experts held as factors: W_e = base + L_e R_e + some whole rows, each part optional, ranks and rows of every expert its own.

`install` puts factors in the place of an experts module's stacked matrices. The module keeps its class's activation, biases and
gate; its matrices are there by name, shape and dtype only (on the meta device), so that a view finds the block, its router and
its hooks. It runs from the factors and never multiplies them out. What all experts share is computed once per token: the first
product's base, because its input is the same for the k experts, and the second's, because it is linear in what they add up
to. Card: "Base + deltas, low rank, low rank + sparse rows" of surgery-and-steering.md, section D.

Shape legend: T tokens, S routed pairs of one expert, E experts, A inputs and B outputs of a matrix, R ranks and N rows of all
experts together, D model width, I inner width, H rows of the first product (2I where it is gated).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import dispatch_slots
from moesaic.view.implementation import form_of

SIDES = ("first", "down")
LEAF = "factors"
"""Name of the child module that holds them."""


class Side(nn.Module):
    """One product of all experts: base [B, A], left [R, B], right [R, A], rows [N, A] and the output that each is of [N].

    Args:
        spec: `ranks` of each expert; `rows`, how many whole rows each has; `base`: whether there is one.
    """

    def __init__(self, outputs: int, inputs: int, spec: Mapping[str, Any], **at: Any) -> None:
        super().__init__()
        self.outputs, self.inputs = outputs, inputs
        ranks, rows = [int(r) for r in spec["ranks"]], [int(n) for n in spec.get("rows") or []]
        if min(ranks) < 0 or (rows and (len(rows) != len(ranks) or min(rows) < 0)):
            raise BadInput(f"config.json: surgery gives ranks {ranks} and rows {rows} to {len(ranks)} experts")
        self.spans = list(pairwise(accumulate(ranks, initial=0)))
        self.row_spans = list(pairwise(accumulate(rows, initial=0)))
        self.left = nn.Parameter(torch.empty(sum(ranks), outputs, **at))
        self.right = nn.Parameter(torch.empty(sum(ranks), inputs, **at))
        self.base = nn.Parameter(torch.empty(outputs, inputs, **at)) if spec.get("base") else None
        self.rows: nn.Parameter | None = None
        self.index: Tensor
        if rows:
            self.rows = nn.Parameter(torch.empty(sum(rows), inputs, **at))
            self.register_buffer("index", torch.zeros(sum(rows), dtype=torch.int32, device=at.get("device")))

    def own(self, e: int, x_SA: Tensor) -> Tensor:
        """What expert e adds to the base [S, B]."""
        low, high = self.spans[e]
        y_SB = linear(linear(x_SA, self.right[low:high]), self.left[low:high].T)
        if self.rows is not None:
            low, high = self.row_spans[e]
            y_SB = y_SB.index_add(1, self.index[low:high].long(), linear(x_SA, self.rows[low:high]))
        return y_SB

    def dense(self, e: int) -> Tensor:
        """Expert e's matrix, multiplied out in float32 [B, A]."""
        low, high = self.spans[e]
        made_BA = self.left[low:high].float().T @ self.right[low:high].float()
        if self.base is not None:
            made_BA = made_BA + self.base.float()
        if self.rows is not None:
            low, high = self.row_spans[e]
            made_BA = made_BA.index_add(0, self.index[low:high].long(), self.rows[low:high].float())
        return made_BA


class Factors(nn.Module):
    """Both products."""

    def __init__(self, experts: int, width: int, inner: int, rows: int, form: Mapping[str, Any], **at: Any) -> None:
        super().__init__()
        if not set(SIDES) <= set(form) or any(len(form[side]["ranks"]) != experts for side in SIDES):
            raise BadInput(f"config.json: surgery's form names ranks of {experts} experts for {' and '.join(SIDES)}")
        self.experts, self.width, self.inner, self.height = experts, width, inner, rows
        self.first, self.down = Side(rows, width, form["first"], **at), Side(width, inner, form["down"], **at)

    def run(self, module: Any, x_TD: Tensor, dispatch: Dispatch) -> Tensor:
        """The experts call [T, D]."""
        form, T = form_of(module), x_TD.shape[0]
        base_TH = None if self.first.base is None else linear(x_TD, self.first.base)
        once = self.down.base is not None and form.post is None
        y_TD, inner_TI = x_TD.new_zeros(T, self.width), x_TD.new_zeros(T, self.inner) if once else None
        for e, (low, high) in enumerate(pairwise(dispatch.offsets_E1.tolist())):
            if low == high:
                continue
            token_S, weight_S1 = dispatch.token_S[low:high], dispatch.weight_S[low:high, None].to(x_TD.dtype)
            h_SH = self.first.own(e, x_TD[token_S])
            if base_TH is not None:
                h_SH = h_SH + base_TH[token_S]
            if form.gate_up_bias_EH is not None:
                h_SH = h_SH + form.gate_up_bias_EH[e]
            a_SI = form.activate(h_SH)
            f_SD = self.down.own(e, a_SI)
            if self.down.base is not None and not once:
                f_SD = f_SD + linear(a_SI, self.down.base)
            if form.down_bias_ED is not None:
                f_SD = f_SD + form.down_bias_ED[e]
            f_SD = f_SD if form.post is None else form.post(f_SD)
            y_TD = y_TD.index_add(0, token_S, (f_SD * weight_S1).to(y_TD.dtype))
            if inner_TI is not None:
                inner_TI = inner_TI.index_add(0, token_S, a_SI * weight_S1)
        return y_TD if inner_TI is None or self.down.base is None else y_TD + linear(inner_TI, self.down.base)


class _Factored:
    """Mixed in before the class of an experts module."""

    factors: Factors
    is_transposed: bool

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self.streamed(hidden_states, dispatch_slots(top_k_index, top_k_weights, self.factors.experts), top_k_index)

    def streamed(self, x_TD: Tensor, dispatch: Dispatch, ids_TK: Tensor | None = None) -> Tensor:
        """Where `view.implementation` asks for what stands in the place of matrices."""
        return self.factors.run(self, x_TD, dispatch)

    def _stand_in(self, outputs: int, inputs: int) -> Tensor:
        shape = (inputs, outputs) if self.is_transposed else (outputs, inputs)
        return torch.empty(self.factors.experts, *shape, dtype=self.factors.first.left.dtype, device="meta")

    @property
    def gate_up_proj(self) -> Tensor:
        return self._stand_in(self.factors.height, self.factors.width)

    up_proj = gate_up_proj

    @property
    def down_proj(self) -> Tensor:
        return self._stand_in(self.factors.width, self.factors.inner)


def install(experts: Any, form: Mapping[str, Any]) -> Factors:
    """Replace an experts module's matrices by (empty) factors of this form, in place. Raises BadInput for a wrong form."""
    first, down = "gate_up_proj" if experts.has_gate else "up_proj", experts.down_proj
    E, *shape = down.shape
    width, inner = reversed(shape) if experts.is_transposed else shape
    rows = getattr(experts, first).shape[1 if not experts.is_transposed else 2]
    made = Factors(E, width, inner, rows, form, dtype=down.dtype, device=down.device)
    for name in (first, "down_proj"):
        del experts._parameters[name]
    setattr(experts, LEAF, made)
    own = type(experts)
    experts.__class__ = type(f"Factored{own.__name__}", (_Factored, own), {"__module__": __name__})
    return made


def fill(factors: Factors, bank: Mapping[str, Tensor]) -> None:
    """Put tensors, named as the parameters are, in the place of the empty ones; in the model's dtype, on its device if any."""
    own = factors.first.left
    for name, tensor in bank.items():
        side, leaf = name.split(".")
        place = tensor.device if own.is_meta else own.device
        module = getattr(factors, side)
        if leaf == "index":
            module.index = tensor.to(place, torch.int32)
            continue
        target = getattr(module, leaf)
        if target.shape != tensor.shape:
            raise ValueError(f"{name}: {list(tensor.shape)}, should be {list(target.shape)}")
        setattr(module, leaf, nn.Parameter(tensor.to(place, own.dtype), own.requires_grad))
