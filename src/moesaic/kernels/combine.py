"""Back from pairs to tokens: a sum per token in fp32 or better, in a fixed order, without a copy in token order.

`embedding_bag` over the pair rows is that sum in one pass: gather, weigh and reduce. On a CPU it takes 0.1 ms where
`index_add_` of the same 4,096 x 1,024 bf16 rows takes 10; on a GPU it has no atomics, so it repeats bit for bit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag


class TokenOrder(NamedTuple):
    """The pairs in token order: token t owns pair_S[start_T[t] : start_T[t + 1]]."""

    pair_S: Tensor
    start_T: Tensor

    @classmethod
    def of(cls, token_S: Tensor, tokens: int) -> TokenOrder:
        pair_S = torch.argsort(token_S, stable=True)
        counts_T = torch.bincount(token_S, minlength=tokens)
        return cls(pair_S, torch.cumsum(counts_T, 0) - counts_T)


def sum_per_token(y_SD: Tensor, weight_S: Tensor | None, order: TokenOrder, dtype: torch.dtype) -> Tensor:
    """sum over a token's pairs of weight * y, accumulated in fp32 (fp64 for fp64), as [T, D] of `dtype`."""
    wide = torch.promote_types(y_SD.dtype, torch.float32)
    if order.pair_S.numel() == 0:
        return y_SD.new_zeros(order.start_T.numel(), y_SD.shape[1], dtype=dtype)
    picked_S = None if weight_S is None else weight_S.to(wide)[order.pair_S]
    out_TD = embedding_bag(order.pair_S, y_SD.to(wide), order.start_T, mode="sum", per_sample_weights=picked_S)
    return out_TD.to(dtype)
