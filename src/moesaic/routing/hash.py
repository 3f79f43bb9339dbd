"""Hash routing: a fixed table from token id to experts."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.routing.router import Router, empty_padding


@register("routing", "hash", paper="2106.04426", card="routing.md#comet", needs={"token_ids"})
class Hash(Router):
    """Token id -> k experts by a fixed table; weights 1 / k; nothing is learned.

    With `frequencies` (one count per id) the table is balanced: ids from the most frequent down go to the expert
    that carries least so far; without them it is random by `seed`.
    """

    needs = frozenset({"token_ids"})

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int = 1,
        vocab_size: int = 8192,
        frequencies: Sequence[float] | None = None,
        seed: int = 0,
    ):
        super().__init__(experts, k)
        if frequencies is not None and len(frequencies) != vocab_size:
            raise BadInput(f"frequencies has {len(frequencies)} entries for a vocabulary of {vocab_size}")
        if frequencies is None:
            generator = torch.Generator().manual_seed(seed)
            table_VK = torch.rand(vocab_size, experts, generator=generator).argsort(1)[:, :k]
        else:
            table_VK = _balanced(frequencies, experts, k)
        self.table_VK: Tensor
        self.register_buffer("table_VK", table_VK)

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        token_ids = ctx.need("token_ids", "hash")
        if token_ids.numel() and int(token_ids.max()) >= len(self.table_VK):
            raise BadInput(f"token id {int(token_ids.max())} is outside the hash table of {len(self.table_VK)} ids")
        experts_TK = self.table_VK[token_ids]
        chosen_TE = one_hot(experts_TK, self.num_experts).sum(1).float()
        weights_TK = torch.full(experts_TK.shape, 1.0 / self.k, device=x_TD.device)
        return empty_padding(Routing(chosen_TE, chosen_TE / self.k, experts_TK, weights_TK), ctx)


def _balanced(frequencies: Sequence[float], experts: int, k: int) -> Tensor:
    """Greedy bin packing; an id's k experts differ."""
    heap = [(0.0, e) for e in range(experts)]
    table = torch.empty(len(frequencies), k, dtype=torch.long)
    for token in sorted(range(len(frequencies)), key=lambda i: (-frequencies[i], i)):
        least = [heapq.heappop(heap) for _ in range(k)]
        for slot, (load, expert) in enumerate(least):
            table[token, slot] = expert
            heapq.heappush(heap, (load + frequencies[token], expert))
    return table
