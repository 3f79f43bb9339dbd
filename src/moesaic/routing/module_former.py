"""ModuleFormer's gate: a small MLP, a linear map or cosines; full-softmax weights; sampled last choices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, gelu, linear, normalize

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "module_former", paper="2306.04640", card="layers-and-balancing.md#moduleformer")
class ModuleGate(Router):
    """p = softmax(gate x) over all E, the k best, weights p NOT renormalised (`renormalised=True` divides by their sum).

    `gate`: "mlp" Linear(D, hidden), GELU, dropout 0.1, Linear(hidden, E); "linear"; "cosine" exp(temperature) times the
    cosine to learned centroids. In training the last `sample` of the k choices are drawn from p + 1e-6 instead.
    Deleting rows changes the weights of the rest, because they come from the full softmax.
    """

    bank = "mlp"

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        gate: Literal["mlp", "linear", "cosine"] = "mlp",
        hidden: int = 256,
        drop: float = 0.1,
        sample: int = 0,
        renormalised: bool = False,
    ):
        super().__init__(experts, k)
        if gate not in ("mlp", "linear", "cosine"):
            raise BadInput(f"gate={gate!r}: one of mlp, linear, cosine")
        if not 0 <= sample <= k:
            raise BadInput(f"sample={sample}: between 0 and k={k}")
        self.gate, self.drop, self.sample, self.renormalised = gate, drop, sample, renormalised
        self.first = LinearScore(dim, hidden, std=dim**-0.5) if gate == "mlp" else None
        self.first_bias = nn.Parameter(torch.zeros(hidden)) if gate == "mlp" else None
        self.last = LinearScore(hidden if gate == "mlp" else dim, experts)
        self.temperature = nn.Parameter(torch.tensor(1.0)) if gate == "cosine" else None

    def score(self, x_TD: Tensor, ctx: RoutingContext) -> Tensor:
        if self.first is not None and self.first_bias is not None:
            hidden_TR = gelu(self.first(x_TD, ctx) + self.first_bias.float())
            return self.last(dropout(hidden_TR, self.drop, ctx.training), ctx)
        if self.temperature is None:
            return self.last(x_TD, ctx)
        with torch.autocast(x_TD.device.type, enabled=False):
            cosine_TE = linear(normalize(x_TD.float(), dim=-1), normalize(self.last.weight.float(), dim=-1))
            return cosine_TE * self.temperature.float().exp()

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        if not (self.sample and ctx.training and len(logits_TE)):
            return top_k(logits_TE, self.k)
        sure_TK = top_k(logits_TE, self.k - self.sample)
        chance_TE = (logits_TE.detach().softmax(-1) + 1e-6).scatter(1, sure_TK, 0.0)
        drawn_TK = torch.multinomial(chance_TE, self.sample, generator=ctx.generator)
        return torch.cat([sure_TK, drawn_TK], 1)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        weights_TK = gather(logits_TE.softmax(-1), experts_TK)
        return renormalise(weights_TK) if self.renormalised else weights_TK
