"""The unlearning losses' common ground: a forget term and a retain term, on all parameters or on those that SEUF names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from moesaic.core.errors import BadInput
from moesaic.surgery.objective import Batch, Frozen, Given, Objective, log_probs, nats

RETAIN = ("nll", "kl")


class Unlearning(Objective):
    """loss = forget + retain_weight * retain. Batches hold ids [B, N] under "forget" and, where a term asks, "retain".

    By itself a method trains the whole model; SEUF calls `watch`, `forget` and `retain` for its few parameters.
    """

    texts: tuple[str, ...] = ("forget", "retain")
    retain_weight = 1.0
    uses_reference = False
    """Whether a term looks at the model as it was."""

    def plan(self, model: Any) -> dict[str, Any]:
        return {"stock": True, "reason": "only weights change", "trains": "all parameters"}

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        parameters = self.learns(model)
        self.watch(model, parameters, given)
        return parameters

    def learns(self, model: Any) -> list[nn.Parameter]:
        return list(model.parameters())

    def watch(self, model: Any, parameters: Sequence[nn.Parameter], given: Given, layer: int | None = None) -> None:
        """Remember what the terms need: the parameters as they are. `layer`: where SEUF's expert sits."""
        self.frozen = Frozen(parameters) if self.uses_reference else Frozen(())

    def forget(self, model: Any, batch: Batch) -> Tensor:
        raise NotImplementedError

    def retain(self, model: Any, batch: Batch) -> Tensor | None:
        return None

    def loss(self, model: Any, batch: Batch) -> Tensor:
        total, kept = self.forget(model, batch), self.retain(model, batch)
        return total if kept is None else total + self.retain_weight * kept


class Retaining(Unlearning):
    """With the usual retain terms: likelihood of the retain text, or divergence from the model as it was on it."""

    def __init__(self, retain: str, retain_weight: float) -> None:
        if retain not in RETAIN:
            raise BadInput(f"retain={retain!r}: one of {', '.join(RETAIN)}")
        if retain_weight < 0:
            raise BadInput(f"retain_weight={retain_weight}: must not be negative")
        self.kind, self.retain_weight = retain, retain_weight
        if retain_weight == 0:
            self.texts = ("forget",)

    @property
    def uses_reference(self) -> bool:  # type: ignore[override]
        return self.kind == "kl" and self.retain_weight > 0

    def retain(self, model: Any, batch: Batch) -> Tensor | None:
        if self.retain_weight == 0:
            return None
        ids_BN = batch["retain"]
        if self.kind == "nll":
            return nats(model, ids_BN)
        with self.frozen(model):
            before_BNV = model(input_ids=ids_BN, use_cache=False).logits.float().log_softmax(-1)
        now_BNV = model(input_ids=ids_BN, use_cache=False).logits.float().log_softmax(-1)
        return nn.functional.kl_div(now_BNV, before_BNV, reduction="none", log_target=True).sum(-1).mean()


def sequence_log_probs(model: Any, ids_BN: Tensor) -> Tensor:
    """log p of whole rows, [B]: what NPO's ratios are made of."""
    return log_probs(model, ids_BN).sum(-1)
