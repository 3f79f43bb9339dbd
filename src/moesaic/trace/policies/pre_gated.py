"""Pre-gated MoE: every block's gate stands one block earlier, so that exactly what is needed is copied in time.

Card serving-and-scale.md, "Pre-gated MoE: gate of block N picks for N+1". It changes the model and needs training. On the
trace of an ordinary model, a layer's choices are those that its router makes of the layer before; the first layer's are
its own. Two blocks' experts are held at a time, whatever the cache could hold.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.order import Order
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Replayed


@register(
    "policies", "pre_gated", paper="2308.12066", card="serving-and-scale.md#pre-gated-moe-gate-of-block-n-picks-for-n1",
    exact=False, needs={"ahead"},
)  # fmt: skip
class PreGated(Policy):
    """`routing`: ahead (an ordinary model's trace: moved gates choose), or recorded (the trace of a pre-gated model)."""

    rule = S.GIVEN
    source = S.TRUTH

    def __init__(self, routing: Literal["ahead", "recorded"] = "ahead") -> None:
        if routing not in ("ahead", "recorded"):
            raise BadInput(f"routing {routing!r}: ahead or recorded")
        self.routing = routing

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"ahead"} if self.routing == "ahead" else ())

    def slots(self) -> np.ndarray:
        return np.zeros(len(self.shape.experts_L), np.int64)

    def setup(self) -> None:
        note = self.state.note
        self.staging_bytes = self.capacity_bytes
        note[S.ADMIT], note[S.STAGE], note[S.STAGE_ROOM] = 0, 1, self.capacity_bytes

    def replayed(self, trace: Any, order: Order) -> Replayed:
        if self.routing == "recorded" or len(trace.layers) < 2:
            return Replayed()
        ids_TLK = np.array(trace.experts_TLK)
        moved = np.asarray(trace.ahead_TLAM)[:, :-1, 0, : trace.top_k]
        same = total = 0
        for k in range(moved.shape[2]):
            held = moved[..., k] != trace.empty
            same += int(((ids_TLK[:, 1:] == moved[..., k][..., None]).any(2) & held).sum())
            total += int(held.sum())
        ids_TLK[:, 1:, : moved.shape[2]] = moved
        ids_TLK[:, 1:, moved.shape[2] :] = trace.empty
        return Replayed(experts_TLK=ids_TLK, notes=(f"moved gates agree with {same / max(1, total):.1%} of recorded choices",))
