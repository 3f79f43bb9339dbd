"""LRU: the expert that was used longest ago leaves; per layer, or over all layers.

Card serving-and-scale.md, "Expert streaming as users ask for it": the default of every engine, hard to beat.
"""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.trace.policies import state as S
from moesaic.trace.policies.policy import Policy, Scope


@register("policies", "lru", card="serving-and-scale.md#expert-streaming-as-users-ask-for-it")
class LRU(Policy):
    """`bypass_tokens`: passes of at least so many tokens fill free room only, so that a prompt does not flush the cache (0:
    they cache like any other)."""

    rule = S.RECENCY

    def __init__(self, scope: Scope = "layer", bypass_tokens: int = 0) -> None:
        self.scope, self.bypass_tokens = scope, bypass_tokens
