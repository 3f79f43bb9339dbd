"""Read-ME: one early router knows all routing of the queued requests; prefetch exactly and evict by next use.

Card serving-and-scale.md, "Read-ME: dense-to-MoE with one early router", its serving part; the surgery is not here. On the
trace of an ordinary model this replays what such a router would make possible.
"""

from __future__ import annotations

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Scope


@register(
    "policies", "read_me", paper="2410.19123", card="serving-and-scale.md#read-me-dense-to-moe-with-one-early-router",
    needs={"future"}, causal=False,
)  # fmt: skip
class ReadMe(Policy):
    """`horizon`: passes ahead of which the routing is known (0: of all queued requests). `ahead`: layers prefetched for."""

    rule = S.FUTURE
    source = S.TRUTH

    def __init__(self, horizon: int = 0, ahead: int = 1, scope: Scope = "global") -> None:
        if horizon < 0 or ahead < 0:
            raise BadInput(f"horizon {horizon}, ahead {ahead}: give 0 or more")
        self.horizon, self.ahead, self.scope = horizon, ahead, scope

    def setup(self) -> None:
        note = self.state.note
        note[S.HORIZON], note[S.DEPTH], note[S.WRAP] = self.horizon, self.ahead, 1
        note[S.SOURCE] = S.TRUTH if self.ahead else S.NOTHING
