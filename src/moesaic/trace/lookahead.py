"""What the routers of coming layers choose for this layer's router input: a guess at what will be needed next.

The input is taken as this layer's router saw it, behind this layer's norm; the coming layer's own norm is not put in its
place. Recorder and streaming engine both ask here, so that a replay and a live run guess alike.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.view.block import Block


def look_ahead(blocks: Sequence[Block], x: Tensor, width: int) -> Tensor:
    """Ids [T, A, M] of `width` experts of each of the A coming blocks for x [.., D]: their choice first, then by score."""
    x_TD = x.reshape(-1, x.shape[-1])
    found = []
    for block in blocks:
        routing = block.route(x_TD)
        assert routing.experts_TK is not None
        order_TE = routing.logits_TE.detach().float()
        rank_TK = torch.arange(routing.experts_TK.shape[1], 0, -1.0, device=x.device).expand_as(routing.experts_TK)
        first_TE = torch.zeros_like(order_TE).scatter(1, routing.experts_TK.clamp(min=0), rank_TK)
        order_TE = torch.where(first_TE > 0, 1e30 * first_TE, order_TE)
        found.append(order_TE.topk(width, -1).indices)
    return torch.stack(found, 1)
