"""A balance loss written down: any formula of the language of balance losses, such as one that a search has found."""

from __future__ import annotations

from torch import Tensor

from moesaic.balancing.balancer import Balancer, Scope, load_E, mean_probability_E, slots_per_token
from moesaic.balancing.language import evaluate, parse
from moesaic.core.registry import register
from moesaic.core.routing import Routing


@register("balancing", "expression", paper="2509.19349", card="layers-and-balancing.md#shinkaevolve")
class Expression(Balancer):
    """`text` in the language of `balancing/language.py`; the Switch loss by default. Raises BadInput for another text.

    In a recipe: `balance: {expression: {text: "E * sum(f * P)", coefficient: 0.01}}`.
    """

    def __init__(self, text: str = "E * sum(f * P)", coefficient: float = 0.01):
        self.tree, self.coefficient = parse(text), coefficient

    def loss(self, routing: Routing, scope: Scope) -> Tensor:
        needs_k = any(node.op == "K" for node in self.tree.walk())
        k = float(slots_per_token(routing, scope)) if needs_k else 0.0
        return evaluate(self.tree, load_E(routing, scope), mean_probability_E(routing, scope), k)
