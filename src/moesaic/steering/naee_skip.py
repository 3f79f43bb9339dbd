"""NAEE's dynamic skipping: an expert that weighs little beside the token's first is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.steering.steer import ByPolicy
from moesaic.view import Policy, View
from moesaic.view.slots import empty, token_major
from moesaic.view.tap import Choice


@register("steering", "naee_skip", paper="2402.14800", card="surgery-and-steering.md#naee", exact=False)
class NaeeSkip(ByPolicy):
    """With weights w1 >= w2, the second expert is dropped when w2 < beta * w1; what remains takes over the token's sum.

    `beta`: one number for all layers, or {layer or block name: number}; the paper's is each layer's median of w2 / w1 on a
    calibration text (`median_ratios`). With more than two experts per token, every one below beta * w1 goes (the paper has
    top-2 only). beta 0 never skips; from 1 on only the first stays, ties of it included at 1.
    """

    def __init__(self, beta: float | Mapping[int | str, float]) -> None:
        numbers = list(beta.values()) if isinstance(beta, Mapping) else [beta]
        if not all(isinstance(n, int | float) and not isinstance(n, bool) and 0 <= n < float("inf") for n in numbers):
            raise BadInput(f"naee_skip: beta {beta!r}: 0 or more, or {{layer: number}}")
        self.beta = beta

    def check(self) -> None:
        blocks = self.experts()
        if isinstance(self.beta, Mapping):
            for key in self.beta:
                if not any(key in (block.name, block.layer) for block in blocks):
                    raise BadInput(f"naee_skip: no MoE block {key!r}; layers are {sorted({b.layer for b in blocks})}")

    def policy(self) -> Policy:
        return Policy(fn=self.skip)

    def skip(self, routing: Routing, block: Any) -> Routing | None:
        beta = self.beta
        if isinstance(beta, Mapping):
            beta = beta.get(block.name, beta.get(block.layer, 0.0))
        return empty(routing, beneath(routing, beta))


def beneath(routing: Routing, beta: float) -> Tensor:
    """Slots lighter than beta times their token's heaviest, bool [T, K]; never the heaviest itself."""
    ids_TK, weights_TK = token_major(routing)
    size_TK = weights_TK.detach().float().masked_fill(ids_TK < 0, 0)
    first_T1 = size_TK.amax(1, keepdim=True)
    return (size_TK < beta * first_T1) & (size_TK < first_T1) & (ids_TK >= 0)


def median_ratios(model: Any, blocks: View, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """Block name -> the median over tokens of the second weight by the first. Raises BadInput where k is 1."""
    found: dict[str, list[Tensor]] = {block.name: [] for block in blocks}

    def add(choice: Choice, block: Any) -> None:
        if choice.weights.shape[-1] < 2:
            raise BadInput(f"{block.name} gives each token one expert: there is no second one to skip")
        best_T2 = choice.weights.reshape(-1, choice.weights.shape[-1]).float().topk(2, -1).values
        found[block.name].append((best_T2[:, 1] / best_T2[:, 0]).cpu())

    handles = [block.on_choice(add) for block in blocks]
    device = model.get_input_embeddings().weight.device
    try:
        with torch.inference_mode():
            for ids in texts:
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(torch.cat(parts).median()) for name, parts in found.items()}
