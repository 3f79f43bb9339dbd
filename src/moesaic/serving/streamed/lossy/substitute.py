"""Substitute: cache-aware routing. After a token's first choices, experts in memory go before experts on disk.

The router itself runs again with the experts forced, so that weights are the architecture's own.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Dispatch
from moesaic.serving.streamed.layer import Layer
from moesaic.serving.streamed.lossy.mode import Changed, Lossy
from moesaic.view.policy import Choice
from moesaic.view.rerun import ids_at, rerun

if TYPE_CHECKING:
    from moesaic.serving.streamed.engine import Engine


@register("lossy", "substitute", card="serving-and-scale.md#what-did-not-help-or-only-sometimes", exact=False)
class Substitute(Lossy):
    """`first`: choices of a token that always stay. `among`: how many of its best experts the others may come from; at most
    all, and where no more than a token chooses, nothing changes."""

    def __init__(self, first: int = 2, among: int = 12) -> None:
        if first < 0 or among < 0:
            raise BadInput(f"substitute: first {first}, among {among}: give 0 or more")
        self.first, self.among = first, among
        self._here = threading.local()
        self._top_k = 0

    @property
    def neutral(self) -> bool:
        return self._top_k > 0 and (self.among <= self._top_k or self.first >= self._top_k)

    def attach(self, engine: Engine) -> None:
        self._top_k = max(layer.block.top_k for layer in engine.layers)
        for layer in engine.layers:
            block = layer.block
            if block.router is None:
                raise BadInput(f"substitute: {block.name} has no separate router whose choice could be changed")
            block.router.register_forward_hook(self._hook(engine, layer), with_kwargs=True)

    def _hook(self, engine: Engine, layer: Layer) -> Any:
        def after(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
            true = self._here.__dict__.setdefault("true", {})
            true.pop(layer.number, None)
            if engine.mode is not self or engine.looking_ahead:
                return None
            at = ids_at(output)
            true_TK = output[at]
            true[layer.number] = true_TK
            slots, most = true_TK.shape[1], min(self.among, layer.experts)
            if most <= slots or self.first >= slots:
                return None
            wide = rerun(module, args, kwargs, output, Choice(k=most), layer.experts)
            best_TM = wide[ids_at(wide)]
            weights = next(p for p in wide if isinstance(p, Tensor) and p.is_floating_point() and p.shape == best_TM.shape)
            here_E = torch.from_numpy(engine.policy.resident(layer.number)[: layer.experts])
            chosen_TK = prefer(true_TK, best_TM, weights, here_E, self.first)
            if torch.equal(chosen_TK, true_TK):
                return None
            return rerun(module, args, kwargs, output, Choice(force_TK=chosen_TK), layer.experts)

        return after

    def choose(self, layer: Layer, dispatch: Dispatch, ids_TK: Tensor | None, absent_E: Tensor) -> Changed:
        true_TK = self._here.__dict__.get("true", {}).pop(layer.number, None)
        if ids_TK is None or true_TK is None or true_TK.shape[0] != dispatch.tokens:
            return Changed(dispatch, ids_TK)
        ran_TK = ids_TK.reshape(dispatch.tokens, -1)
        return Changed(dispatch, ids_TK, int((true_TK[:, :, None] != ran_TK[:, None, :]).all(2).sum()))


def prefer(true_TK: Tensor, wide_TM: Tensor, weight_TM: Tensor, here_E: Tensor, first: int) -> Tensor:
    """The choice [T, K]: a token's `first` choices, then what is here, then the rest, each by weight. `wide_TM`: its best M.

    Rows in which nothing changes are as they were, in their order.
    """
    slots = true_TK.shape[1]
    order_TM = weight_TM.float().sort(dim=1, descending=True, stable=True).indices
    wide_TM = wide_TM.gather(1, order_TM)
    is_true_TM = (wide_TM[:, :, None] == true_TK[:, None, :]).any(2)
    always_TM = is_true_TM & (is_true_TM.cumsum(1) <= first)
    rank_TM = torch.arange(wide_TM.shape[1], 0, -1).expand_as(wide_TM)
    value_TM = rank_TM + wide_TM.shape[1] * here_E[wide_TM].long() + 2 * wide_TM.shape[1] * always_TM.long()
    chosen_TK = wide_TM.gather(1, value_TM.topk(slots, 1).indices)
    same_T = (chosen_TK[:, :, None] == true_TK[:, None, :]).any(2).all(1)
    return torch.where(same_T[:, None], true_TK, chosen_TK)
