"""MoE++ retrofit: constants, copies and zeros behind trained experts, which nobody chooses until training lets them in.

Shape legend: T tokens, D width, C constants.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.models.hosted.install import hosted_routers
from moesaic.surgery.objective import Batch, Given
from moesaic.surgery.retrofitting import Retrofitting
from moesaic.trace import corpus
from moesaic.view.block import View

ENOUGH = 1 << 14
"""Tokens over which a layer's mean output is taken."""


@register("edit", "moepp", paper="2410.07348", card="surgery-and-steering.md#moe++-retrofit", exact=False)
class MoEPlusPlus(Retrofitting):
    """routing/moepp.py and cheap experts, started so that the model's function stays: the residual of logits is 0, the new
    rows are the real ones' mean, and a logit bias of `bias` (-20) keeps them from being chosen. Constants start at the
    layer's mean output over the text, half of it (W_c = 0); without a text at 0.

    While training, each layer's bias rises by `rate` per step while less than `share` of its choices are cheap, and falls
    otherwise. `balance` weighs cheap experts' load by tau. Inputs are not multiplied by k. The retrofit is the card's own:
    the paper trains from scratch.
    """

    router = "moepp"

    def __init__(
        self,
        constants: int = 2,
        copies: int = 1,
        zeros: int = 1,
        bias: float = -20.0,
        share: float = 0.25,
        rate: float = 0.5,
        balance: float = 0.0,
        train: str = "router",
    ) -> None:
        if not 0 <= share < 1 or rate < 0 or balance < 0:
            raise BadInput(f"share={share}, rate={rate}, balance={balance}: a share in [0, 1), and nothing negative")
        super().__init__(train, {"moepp": balance} if balance else None, cheap_bias=bias)
        self.bank_options = {"constants": constants, "copies": copies, "zeros": zeros}
        self.share, self.rate = share, rate

    def how(self, model: Any) -> dict[str, Any]:
        return {**super().how(model), "bank": "zero_computation"}

    def measure(self, model: Any, given: Given) -> dict[int, Tensor]:
        """Layer number -> mean output of its experts [D] over the text; empty without one."""
        text = given.texts.get("text")
        if not text:
            return {}
        found, tokens = [], 0
        for piece in corpus.pieces(text, given.tokenizer, given.seq_len):
            found.append(piece)
            tokens += len(piece.ids)
            if tokens >= ENOUGH:
                break
        sums: dict[int, Tensor] = {}
        now: list[corpus.Batch] = []

        def add(x_TD: Tensor, routing: Any, y_TD: Tensor, block: Any) -> None:
            real_T = now[-1].mask_BN.reshape(-1).bool().to(y_TD.device)
            sums[block.layer] = sums.get(block.layer, 0) + y_TD[real_T].double().sum(0)

        with ExitStack() as hooks:
            for block in View(model):
                hooks.enter_context(block.on_experts(add))
            size = corpus.batch_size(model, max(len(piece.ids) for piece in found))
            corpus.read(model, found, size=size, before=lambda batch: now.append(batch))
        return {layer: total_D / tokens for layer, total_D in sums.items()}

    @torch.no_grad()
    def start(self, model: Any, measured: dict[int, Tensor]) -> None:
        for block in View(model):
            bank: Any = block.experts
            bank.mix_C2D.zero_()
            if block.layer in measured and len(bank.vector_CD):
                bank.vector_CD.copy_(measured[block.layer].to(bank.vector_CD.dtype).expand_as(bank.vector_CD))

    def loss(self, model: Any, batch: Batch) -> Tensor:
        total = super().loss(model, batch)
        with torch.no_grad():
            for hosted in hosted_routers(model):
                experts_TK = hosted.calls.routings[hosted.layer].experts_TK
                assert experts_TK is not None
                cheap = float((experts_TK >= hosted.num_experts).sum()) / max(1, int((experts_TK >= 0).sum()))
                bias: Any = hosted.router.cheap_bias
                bias += self.rate if cheap < self.share else -self.rate
        return total

    def facts(self) -> dict[str, Any]:
        return {"cheap_bias": [float(h.router.cheap_bias) for h in hosted_routers(self.done.model)]}  # type: ignore[arg-type]
