"""Attention experts that map a token to a query and reduce what the query found, over keys and values that all share."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesaic.core.routing import Dispatch, Routing


class AttentionModules(nn.Module):
    """E pairs of a query projection [D, C] and an output projection [C, D]. `map` and `reduce` use one choice twice."""

    def __init__(self, dim: int, experts: int, width: int):
        super().__init__()
        self.dim, self.num_experts, self.width = dim, experts, width
        self.query_ECD = nn.Parameter(torch.empty(experts, width, dim).normal_(std=dim**-0.5))
        self.out_EDC = nn.Parameter(torch.empty(experts, dim, width).normal_(std=width**-0.5))

    @property
    def cost_E(self) -> Tensor:
        """FLOPs per token of a module's two projections, without the attention between."""
        return torch.full((self.num_experts,), 4.0 * self.dim * self.width)

    @property
    def bytes_E(self) -> Tensor:
        size = 2.0 * self.dim * self.width * self.query_ECD.element_size()
        return torch.full((self.num_experts,), size, dtype=torch.float64)

    @staticmethod
    def _slots(routing: Routing) -> Dispatch:
        """The slots of a token-major routing by expert: token_S numbers slots t * K + k."""
        assert routing.experts_TK is not None and routing.weights_TK is not None
        return Dispatch.of_slots(routing.experts_TK.reshape(-1, 1), routing.weights_TK.reshape(-1, 1), routing.num_experts)

    def map(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Queries [T, K, C]; an empty slot's is zero."""
        at = self._slots(routing)
        assert routing.experts_TK is not None
        slots = routing.experts_TK.shape[1]
        return self._times(x_TD[at.token_S // slots], self.query_ECD, at).view(len(x_TD), slots, self.width)

    def reduce(self, y_TKC: Tensor, routing: Routing) -> Tensor:
        """Weighted sum over the slots of each module's output projection, [T, D]."""
        at = self._slots(routing)
        y_SD = self._times(y_TKC.flatten(0, 1)[at.token_S], self.out_EDC, at) * self._weights(at, y_TKC)
        return y_SD.view(*y_TKC.shape[:2], self.dim).sum(1)

    @staticmethod
    def _weights(at: Dispatch, like: Tensor) -> Tensor:
        """Weight of every slot, [T * K, 1], 0 where it is empty."""
        return like.new_zeros(at.tokens, 1).index_copy(0, at.token_S, at.weight_S.unsqueeze(1).to(like.dtype))

    @staticmethod
    def _times(rows_SX: Tensor, matrices: Tensor, at: Dispatch) -> Tensor:
        """Each expert's matrix on its rows, back in slot order with zeros at empty slots."""
        spans = itertools.pairwise(at.offsets_E1.tolist())
        parts = [linear(rows_SX[s:t], matrices[e]) for e, (s, t) in enumerate(spans) if s < t]
        out = rows_SX.new_zeros(at.tokens, matrices.shape[1])
        return out.index_copy(0, at.token_S, torch.cat(parts)) if parts else out
