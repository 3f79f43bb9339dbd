"""What a router returns and what kernels eat.

Shape legend, used as name suffixes everywhere: T tokens, D model width, I expert inner width, E experts,
K slots per token, S routed (token, expert) pairs, C slots per expert, G groups (sequences), L layers, B batch,
N sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """Routed pairs in any order: the form of expert-choice and transport routers."""

    token_S: Tensor
    expert_S: Tensor
    weight_S: Tensor


@dataclass(frozen=True)
class Routing:
    """One routing decision for T tokens. Exactly one of four forms is filled:

    - token-major: `experts_TK` (int64, -1 = empty slot) and `weights_TK`; variable K is empty slots;
    - pair list: `pairs`, where experts pick tokens;
    - soft: `merge_GE` and `group_T`: token t runs the parameter average that row group_T[t] weighs;
    - keyed: `keyed_T2HN`, the gates of H heads over N keys of two sides. Expert (i, j) of N * N weighs
      sum_h keyed[0, h, i] * keyed[1, h, j], and is never listed: the rows of the routing are its 2 * H * N keys.

    `logits_TE` are raw, as scored; `probs_TE` is whatever the load losses call probability; `dropped_TK` marks
    slots that were selected but overflowed their expert (counts for balancing come before dropping);
    `selected_TK` then still holds the choice. Weights need not sum to 1. `state` is handed to the next MoE layer's
    router. `carry` holds what layers thread through depth (ctx.carry of the next one). `passes` are the routings of a
    layer that routes several times; its own columns are then theirs side by side.
    """

    logits_TE: Tensor
    probs_TE: Tensor | None = None
    experts_TK: Tensor | None = None
    weights_TK: Tensor | None = None
    selected_TK: Tensor | None = None
    dropped_TK: Tensor | None = None
    pairs: Pairs | None = None
    merge_GE: Tensor | None = None
    group_T: Tensor | None = None
    keyed_T2HN: Tensor | None = None
    aux: dict[str, Tensor] = field(default_factory=dict)
    state: Any = None
    carry: Mapping[str, Any] | None = None
    passes: tuple[Routing, ...] = ()

    @property
    def tokens(self) -> int:
        return self.logits_TE.shape[0]

    @property
    def num_experts(self) -> int:
        return self.logits_TE.shape[1]

    @property
    def soft(self) -> bool:
        return self.merge_GE is not None

    def counts_E(self, mask_T: Tensor | None = None) -> Tensor:
        """Selected pairs per expert before dropping, float32 [E]; tokens with mask_T False do not count."""
        if self.soft:
            raise ValueError("a soft routing selects no pairs: it has no counts")
        if self.keyed_T2HN is not None:
            on_TE = (self.keyed_T2HN > 0).flatten(1)
            return (on_TE if mask_T is None else on_TE[mask_T]).sum(0).float()
        if self.pairs is not None:
            expert_S, keep_S = self.pairs.expert_S, None if mask_T is None else mask_T[self.pairs.token_S]
        else:
            chosen_TK = self.experts_TK if self.selected_TK is None else self.selected_TK
            assert chosen_TK is not None, "a routing fills experts_TK, pairs or merge_GE"
            expert_S = chosen_TK.reshape(-1)
            keep_S = expert_S >= 0
            if mask_T is not None:
                keep_S = keep_S & mask_T.repeat_interleave(chosen_TK.shape[1])
        if keep_S is not None:
            expert_S = expert_S[keep_S]
        return torch.bincount(expert_S, minlength=self.num_experts).float()

    def drop(self, dropped_TK: Tensor) -> Routing:
        """This routing without the marked slots, which stay in `selected_TK`: they were chosen, and count as load."""
        assert self.experts_TK is not None, "only a token-major routing drops slots"
        assert self.weights_TK is not None
        return self.replace(
            experts_TK=self.experts_TK.masked_fill(dropped_TK, -1),
            weights_TK=self.weights_TK.masked_fill(dropped_TK, 0.0),
            selected_TK=self.experts_TK if self.selected_TK is None else self.selected_TK,
            dropped_TK=dropped_TK if self.dropped_TK is None else self.dropped_TK | dropped_TK,
        )

    def replace(self, **changes: Any) -> Routing:
        return replace(self, **changes)


@dataclass(frozen=True)
class Dispatch:
    """Routed pairs sorted by stored expert: what every kernel and every bank runs.

    `token_S` int64, `weight_S` (differentiable), `offsets_E1` int64 [E + 1]: expert e owns pairs
    offsets[e] : offsets[e + 1]. Inside one expert the pairs keep token order. `tokens` is T.
    """

    token_S: Tensor
    weight_S: Tensor
    offsets_E1: Tensor
    tokens: int

    @classmethod
    def of(cls, routing: Routing, row_to_expert: Tensor | None = None, num_stored: int | None = None) -> Dispatch:
        """Sort a routing's pairs by expert; empty slots vanish. `row_to_expert` maps router rows to stored experts."""
        if routing.soft:
            raise ValueError("a soft routing merges parameters: it has no dispatch")
        if routing.keyed_T2HN is not None:
            raise ValueError("a keyed routing lists no experts: only a bank with `run_keyed` runs it")
        if routing.pairs is not None:
            token_S, expert_S, weight_S = routing.pairs
        else:
            assert routing.experts_TK is not None, "a routing fills experts_TK, pairs or merge_GE"
            assert routing.weights_TK is not None
            expert_S, weight_S = routing.experts_TK.reshape(-1), routing.weights_TK.reshape(-1)
            token_S = torch.arange(expert_S.numel(), device=expert_S.device) // routing.experts_TK.shape[1]
        rows = routing.num_experts if num_stored is None else num_stored
        return cls.sort(token_S, expert_S, weight_S, rows, routing.tokens, row_to_expert)

    @classmethod
    def of_slots(cls, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Dispatch:
        """From the pair of tensors every transformers MoE block hands to its experts; ids outside [0, E) are empty."""
        expert_S = experts_TK.reshape(-1).long()
        token_S = torch.arange(expert_S.numel(), device=expert_S.device) // experts_TK.shape[1]
        expert_S = torch.where(expert_S < num_experts, expert_S, -1)
        return cls.sort(token_S, expert_S, weights_TK.reshape(-1), num_experts, experts_TK.shape[0])

    @classmethod
    def sort(
        cls,
        token_S: Tensor,
        expert_S: Tensor,
        weight_S: Tensor,
        num_experts: int,
        tokens: int,
        row_to_expert: Tensor | None = None,
    ) -> Dispatch:
        if row_to_expert is not None:
            expert_S = torch.where(expert_S >= 0, row_to_expert[expert_S.clamp(min=0)], -1)
        expert_S, order_S = torch.sort(expert_S, stable=True)
        counts_E1 = torch.bincount(expert_S + 1, minlength=num_experts + 1)
        empty = counts_E1[0]
        offsets_E1 = torch.cumsum(counts_E1, 0) - empty
        order_S = order_S[int(empty) :]
        return cls(token_S[order_S], weight_S[order_S], offsets_E1, tokens)

    @property
    def num_experts(self) -> int:
        return self.offsets_E1.numel() - 1

    @property
    def counts_E(self) -> Tensor:
        return self.offsets_E1.diff()

    @property
    def expert_S(self) -> Tensor:
        """Expert of each sorted pair, int64 [S]."""
        return torch.repeat_interleave(torch.arange(self.num_experts, device=self.token_S.device), self.counts_E)

    def combine(self, y_SD: Tensor) -> Tensor:
        """Weighted sum of the experts' outputs back to tokens, [T, D] in the dtype of y."""
        out_TD = y_SD.new_zeros(self.tokens, y_SD.shape[1])
        return out_TD.index_add(0, self.token_S, y_SD * self.weight_S.unsqueeze(1).to(y_SD.dtype))
