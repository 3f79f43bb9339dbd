"""Experts held as factors: W_e = base + L_e R_e + some whole rows, each part optional, ranks and rows of every expert its own.

One of the two factors may be shared by all experts, and is then held once; the base may have only some of the outputs and
inputs, and of its inputs read only the largest few of each token.

`install` puts factors in the place of an experts module's stacked matrices. The module keeps its class's activation, biases and
gate; its matrices are there by name, shape and dtype only (on the meta device), so that a view finds the block, its router and
its hooks. It runs from the factors and never multiplies them out. What all experts share is computed once per token: the first
product's base and shared R, because its input is the same for the k experts, and the second's base and shared L, because
they are linear in what adds up. Card: "Base + deltas, low rank, low rank + sparse rows" of surgery-and-steering.md, section D.

Shape legend: T tokens, S routed pairs of one expert, E experts, A inputs and B outputs of a matrix (P and Q: those that the
base has), R ranks and N rows of all experts together, D model width, I inner width, H rows of the first product (2I where it is
gated).
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from moesaic.core.errors import BadInput
from moesaic.core.routing import Dispatch
from moesaic.kernels import dispatch_slots
from moesaic.view.implementation import form_of

SIDES = ("first", "down")
LEAF = "factors"
"""Name of the child module that holds them."""

FACTORS = ("left", "right")
INDICES = ("index", "outputs", "inputs")
"""Buffers of whole numbers: the output of each whole row; outputs and inputs that the base has."""


class Side(nn.Module):
    """One product of all experts: base [Q, P], left [R, B], right [R, A], rows [N, A] and the output that each is of [N].

    Args:
        spec: `ranks` of each expert; `shared`: "left" or "right" where that factor is held once, with the largest rank, and
            expert e reads its first `ranks[e]` rows; `rows`, how many whole rows each has; `base`: whether there is one;
            `outputs`, `inputs`: how many of each the base has, where these are not all; `active`: how many of its inputs
            are read per token, those of largest |x_p| times the norm of their column.
    """

    index: Tensor | None
    outputs: Tensor | None
    inputs: Tensor | None

    def __init__(self, outputs: int, inputs: int, spec: Mapping[str, Any], **at: Any) -> None:
        super().__init__()
        self.width, self.height = inputs, outputs
        self.ranks, rows = [int(r) for r in spec["ranks"]], [int(n) for n in spec.get("rows") or []]
        if min(self.ranks) < 0 or (rows and (len(rows) != len(self.ranks) or min(rows) < 0)):
            raise BadInput(f"config.json: surgery gives ranks {self.ranks} and rows {rows} to {len(self.ranks)} experts")
        self.shared: str | None = spec.get("shared")
        self.active: int | None = spec.get("active")
        if self.shared not in (None, *FACTORS):
            raise BadInput(f"config.json: surgery says that the experts share {self.shared!r}: one of {', '.join(FACTORS)}")
        if self.active is not None and self.active < 1:
            raise BadInput(f"config.json: surgery lets a token read {self.active} inputs of the base")
        self.row_spans = list(pairwise(accumulate(rows, initial=0)))
        self.left = nn.Parameter(torch.empty(self._held("left"), outputs, **at))
        self.right = nn.Parameter(torch.empty(self._held("right"), inputs, **at))
        counts = {"outputs": (spec.get("outputs"), outputs), "inputs": (spec.get("inputs"), inputs)}
        if any(own is not None and not (spec.get("base") and 0 <= own <= most) for own, most in counts.values()):
            raise BadInput(
                f"config.json: surgery gives a base of {counts['outputs'][0]} outputs and {counts['inputs'][0]} inputs"
            )
        self.base: nn.Parameter | None = None
        if spec.get("base"):
            self.base = nn.Parameter(torch.empty(*(most if own is None else own for own, most in counts.values()), **at))
        self.rows = nn.Parameter(torch.empty(sum(rows), inputs, **at)) if rows else None
        sizes = {"index": sum(rows) if rows else None, **{name: own for name, (own, _) in counts.items()}}
        for name, size in sizes.items():
            held = None if size is None else torch.zeros(size, dtype=torch.int32, device=at.get("device"))
            self.register_buffer(name, held)

    def _held(self, factor: str) -> int:
        return max(self.ranks) if self.shared == factor else sum(self.ranks)

    def span(self, factor: str, e: int) -> slice:
        """Expert e's rows of a factor."""
        low = 0 if self.shared == factor else sum(self.ranks[:e])
        return slice(low, low + self.ranks[e])

    def lower(self, e: int, x_SA: Tensor) -> Tensor:
        """R_e x [S, r]."""
        return linear(x_SA, self.right[self.span("right", e)])

    def upper(self, e: int, low_Sr: Tensor) -> Tensor:
        """L_e times it [S, B]."""
        return linear(low_Sr, self.left[self.span("left", e)].T)

    def add_rows(self, e: int, x_SA: Tensor, y_SB: Tensor) -> Tensor:
        """The same outputs with those of expert e's whole rows."""
        if self.rows is None or self.index is None:
            return y_SB
        low, high = self.row_spans[e]
        return y_SB.index_add(1, self.index[low:high].long(), linear(x_SA, self.rows[low:high]))

    def column_sizes(self) -> Tensor | None:
        """Norms of the base's columns [P], where it reads only some inputs of each token."""
        if self.base is None or self.active is None or self.active >= self.base.shape[1]:
            return None
        return self.base.float().norm(dim=0)

    def read(self, x_SA: Tensor, size_P: Tensor | None) -> Tensor:
        """What of its input the base reads [S, P]."""
        x_SP = x_SA if self.inputs is None else x_SA[:, self.inputs.long()]
        if size_P is None or self.active is None:
            return x_SP
        chosen_SN = (x_SP.abs() * size_P).topk(self.active, dim=-1).indices
        return torch.zeros_like(x_SP).scatter(-1, chosen_SN, x_SP.gather(-1, chosen_SN))

    def common(self, x_SP: Tensor) -> Tensor:
        """The base's outputs [S, B] for what it read; zero where it has none."""
        assert self.base is not None
        y_SQ = linear(x_SP, self.base)
        if self.outputs is None:
            return y_SQ
        return y_SQ.new_zeros(len(y_SQ), self.height).index_copy(1, self.outputs.long(), y_SQ)

    def dense(self, e: int) -> Tensor:
        """Expert e's matrix, multiplied out in float32 [B, A]; inputs that the base reads for some tokens only are read."""
        made_BA = self.left[self.span("left", e)].float().T @ self.right[self.span("right", e)].float()
        if self.base is not None:
            made_BA = made_BA + spread(self.base.float(), made_BA, self.outputs, self.inputs)
        if self.rows is not None and self.index is not None:
            low, high = self.row_spans[e]
            made_BA = made_BA.index_add(0, self.index[low:high].long(), self.rows[low:high].float())
        return made_BA


