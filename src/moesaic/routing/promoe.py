"""ProMoE: tokens go to the nearest prototype; samples without a class have an expert of their own."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.select import top_k


@register("routing", "promoe", paper="2510.24711", card="routing.md#promoe", needs={"class_ids"})
class ProMoE(Router):
    """s = cos(x, c_e) over the first E - 1 experts, top-k of s; tokens of class `null_class` take the last expert, weight 1.

    Weights: "identity" w = s (the presets; it may be negative, so that an expert is subtracted), "softmax" or "sigmoid" of s;
    never renormalised. In training the
    prototypes and the mean of each expert's tokens, all of length 1, are left in `routing.aux` for the contrastive loss
    (balancing/promoe.py): means over this call, with gradient to tokens and prototypes; unconditional and padding tokens
    are in none. Give the shared expert to the layer (`shared`). The logits
    of what a token cannot choose are -inf. The published expert-choice variant is not here.
    """

    needs = frozenset({"class_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 1,
        weight: Literal["identity", "softmax", "sigmoid"] = "identity",
        null_class: int = 1000,
    ):
        super().__init__(experts, k)
        if not 1 <= k < experts:
            raise BadInput(f"k={k}: {experts} experts are {experts - 1} for classes and one for samples without a class")
        if weight not in ("identity", "softmax", "sigmoid"):
            raise BadInput(f"weight={weight!r}: one of identity, softmax, sigmoid")
        self.weight_mode, self.null_class = weight, null_class
        self.prototype_ED = nn.Parameter(torch.empty(experts - 1, dim).normal_(std=0.02))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        null_T1 = (ctx.need("class_ids", "promoe") == self.null_class).unsqueeze(1)
        last = self.num_experts - 1
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD = x_TD.float()
            prototype_ED = normalize(self.prototype_ED.float(), dim=-1)
            cos_TE = normalize(x_TD, dim=-1) @ prototype_ED.T
        column_E = torch.arange(self.num_experts, device=x_TD.device)
        shut_TE = (column_E == last) ^ null_T1
        logits_TE = torch.cat([cos_TE, torch.zeros_like(cos_TE[:, :1])], 1).masked_fill(shut_TE, float("-inf"))
        probs_TE = logits_TE.softmax(-1)
        value_TE = probs_TE if self.weight_mode == "softmax" else logits_TE.masked_fill(shut_TE, 0.0)
        if self.weight_mode == "sigmoid":
            value_TE = value_TE.sigmoid()
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = value_TE.gather(1, experts_TK).masked_fill(null_T1, 1.0)
        spare_TK = null_T1 & (torch.arange(self.k, device=x_TD.device) > 0)
        experts_TK, weights_TK = experts_TK.masked_fill(spare_TK, -1), weights_TK.masked_fill(spare_TK, 0.0)
        routing = empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK), ctx)
        if ctx.training:
            routing.aux.update(self._means(x_TD, prototype_ED, routing))
        return routing

    def _means(self, x_TD: Tensor, prototype_ED: Tensor, routing: Routing) -> dict[str, Tensor]:
        """Prototypes and token means of length 1, [E - 1, D], and which experts have tokens, bool [E - 1]."""
        assert routing.experts_TK is not None
        chosen_S = routing.experts_TK.flatten()
        real_S = torch.nonzero((chosen_S >= 0) & (chosen_S < len(prototype_ED))).flatten()
        by_S, token_S = chosen_S[real_S], real_S // routing.experts_TK.shape[1]
        count_E = torch.bincount(by_S, minlength=len(prototype_ED))
        sum_ED = torch.zeros_like(prototype_ED).index_add(0, by_S, x_TD[token_S])
        mean_ED = sum_ED / count_E.clamp(min=1).unsqueeze(1)
        return {"prototype_ED": prototype_ED, "token_mean_ED": normalize(mean_ED, dim=-1), "used_E": count_E > 0}
