"""Retrofits as methods of the family `edit`: a router put in, trained on a text, and settled."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from moesaic.surgery.objective import Batch, Given, Objective
from moesaic.surgery.retrofit import Retrofit, check_trains, learns, plan_retrofit, retrofit


class Retrofitting(Objective):
    """Base: says which router with which options and balance losses; `start` sets what differs from retrofit's own start."""

    router = "topk"
    needs_text = False

    def __init__(self, train: str, balance: dict[str, Any] | None = None, **router_options: Any) -> None:
        check_trains("train", train)
        self.train, self.balance = train, dict(balance or {})
        self.router_options = {key: value for key, value in router_options.items() if value is not None}
        self.bank_options: dict[str, int] | None = None
        self.done: Retrofit

    def how(self, model: Any) -> dict[str, Any]:
        """Arguments of `retrofit` for this model."""
        return {"router_options": self.router_options, "balance": self.balance, "bank_options": self.bank_options}

    def plan(self, model: Any) -> dict[str, Any]:
        facts = plan_retrofit(model, self.router, **self.how(model))[0].facts()
        return {**facts, "trains": self.train}

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        how, measured = self.how(model), self.measure(model, given)
        self.done = retrofit(model, self.router, **how)
        self.start(model, measured)
        return learns(model, self.train)

    def measure(self, model: Any, given: Given) -> Any:
        """What `start` has to know of the model before it changes."""

    def start(self, model: Any, measured: Any) -> None:
        """Set the new parts where they begin."""

    def loss(self, model: Any, batch: Batch) -> Tensor:
        """The model's own loss on the text, to which a retrofitted model adds its balance losses."""
        return model(input_ids=batch["text"], labels=batch["text"], use_cache=False).loss

    def finish(self, model: Any) -> Any:
        return self.done.settle()