def spread(base_QP: Tensor, like_BA: Tensor, outputs_Q: Tensor | None, inputs_P: Tensor | None) -> Tensor:
    """A base with all outputs and inputs, zero where it has none: shaped as `like` [B, A]."""
    if outputs_Q is not None:
        base_QP = base_QP.new_zeros(len(like_BA), base_QP.shape[1]).index_copy(0, outputs_Q.long(), base_QP)
    if inputs_P is not None:
        base_QP = base_QP.new_zeros(like_BA.shape).index_copy(1, inputs_P.long(), base_QP)
    return base_QP


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
        form, T, first, down = form_of(module), x_TD.shape[0], self.first, self.down
        base_TH = None if first.base is None else first.common(first.read(x_TD, first.column_sizes()))
        low_TR = linear(x_TD, first.right) if first.shared == "right" else None
        size_P = down.column_sizes()
        y_TD, read_TP, up_TR = x_TD.new_zeros(T, self.width), None, None
        if form.post is None:  # what all experts share of the second product is applied once, to the sum
            read_TP = None if down.base is None else x_TD.new_zeros(T, down.base.shape[1])
            up_TR = x_TD.new_zeros(T, len(down.left)) if down.shared == "left" else None
        for e, (low, high) in enumerate(pairwise(dispatch.offsets_E1.tolist())):
            if low == high:
                continue
            token_S, weight_S1 = dispatch.token_S[low:high], dispatch.weight_S[low:high, None].to(x_TD.dtype)
            x_SD = x_TD[token_S]
            low_Sr = first.lower(e, x_SD) if low_TR is None else low_TR[token_S, : first.ranks[e]]
            h_SH = first.add_rows(e, x_SD, first.upper(e, low_Sr))
            if base_TH is not None:
                h_SH = h_SH + base_TH[token_S]
            if form.gate_up_bias_EH is not None:
                h_SH = h_SH + form.gate_up_bias_EH[e]
            a_SI = form.activate(h_SH)
            low_Sr = down.lower(e, a_SI)
            if up_TR is None:
                f_SD = down.upper(e, low_Sr)
            else:
                f_SD = low_Sr.new_zeros(len(low_Sr), self.width)
                up_TR = up_TR.index_add(0, token_S, pad(low_Sr * weight_S1, (0, up_TR.shape[1] - low_Sr.shape[1])))
            f_SD = down.add_rows(e, a_SI, f_SD)
            if read_TP is not None:
                read_TP = read_TP.index_add(0, token_S, down.read(a_SI, size_P) * weight_S1)
            elif down.base is not None:
                f_SD = f_SD + down.common(down.read(a_SI, size_P))
            if form.down_bias_ED is not None:
                f_SD = f_SD + form.down_bias_ED[e]
            f_SD = f_SD if form.post is None else form.post(f_SD)
            y_TD = y_TD.index_add(0, token_S, (f_SD * weight_S1).to(y_TD.dtype))
        if up_TR is not None:
            y_TD = y_TD + linear(up_TR, down.left.T)
        return y_TD if read_TP is None else y_TD + down.common(read_TP)


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
        target = getattr(module, leaf)
        if target.shape != tensor.shape:
            raise ValueError(f"{name}: {list(tensor.shape)}, should be {list(target.shape)}")
        if leaf in INDICES:
            setattr(module, leaf, tensor.to(place, torch.int32))
            continue
        setattr(module, leaf, nn.Parameter(tensor.to(place, own.dtype), own.requires_grad))
