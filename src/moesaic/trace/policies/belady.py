"""Belady: knows the future and keeps what is used soonest; the bound for every policy, as no engine can run it.

For experts of one size no policy has fewer misses, or, if it prefetches, moves fewer bytes. After an event, it keeps the
best of what was resident and what was loaded, so that what the event used may leave as soon as it ends.
"""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Scope


@register("policies", "belady", card="serving-and-scale.md#what-helped", needs={"future"}, causal=False)
class Belady(Policy):
    """`scope`: one cache for all layers, or the same share for each."""

    rule = S.FUTURE

    def __init__(self, scope: Scope = "global") -> None:
        self.scope = scope

    def setup(self) -> None:
        self.state.note[S.BYPASS] = 1
        self.state.note[S.PINS] = 0
