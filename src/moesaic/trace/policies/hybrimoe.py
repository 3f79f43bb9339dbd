"""HybriMoE: smoothed top scores keep an expert, a simulated schedule says who computes it and what to fetch ahead.

Card serving-and-scale.md, "HybriMoE: simulated CPU-GPU schedule per layer". Prefetch follows the paper: what shortens the
coming schedules most. In passes of many tokens the scores are means over them.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.cache import put
from moesaic.trace.policies.policy import Policy


@register(
    "policies", "hybrimoe", paper="2504.05897", card="serving-and-scale.md#hybrimoe-simulated-cpu-gpu-schedule-per-layer",
    needs={"scores", "ahead"},
)  # fmt: skip
class HybriMoE(Policy):
    """`alpha`: weight of the latest scores. `top`: scores kept per token (0: twice its slots). `scores`: softmax of the
    logits, or sigmoid, normalised to sum 1, for models that score so. `ahead`: layers to prefetch for (0: none). `host`:
    let the host compute; `host_tokens`: in passes of fewer tokens than this only (0: in all; their code: 2). `preload`:
    begin with a full cache, the first experts of each layer; else, where the host is quick, prefetch alone fills it."""

    rule = S.SCORES
    source = S.IMPACT
    where = S.SCHEDULE

    def __init__(
        self,
        alpha: float = 0.5,
        top: int = 0,
        scores: Literal["softmax", "sigmoid"] = "softmax",
        ahead: int = 3,
        host: bool = True,
        host_tokens: int = 0,
        preload: bool = False,
    ) -> None:
        if not 0 <= alpha <= 1:
            raise BadInput(f"alpha {alpha}: between 0 and 1")
        if scores not in ("softmax", "sigmoid"):
            raise BadInput(f"scores {scores!r}: softmax or sigmoid")
        if min(top, ahead, host_tokens) < 0:
            raise BadInput("top, ahead and host_tokens: give 0 or more")
        self.alpha, self.top, self.scores, self.ahead = alpha, top, scores, ahead
        self.host, self.host_tokens, self.preload = host, host_tokens, preload

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"scores", "ahead"} if self.ahead else {"scores"})

    def setup(self) -> None:
        note, number = self.state.note, self.state.number
        number[S.ALPHA], number[S.TOP] = self.alpha, self.top or 2 * self.shape.top_k
        note[S.SIGMOID] = int(self.scores == "sigmoid")
        note[S.DEPTH] = self.ahead
        note[S.SOURCE] = S.IMPACT if self.ahead else S.NOTHING
        note[S.WHERE] = S.SCHEDULE if self.host else S.MOVE
        note[S.HOST_TOKENS] = self.host_tokens or np.iinfo(np.int64).max
        if self.preload:
            for layer, experts in enumerate(self.shape.experts_L):
                for e in range(experts):
                    if self.shape.sizes_LE[layer, e] <= self.state.group[S.ROOM, layer]:
                        put(self.state, layer, e, S.HERE)
