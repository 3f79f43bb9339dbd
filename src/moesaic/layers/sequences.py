"""Tokens as sequences: the padded view [B, N, D] that a layer which mixes tokens works on."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext


class Sequences:
    """Where each of T flattened tokens stands: `slot_T` in B rows of N, ordered by position; `real_BN` is False at padding.

    Rows come from ctx.sequence_ids, so packed sequences stay apart. Without it x's own [B, N, D] says, or all tokens
    are one sequence.
    """

    def __init__(self, x: Tensor, ctx: RoutingContext):
        tokens = x.shape[:-1].numel()
        device = x.device
        if ctx.sequence_ids is None:
            self.rows, self.length = (1, tokens) if x.dim() < 3 else (x.shape[:-2].numel(), x.shape[-2])
            self.slot_T = torch.arange(tokens, device=device)
        else:
            row_T = torch.unique(ctx.sequence_ids, return_inverse=True)[1]
            positions = torch.zeros_like(row_T) if ctx.positions is None else ctx.positions
            order_T = torch.argsort(positions, stable=True)
            order_T = order_T[torch.argsort(row_T[order_T], stable=True)]
            counts_B = torch.bincount(row_T)
            self.rows, self.length = len(counts_B), int(counts_B.max()) if tokens else 0
            start_B = counts_B.cumsum(0) - counts_B
            column_T = torch.arange(tokens, device=device) - start_B.repeat_interleave(counts_B)
            self.slot_T = torch.empty_like(order_T).scatter_(0, order_T, row_T[order_T] * self.length + column_T)
        here_T = torch.ones(tokens, dtype=torch.bool, device=device) if ctx.mask is None else ctx.mask
        self.real_BN = self.pad(here_T.unsqueeze(1)).squeeze(-1)

    def pad(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> [B, N, D], zero where a row has no token."""
        empty = x_TD.new_zeros(self.rows * self.length, x_TD.shape[-1])
        return empty.index_copy(0, self.slot_T, x_TD).view(self.rows, self.length, x_TD.shape[-1])

    def flat(self, y_BND: Tensor) -> Tensor:
        """[B, N, D] -> [T, D]: the inverse of `pad`."""
        return y_BND.flatten(0, 1)[self.slot_T]

    def allowed(self, causal: bool, window: int | None = None) -> Tensor:
        """True where query i may look at key j, bool [B, N, N]: real keys, none later if causal, the last `window` only.

        Every query may look at itself, so that no row is empty.
        """
        index_N = torch.arange(self.length, device=self.real_BN.device)
        back_NN = index_N.unsqueeze(1) - index_N
        see_NN = back_NN >= 0 if causal else torch.ones_like(back_NN, dtype=torch.bool)
        if window is not None:
            see_NN = see_NN & (back_NN.abs() < window)
        return (see_NN & self.real_BN.unsqueeze(1)) | (back_NN == 0)
