"""Routing by the chunk: all tokens of a chunk share their experts (Hydra)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k


@register("routing", "chunk", paper="2508.15099", card="layers-and-balancing.md#hydra", needs={"sequence_ids", "positions"})
class Chunk(Router):
    """logits = W LN(summary) / temperature, top-k, softmax over the k; one summary per token, chunk or sequence.

    The summary of a chunk of `size` tokens is the mean of the chunk before it (`source="previous"`; a learned vector
    for a sequence's first chunk), so that no token sees a later one. `source="own"` is the released code's mean of
    the chunk itself, which does see later tokens: not for causal hosts, and the only source a whole sequence has.
    `granularity="token"` is plain top-k on LN(x). Padding is in no mean.
    """

    needs = frozenset({"sequence_ids", "positions"})
    no_cache = "a chunk is routed by the mean of the chunk before it, which a single token does not show"

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        granularity: Literal["token", "chunk", "sequence"] = "chunk",
        size: int = 32,
        source: Literal["previous", "own"] = "previous",
        temperature: float = 1.0,
    ):
        super().__init__(experts, k)
        if granularity not in ("token", "chunk", "sequence") or source not in ("previous", "own"):
            raise BadInput(f"granularity={granularity!r}, source={source!r}: token, chunk or sequence; previous or own")
        if granularity == "sequence" and source == "previous":
            raise BadInput("granularity='sequence' has no chunk before it: use source='own', in a host that is not causal")
        if size < 1 or temperature <= 0:
            raise BadInput(f"size={size}, temperature={temperature}: both must be positive")
        self.granularity, self.size, self.source, self.temperature = granularity, size, source, temperature
        self.causal = granularity == "token" or source == "previous"
        self.gain_D, self.shift_D = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.start_D = nn.Parameter(torch.randn(dim) * 0.02)
        self.linear = LinearScore(dim, experts)

    def flops_per_token(self, length: int = 1) -> float:
        """One product per chunk: 2 D E / size."""
        summaries = {"token": length, "chunk": -(-length // self.size), "sequence": 1}[self.granularity]
        return 2.0 * self.linear.weight.numel() * summaries / length

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        with torch.autocast(x_TD.device.type, enabled=False):
            seen_GD, group_T = self._summaries(x_TD.float(), ctx)
            normed_GD = layer_norm(seen_GD, self.gain_D.shape, self.gain_D.float(), self.shift_D.float())
        logits_GE = self.linear(normed_GD, ctx) / self.temperature
        experts_GK = top_k(logits_GE, self.k)
        weights_GK = logits_GE.gather(1, experts_GK).softmax(-1)
        logits_TE = logits_GE[group_T]
        routing = Routing(logits_TE, logits_TE.softmax(-1), experts_GK[group_T], weights_GK[group_T])
        return empty_padding(routing, ctx)

    def _summaries(self, x_TD: Tensor, ctx: RoutingContext) -> tuple[Tensor, Tensor]:
        """What each group of tokens is routed by, [G, D], and the group of every token."""
        if self.granularity == "token":
            return x_TD, torch.arange(len(x_TD), device=x_TD.device)
        sequence_T = torch.unique(ctx.need("sequence_ids", "chunk"), return_inverse=True)[1]
        chunk_T = torch.zeros_like(sequence_T)
        if self.granularity == "chunk":
            chunk_T = ctx.need("positions", "chunk") // self.size
        sequences, chunks = (int(t.max()) + 1 if t.numel() else 0 for t in (sequence_T, chunk_T))
        group_T = sequence_T * chunks + chunk_T
        real_T1 = torch.ones_like(x_TD[:, :1]) if ctx.mask is None else ctx.mask.unsqueeze(1).float()
        total_GD = x_TD.new_zeros(sequences * chunks, x_TD.shape[1]).index_add(0, group_T, x_TD * real_T1)
        count_G1 = x_TD.new_zeros(sequences * chunks, 1).index_add(0, group_T, real_T1)
        mean_GD = total_GD / count_G1.clamp(min=1)
        if self.source == "own":
            return mean_GD, group_T
        mean_BCD = mean_GD.view(sequences, chunks, x_TD.shape[1])
        start_B1D = self.start_D.float().expand(sequences, 1, -1)
        return torch.cat([start_B1D, mean_BCD[:, :-1]], 1).flatten(0, 1)[: sequences * chunks], group_T
