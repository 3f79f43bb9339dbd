"""Hecto: a recurrent expert for order and a feed-forward one for what does not depend on it, one per sequence."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from moesaic.balancing.mutual_information import entropy
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.layers.layer import Layer
from moesaic.layers.sequences import Sequences
from moesaic.routing.router import empty_padding
from moesaic.routing.score import LinearScore


class SequenceFFN(nn.Module):
    """The first token's vector through width (tanh) to outputs."""

    def __init__(self, dim: int, width: int, outputs: int):
        super().__init__()
        self.first, self.last = nn.Linear(dim, width), nn.Linear(width, outputs)

    def forward(self, x_BND: Tensor, length_B: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x_BND[:, 0])))


class SequenceGRU(nn.Module):
    """A GRU over the sequence; its state at the last real token to outputs."""

    def __init__(self, dim: int, width: int, outputs: int):
        super().__init__()
        self.gru, self.last = nn.GRU(dim, width, batch_first=True), nn.Linear(width, outputs)

    def forward(self, x_BND: Tensor, length_B: Tensor) -> Tensor:
        states_BNR, _ = self.gru(x_BND)
        at_B11 = (length_B - 1).clamp(min=0).view(-1, 1, 1).expand(-1, 1, states_BNR.shape[-1])
        return self.last(states_BNR.gather(1, at_B11).squeeze(1))


@register("layers", "hecto", paper="2506.22919", card="routing.md#hecto", needs={"sequence_ids"}, causal=False)
class Hecto(Layer):
    """`pooled(x, ctx)` [B, outputs] of whole sequences; as a layer of a model, every token gets its sequence's output.

    x is projected to 256, the gate is softmax(W first / 1.5) of the first token ([CLS]), top-1; training adds the
    soft gate's gradient to the one-hot (straight-through: all experts run), evaluation runs the chosen one only.
    Experts alternate FFN and GRU (2 in the paper; `kinds` says otherwise). Losses: `loss/entropy` 0.01 * mean entropy of
    the gate, `loss/diversity` 0.1 * sum_e (mean gate_e)^2 (coefficients and projection are the card's inference). A
    sequence is seen whole: not for causal hosts.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"sequence_ids"})
    causal = False
    no_cache: ClassVar[str] = "it answers for whole sequences"

    def __init__(
        self,
        dim: int,
        experts: int = 2,
        outputs: int | None = None,
        width: int | None = None,
        project: int = 256,
        temperature: float = 1.5,
        entropy_weight: float = 0.01,
        diversity_weight: float = 0.1,
        kinds: tuple[Literal["ffn", "gru"], ...] = ("ffn", "gru"),
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
    ):
        super().__init__()
        if causal:
            raise BadInput("Hecto's gate and its experts see whole sequences: not for a causal host")
        self.check_host(type(self), self.needs, host)
        if experts < 1 or not kinds or set(kinds) - {"ffn", "gru"} or temperature <= 0:
            raise BadInput(f"experts={experts}, kinds={kinds}, temperature={temperature}: ffn or gru; above 0")
        outputs, width = dim if outputs is None else outputs, 128 if width is None else width
        self.dim, self.outputs, self.temperature = dim, outputs, temperature
        self.entropy_weight, self.diversity_weight = entropy_weight, diversity_weight
        made = {"ffn": SequenceFFN, "gru": SequenceGRU}
        self.project = nn.Linear(dim, project)
        self.gate = LinearScore(project, experts)
        self.experts = nn.ModuleList(made[kinds[e % len(kinds)]](project, width, outputs) for e in range(experts))

    def pooled(self, x: Tensor, ctx: RoutingContext) -> tuple[Tensor, Routing]:
        """One output per sequence, [B, outputs] in the order of their ids, and the tokens' routing."""
        at = Sequences(x, ctx)
        real_BN = at.real_BN & (at.pad(x.new_ones(x.shape[:-1].numel(), 1)).squeeze(-1) > 0)
        order_BN = torch.sort(~real_BN, dim=1, stable=True).indices  # real tokens first, so that padding ends the sequence
        h_BNP = self.project(at.pad(x.reshape(-1, x.shape[-1])))
        h_BNP = h_BNP.gather(1, order_BN.unsqueeze(-1).expand_as(h_BNP))
        if not at.length:  # a batch of nothing: no sequence has a first token
            h_BNP = h_BNP.new_zeros(0, 1, h_BNP.shape[-1])
        length_B = real_BN.sum(1)
        logits_BE = self.gate(h_BNP[:, 0], ctx) / self.temperature
        probs_BE = logits_BE.softmax(-1)
        best_B = logits_BE.argmax(-1)
        y_BO = self._train(h_BNP, length_B, probs_BE, best_B) if ctx.training else self._chosen(h_BNP, length_B, best_B)
        aux: dict[str, Tensor] = {}
        if ctx.training:
            seen_BE = probs_BE[length_B > 0]
            aux["loss/entropy"] = self.entropy_weight * entropy(seen_BE).mean()
            aux["loss/diversity"] = self.diversity_weight * seen_BE.mean(0).square().sum()
        row_T = at.slot_T // max(at.length, 1)
        experts_T1 = best_B[row_T].unsqueeze(1)
        weights_T1 = torch.ones_like(experts_T1, dtype=torch.float32)
        routing = Routing(logits_BE[row_T], probs_BE[row_T], experts_T1, weights_T1, aux=aux, carry=ctx.carry)
        return y_BO, empty_padding(routing, ctx)

    def _train(self, h_BNP: Tensor, length_B: Tensor, probs_BE: Tensor, best_B: Tensor) -> Tensor:
        hard_BE = one_hot(best_B, probs_BE.shape[1]).to(probs_BE.dtype)
        gate_BE = (hard_BE + probs_BE - probs_BE.detach()).to(h_BNP.dtype)
        outputs_BEO = torch.stack([expert(h_BNP, length_B) for expert in self.experts], 1)
        return (gate_BE.unsqueeze(-1) * outputs_BEO).sum(1)

    def _chosen(self, h_BNP: Tensor, length_B: Tensor, best_B: Tensor) -> Tensor:
        y_BO = h_BNP.new_zeros(len(best_B), self.outputs)
        for e, expert in enumerate(self.experts):
            mine_b = (best_B == e).nonzero().squeeze(1)
            if len(mine_b):
                y_BO = y_BO.index_copy(0, mine_b, expert(h_BNP[mine_b], length_B[mine_b]))
        return y_BO

    def forward(self, x: Tensor, ctx: RoutingContext | None = None) -> tuple[Tensor, Routing]:
        if self.outputs != self.dim:
            raise BadInput(f"outputs={self.outputs} is not the model's width {self.dim}: call pooled() for classes")
        ctx = self.context(ctx)
        y_BO, routing = self.pooled(x, ctx)
        at = Sequences(x, ctx)
        return y_BO[at.slot_T // max(at.length, 1)].reshape(x.shape), routing
