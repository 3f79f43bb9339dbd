"""SEUF (UOE): the one expert that serves the text to forget is edited, with its router anchored to it.

Shape legend: B batch, N tokens, T = B * N, E experts.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.core import registry
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.surgery.attribution import attribution, probabilities
from moesaic.surgery.objective import Batch, Given
from moesaic.surgery.sliced import put_back, take_out
from moesaic.surgery.unlearning import Unlearning
from moesaic.view.block import Block, View
from moesaic.view.tap import Choice

LOSSES = ("ga", "graddiff", "npo", "rmu")
SCOPES = ("expert", "all")


def anchor_loss(probs_TE: Tensor, target: int) -> Tensor:
    """Mean over tokens of |g - onehot(target)|^2, in [0, 2]; descending it raises the target's logit for every token."""
    one_hot_E = torch.zeros_like(probs_TE[0])
    one_hot_E[target] = 1
    return (probs_TE - one_hot_E).square().sum(-1).mean()


@register("unlearn", "seuf", paper="2411.18797", card="surgery-and-steering.md#seuf--uoe", exact=False)
class SEUF(Unlearning):
    """forget + retain_weight * retain + anchor * |g - onehot|^2 on forget tokens; one expert and its layer's router learn.

    Options:
        loss: ga, graddiff, npo or rmu, with `loss_options` of that method. Its own retain_weight does not count but for
            rmu, whose two terms are of different units.
        experts: how many experts are edited; the paper's ablation says 1.
        target: "layer:expert" (several: "3:7+4:1"); "random" draws them. By default those with the highest attribution:
            the mean router probability over the forget text, each sequence weighing the same.
        scope: "all" trains every parameter: with anchor 0 that is the plain method.

    Every other parameter, and every other expert of the fused tensors, keeps its bits: the chosen expert learns apart from
    them (surgery/sliced.py). g is the softmax of the router's scores over all experts, whatever the router selects by.
    No code was released; the losses follow locuslab/open-unlearning.
    """

    def __init__(
        self,
        loss: str = "npo",
        loss_options: dict[str, Any] | None = None,
        experts: int = 1,
        target: str | None = None,
        anchor: float = 1.0,
        retain_weight: float = 1.0,
        scope: str = "expert",
    ) -> None:
        if loss not in LOSSES:
            raise BadInput(f"loss={loss!r}: one of {', '.join(LOSSES)}")
        if scope not in SCOPES:
            raise BadInput(f"scope={scope!r}: one of {', '.join(SCOPES)}")
        if experts < 1 or anchor < 0 or retain_weight < 0:
            raise BadInput(f"experts={experts}, anchor={anchor}, retain_weight={retain_weight}: at least 1, 0 and 0")
        entry = registry.get("unlearn", loss)
        try:
            self.inner: Unlearning = entry.build(**(loss_options or {}))
        except TypeError as error:
            known = ", ".join(entry.parameters) or "none"
            raise BadInput(f"loss_options of {loss}: {error}; its options are {known}") from error
        self.count, self.given_target, self.anchor, self.scope = experts, target, anchor, scope
        self.retain_weight = retain_weight * (self.inner.retain_weight if loss == "rmu" else 1.0)
        self.texts = self.inner.texts if retain_weight else ("forget",)
        self.targets: list[tuple[Block, int]] = []
        self.attributed: dict[int, Tensor] = {}

    def plan(self, model: Any) -> dict[str, Any]:
        blocks = View(model)
        for block in blocks:
            if block.router is None or not any(p.dim() == 2 for p in block.router.parameters()):
                raise BadInput(f"{block.name} has no router matrix of its own, which SEUF trains")
        if self.count > sum(block.num_experts for block in blocks):
            raise BadInput(f"experts={self.count}: the model has {sum(block.num_experts for block in blocks)} experts")
        named = self._named(blocks)
        if self.scope == "all":
            trains = "all parameters"
        elif named:
            trains = ", ".join(f"expert {e} of layer {block.layer}" for block, e in named) + " and their routers"
        else:
            trains = f"the {self.count} expert(s) most used by the forget text, and the router(s) of their layers"
        return {"stock": True, "reason": "only weights change", "trains": trains}

    def prepare(self, model: Any, given: Given) -> list[nn.Parameter]:
        self.plan(model)
        blocks = View(model)
        self.targets = self._named(blocks, given.seed)
        if not self.targets:
            self.attributed = attribution(model, given.tokenizer, given.texts["forget"], given.seq_len)
            ranked = [(float(s), block, e) for block in blocks for e, s in enumerate(self.attributed[block.layer])]
            ranked.sort(key=lambda found: -found[0])
            self.targets = [(block, e) for _, block, e in ranked[: self.count]]
        self.edited = {id(block): block for block, _ in self.targets}
        if self.scope == "all":
            parameters = list(model.parameters())
        else:
            routers = [p for block in self.edited.values() for p in block.router.parameters() if p.dim() == 2]
            parts = [
                part
                for key, block in self.edited.items()
                for part in take_out(block, [e for other, e in self.targets if id(other) == key])
            ]
            parameters = [*(p for part in parts for p in part.parameters()), *routers]
        deepest = max(block.layer for block, _ in self.targets)
        self.inner.watch(model, parameters, given, deepest)
        return parameters

    def loss(self, model: Any, batch: Batch) -> Tensor:
        if not self.anchor:
            return super().loss(model, batch)
        self.anchors: list[Tensor] = []
        handles = [block.on_choice(self._anchor, scores=True) for block in self.edited.values()]
        try:
            total = self.forget(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        total = total + self.anchor * torch.stack(self.anchors).mean()
        kept = self.retain(model, batch) if self.retain_weight else None
        return total if kept is None else total + self.retain_weight * kept

    def forget(self, model: Any, batch: Batch) -> Tensor:
        return self.inner.forget(model, batch)

    def retain(self, model: Any, batch: Batch) -> Tensor | None:
        return self.inner.retain(model, batch) if self.retain_weight else None

    def finish(self, model: Any) -> Any:
        if self.scope != "all":
            for block in self.edited.values():
                put_back(block)
        return model

    def state(self) -> dict[str, Tensor]:
        return self.inner.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.inner.load_state(state)

    def facts(self) -> dict[str, Any]:
        found = [{"layer": block.layer, "expert": e, **self._share(block, e)} for block, e in self.targets]
        return {"edited": found, **self.inner.facts()}

    def _share(self, block: Block, e: int) -> dict[str, float]:
        return {"attribution": float(self.attributed[block.layer][e])} if self.attributed else {}

    def _anchor(self, choice: Choice, block: Block) -> None:
        if torch.is_grad_enabled():  # not the reference's forward
            probs_TE = probabilities(block, choice)
            self.anchors += [anchor_loss(probs_TE, e) for other, e in self.targets if other is block]

    def _named(self, blocks: View, seed: int = 0) -> list[tuple[Block, int]]:
        """The experts that the options name; none where attribution is to say."""
        if self.given_target is None:
            return []
        if self.given_target == "random":
            every = [(block, e) for block in blocks for e in range(block.num_experts)]
            return random.Random(seed).sample(every, self.count)
        by_layer, found = {block.layer: block for block in blocks}, []
        for word in str(self.given_target).split("+"):
            layer, _, expert = word.strip().partition(":")
            if not layer.isdigit() or not expert.isdigit():
                raise BadInput(f"target={self.given_target!r}: write layer:expert, such as 3:7, or random")
            block = by_layer.get(int(layer))
            if block is None or int(expert) >= block.num_experts:
                known = f"layers {', '.join(map(str, by_layer))}" if block is None else f"experts 0 to {block.num_experts - 1}"
                raise BadInput(f"target {word.strip()}: the model has {known}")
            found.append((block, int(expert)))
        if len({(id(block), e) for block, e in found}) < len(found):
            raise BadInput(f"target={self.given_target!r}: name each expert once")
        return found
