"""What task-conditioned routers share: the ids of tasks, checked against a table."""

from __future__ import annotations

from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput


def ids_of(ctx: RoutingContext, need: str, rows: int, router: str) -> Tensor:
    """ctx's ids of that need, int64 [T]. Raises BadInput for one outside 0 .. rows - 1, MissingNeed when there are none."""
    ids_T = ctx.need(need, router).long()
    if ids_T.numel() and not 0 <= int(ids_T.min()) <= int(ids_T.max()) < rows:
        raise BadInput(f"{router}: {need} from {int(ids_T.min())} to {int(ids_T.max())}, but it was built for {rows}")
    return ids_T
