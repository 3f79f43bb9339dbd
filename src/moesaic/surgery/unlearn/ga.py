"""GA: gradient ascent on the text to forget."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moesaic.core.registry import register
from moesaic.surgery.objective import Batch, nats
from moesaic.surgery.unlearning import Unlearning


@register("unlearn", "ga", paper="2210.01504", card="surgery-and-steering.md#seuf--uoe", exact=False)
class GA(Unlearning):
    """-NLL(forget), per token. Nothing holds it back: few steps, a low rate, or `until`."""

    texts = ("forget",)

    def forget(self, model: Any, batch: Batch) -> Tensor:
        return -nats(model, batch["forget"])
