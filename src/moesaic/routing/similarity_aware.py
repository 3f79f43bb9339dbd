"""Similarity-aware routing (Sim-SMoE): a token borrows the routing of the tokens that are like it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.pools import pools
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "similarity_aware", paper="2505.00792", card="routing.md#sim-smoe", needs={"sequence_ids"})
class SimilarityAware(Router):
    """q~ = A q with A = softmax over the sequence of u W_s u^T / tau; top-k of q~, renormalised. W_s starts at I / sqrt(D).

    With `earlier` a token looks at itself and at earlier tokens only; without it at the whole sequence, not for causal
    hosts. `mix="logits"` mixes the scores instead of the probabilities. Padding is never looked at. The experts still see
    the token itself; load losses read q~. Needs all tokens of a sequence in one call: a sequence that starts at a later
    position, as in decoding with a cache, is refused.
    """

    needs = frozenset({"sequence_ids"})
    no_cache = "similarities need the inputs of all earlier tokens, which a cache of keys and values does not hold"

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        tau: float = 1.0,
        earlier: bool = True,
        mix: Literal["probs", "logits"] = "probs",
    ):
        super().__init__(experts, k)
        if tau <= 0 or mix not in ("probs", "logits"):
            raise BadInput(f"tau={tau}, mix={mix!r}: a positive temperature; probs or logits")
        self.dim, self.tau, self.earlier, self.mix = dim, tau, earlier, mix
        self.causal = earlier
        self.score = LinearScore(dim, experts)
        self.offset_E = nn.Parameter(torch.zeros(experts))
        self.similarity_DD = nn.Parameter(torch.eye(dim) / dim**0.5)

    def flops_per_token(self, length: int = 1) -> float:
        """2 N D for the similarities and 2 N E for the mixing beside the two matrices."""
        return super().flops_per_token() + 2.0 * length * (self.dim + self.num_experts)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx) + self.offset_E.float()
        mixed_TE = self._mix(x_TD, logits_TE.softmax(-1) if self.mix == "probs" else logits_TE, ctx)
        mixed_TE = mixed_TE if self.mix == "probs" else mixed_TE.softmax(-1)
        experts_TK = top_k(mixed_TE, self.k)
        weights_TK = renormalise(gather(mixed_TE, experts_TK))
        return empty_padding(Routing(logits_TE, mixed_TE, experts_TK, weights_TK), ctx)

    def _mix(self, x_TD: Tensor, values_TE: Tensor, ctx: RoutingContext) -> Tensor:
        """A @ values by sequence. Sequences are padded to the longest, and no one looks at what they are padded with."""
        found = pools("sequence", x_TD.shape[0], ctx, "similarity_aware", x_TD.device)
        longest = max((len(index_t) for index_t in found), default=0)
        index_BN = torch.full((len(found), longest), -1, device=x_TD.device)
        for row_N, index_t in zip(index_BN, found, strict=True):
            row_N[: len(index_t)] = index_t
        if ctx.positions is not None and longest and bool((ctx.positions[index_BN[:, 0]] > 0).any()):
            raise BadInput(
                "similarity_aware looks at the whole sequence, whose first tokens are missing: decode without a cache"
            )
        real_BN = index_BN >= 0
        seen_BN = real_BN if ctx.mask is None else real_BN & ctx.mask[index_BN.clamp(min=0)]
        see_BNN = seen_BN.unsqueeze(1) | torch.eye(longest, dtype=torch.bool, device=x_TD.device)
        if self.earlier:
            see_BNN = see_BNN.tril()
        with torch.autocast(x_TD.device.type, enabled=False):
            u_BND = x_TD.float()[index_BN.clamp(min=0)]
            scores_BNN = (u_BND @ self.similarity_DD.float()) @ u_BND.transpose(1, 2) / self.tau
            mixed_BNE = scores_BNN.masked_fill(~see_BNN, float("-inf")).softmax(-1) @ values_TE[index_BN.clamp(min=0)]
        return torch.zeros_like(values_TE).index_copy(0, index_BN[real_BN], mixed_BNE[real_BN])
