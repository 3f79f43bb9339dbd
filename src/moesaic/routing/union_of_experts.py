"""Union of Experts: tokens pick slices, slices then pick their best tokens; or a sequence picks its slices."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Pairs, Routing
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather, renormalise


@register("routing", "union_of_experts", paper="2503.02495", card="routing.md#uoe", needs={"sequence_ids", "positions"})
class UnionOfExperts(Router):
    """g = softmax(W x + b), the k largest entries kept and divided by their sum, times k: an even gate weighs 1, as the
    cut of a dense block needs.

    `selection="data"`: per token. With `keep` (a share of the sequence) each expert then takes exactly
    L = max(1, round(keep * N)) tokens of every sequence of N by g, tokens that did not choose it at weight 0; which ones
    depends on later tokens, so only `keep=None` suits causal hosts. `selection="sequence"`: one linear map over the
    flattened sequence of up to `length` tokens picks k slices for all of it (not causal either).
    The released language model applies no weights, which leaves its gate untrained, and normalises over the batch,
    which couples samples; here g is the weight and is normalised per token.
    """

    needs = frozenset({"sequence_ids", "positions"})
    bank = "tensor_slices"

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 2,
        selection: Literal["data", "sequence"] = "data",
        keep: float | None = None,
        length: int | None = None,
    ):
        super().__init__(experts, k)
        if selection not in ("data", "sequence"):
            raise BadInput(f"selection={selection!r}: data or sequence")
        if selection == "sequence" and (length is None or keep is not None):
            raise BadInput("selection='sequence' needs length, the tokens of its longest sequence, and takes no keep")
        if keep is not None and not 0 < keep <= 1:
            raise BadInput(f"keep={keep}: a share of the sequence, above 0 and up to 1")
        self.selection, self.keep, self.length = selection, keep, length
        self.causal = selection == "data" and keep is None
        self.linear = LinearScore(dim * (length or 1 if selection == "sequence" else 1), experts)
        self.bias_E = nn.Parameter(torch.zeros(experts))

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        row_T = torch.unique(ctx.need("sequence_ids", "union_of_experts"), return_inverse=True)[1]
        if self.selection == "sequence":
            logits_TE = self._sequence(x_TD, row_T, ctx)[row_T]
        else:
            logits_TE = self.linear(x_TD, ctx) + self.bias_E.float()
        probs_TE = logits_TE.softmax(-1)
        experts_TK = top_k(logits_TE, self.k)
        weights_TK = self.k * renormalise(gather(probs_TE, experts_TK))
        routing = empty_padding(Routing(logits_TE, probs_TE, experts_TK, weights_TK), ctx)
        return routing if self.keep is None else self._truncate(routing, row_T, ctx)

    def _sequence(self, x_TD: Tensor, row_T: Tensor, ctx: RoutingContext) -> Tensor:
        """Logits of every sequence, [B, E]; missing tokens are zeros."""
        assert self.length is not None
        at_T = ctx.need("positions", "union_of_experts")
        if at_T.numel() and int(at_T.max()) >= self.length:
            raise BadInput(f"a sequence of more than length={self.length} tokens: build the router for longer ones")
        real_TD = x_TD if ctx.mask is None else x_TD * ctx.mask.unsqueeze(1)
        rows = int(row_T.max()) + 1 if row_T.numel() else 0
        flat = x_TD.new_zeros(rows * self.length, x_TD.shape[1]).index_copy(0, row_T * self.length + at_T, real_TD)
        with torch.autocast(x_TD.device.type, enabled=False):
            return linear(flat.view(rows, -1).float(), self.linear.weight.float(), self.bias_E.float())

    def _truncate(self, routing: Routing, row_T: Tensor, ctx: RoutingContext) -> Routing:
        """The pairs of each expert's best L tokens of every sequence, in order of position."""
        assert routing.experts_TK is not None and routing.weights_TK is not None and self.keep is not None
        gate_TE = torch.zeros_like(routing.logits_TE).scatter_add(1, routing.experts_TK.clamp(min=0), routing.weights_TK)
        parts = []
        for row in range(int(row_T.max()) + 1 if row_T.numel() else 0):
            here_T = row_T == row
            token_N = (here_T if ctx.mask is None else here_T & ctx.mask).nonzero().squeeze(1)
            size = min(len(token_N), max(1, round(self.keep * len(token_N))))
            best_LE = top_k(gate_TE[token_N].T, size).sort(1).values.T
            parts.append(token_N[best_LE] if len(token_N) else token_N.new_zeros(0, self.num_experts))
        token_LE = torch.cat(parts) if parts else torch.zeros(0, self.num_experts, dtype=torch.long, device=row_T.device)
        expert_LE = torch.arange(self.num_experts, device=row_T.device).expand_as(token_LE)
        pairs = Pairs(token_LE.flatten(), expert_LE.flatten(), gate_TE[token_LE, expert_LE].flatten())
        return Routing(routing.logits_TE, routing.probs_TE, pairs=pairs, selected_TK=routing.experts_TK)
