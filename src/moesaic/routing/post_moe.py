"""Post-MoE's hybrid routing: in training a token's language expert is always among its k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.routing.router import Router
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.task_rows import ids_of
from moesaic.routing.weigh import gather, renormalise

FAMILIES_50 = {
    "sino-tibetan": 0, "ko ja ne": 1, "th vi lo": 2, "austronesian": 3, "indo-european and isolates": 4, "afro-asiatic": 5,
    "niger-congo and ha": 6,
}  # fmt: skip
"""Expert of each language family in the paper's 50-language model; a new language needs a family, not a new row."""


@register("routing", "post_moe", paper="2410.10626", card="routing.md#post-moe", needs={"language_ids"})
class PostMoE(Router):
    """p = softmax(W x), the k best; in training, when the language's expert is not among them, it takes the LAST slot.

    Weights are p at the final choice, not renormalised: an upcycled model then shrinks by the mass left out.
    `renormalised=True` keeps a conversion function-preserving. Evaluation is plain top-k and reads no language.
    `experts_of` maps language id -> expert (identity by default); -1 in `language_ids` is a token of no language.
    k = 1 is the language-specific baseline: in training that expert with weight 1. MoE in the last layers only is the
    model's choice of layers. The load loss has coefficient 0.
    """

    needs = frozenset({"language_ids"})

    def __init__(self, dim: int, experts: int, k: int = 2, experts_of: Sequence[int] | None = None, renormalised: bool = False):
        super().__init__(experts, k)
        table = list(range(experts)) if experts_of is None else list(experts_of)
        if not table or not all(0 <= e < experts for e in table):
            raise BadInput(f"experts_of={table}: numbers below experts={experts}, one for each language")
        self.renormalised = renormalised
        self.score = LinearScore(dim, experts)
        self.expert_of: Tensor
        self.register_buffer("expert_of", torch.tensor([*table, -1]))

    def select(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        experts_TK = top_k(logits_TE, self.k)
        if not ctx.training or not self.k:
            return experts_TK
        given_T = ctx.need("language_ids", "post_moe")
        languages = len(self.expert_of) - 1
        known_T = ids_of(ctx.replace(language_ids=given_T.clamp(min=0)), "language_ids", languages, "post_moe")
        own_T = torch.where(given_T >= 0, self.expert_of[known_T], -1)
        missing_T = (own_T >= 0) & (experts_TK != own_T.unsqueeze(1)).all(1)
        last_T = torch.where(missing_T, own_T, experts_TK[:, -1])
        return torch.cat([experts_TK[:, :-1], last_T.unsqueeze(1)], 1)

    def weigh(self, logits_TE: Tensor, experts_TK: Tensor, ctx: RoutingContext) -> Tensor:
        weights_TK = gather(logits_TE.softmax(-1), experts_TK)
        if self.k == 1 and ctx.training:
            return torch.ones_like(weights_TK)
        return renormalise(weights_TK) if self.renormalised else weights_TK
