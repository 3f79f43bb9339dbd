"""GradDiff: ascent on the text to forget, descent on a text to retain."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.objective import Batch, nats
from moesaic.surgery.unlearning import Retaining


@register("unlearn", "graddiff", paper="2203.12817", card="surgery-and-steering.md#seuf--uoe", exact=False)
class GradDiff(Retaining):
    """-forget_weight NLL(forget) + retain_weight R(retain), per token.

    R is the likelihood (`retain="nll"`) or the divergence from the model as it was (`"kl"`).
    """

    def __init__(self, forget_weight: float = 1.0, retain_weight: float = 1.0, retain: str = "nll") -> None:
        super().__init__(retain, retain_weight)
        self.forget_weight = forget_weight

    def forget(self, model: Any, batch: Batch) -> Tensor:
        return -self.forget_weight * nats(model, batch["forget"])
