"""Pools: the tokens that a router looks at together. Routers that choose over a pool are causal only by position."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput

Pool = Literal["all", "sequence", "position"]


def check_pool(pool: str) -> None:
    """Raises BadInput for a pool that does not exist."""
    if pool not in ("all", "sequence", "position"):
        raise BadInput(f"pool={pool!r}: one of all, sequence, position")


def pools(pool: Pool, tokens: int, ctx: RoutingContext, router: str, device: torch.device) -> list[Tensor]:
    """Token numbers of each pool, int64: all of the call, each sequence, or each position across the batch.

    Only the last is causal. Padding is in the pools. Raises MissingNeed when the host gives no sequence_ids or positions.
    """
    if pool == "all":
        return [torch.arange(tokens, device=device)]
    key_T = ctx.need("sequence_ids" if pool == "sequence" else "positions", router)
    order_T = torch.sort(key_T, stable=True)
    counts = torch.unique_consecutive(order_T.values, return_counts=True)[1]
    return list(order_T.indices.split(counts.tolist()))


def real_pools(pool: Pool, tokens: int, ctx: RoutingContext, router: str, device: torch.device) -> list[Tensor]:
    """The same without padding, and without pools that are all padding."""
    found = pools(pool, tokens, ctx, router, device)
    if ctx.mask is None:
        return [index_t for index_t in found if len(index_t)]
    return [kept_t for index_t in found if len(kept_t := index_t[ctx.mask[index_t]])]
