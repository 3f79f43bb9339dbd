"""SCMoE: every token is drawn from the contrast between the model and itself under weaker routing."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.steering.steer import Steer
from moesaic.view import Policy
from moesaic.view.course import Course
from moesaic.view.policy import resolve
from moesaic.view.slots import token_major


@register(
    "steering", "scmoe", paper="2405.14507", exact=False,
    card="surgery-and-steering.md#scmoe-self-contrast-between-strong-and-weak-routing",
)  # fmt: skip
class Scmoe(Steer):
    """Score (1 + beta) s - beta w of the tokens with s >= log(alpha) + max s, no other: s from the model as it routes, w from
    a second pass whose every MoE layer runs one expert per token, with a cache of its own, prompt included.

    `weak`: "rank" runs the `rank`-th best expert (2: the second; the released code counts from 0), "random" one expert drawn
    by `seed` for each token and layer, with the token's whole weight. The expert's weight is what the architecture gives it
    when it is the only one: 1, or its scaling factor, where weights are renormalised (the paper's case), its probability
    where they are not. Two passes per token and two caches.
    """

    def __init__(
        self, beta: float = 0.5, alpha: float = 0.1, weak: Literal["rank", "random"] = "rank", rank: int = 2, seed: int = 0
    ) -> None:
        if not 0 <= beta < float("inf") or not 0 < alpha <= 1:
            raise BadInput(f"scmoe: beta {beta} is 0 or more, alpha {alpha} above 0 and at most 1")
        if weak not in ("rank", "random"):
            raise BadInput(f"scmoe: weak {weak!r}: rank or random")
        self.beta, self.alpha, self.weak, self.rank, self.seed = beta, alpha, weak, rank, seed
        self.own = weak == "random"

    def check(self) -> None:
        resolve(self.weaker(), self.experts())

    def weaker(self) -> Policy:
        """The policy of the weak pass."""
        if self.weak == "rank":
            return Policy(rank=self.rank)
        return Policy(fn=OneAtRandom(self.seed))

    def start(self, prompt_ids: Sequence[int]) -> Course:
        return Course(beside=(self.weaker(),), mix=self.mix)

    def mix(self, own_V: Tensor, beside_CV: Tensor) -> Tensor:
        return contrast(own_V, beside_CV[0], self.beta, self.alpha)


def contrast(strong_V: Tensor, weak_V: Tensor, beta: float, alpha: float) -> Tensor:
    """(1 + beta) s - beta w where s >= log(alpha) + max s, -inf elsewhere; over the last dimension, in the dtype of s."""
    strong, weak = strong_V.float(), weak_V.float()
    likely = strong >= strong.amax(-1, keepdim=True) + math.log(alpha)
    return ((1 + beta) * strong - beta * weak).masked_fill(~likely, float("-inf")).to(strong_V.dtype)


class OneAtRandom:
    """One expert per token, each as likely, with the token's whole weight. What a token draws follows from the seed, the layer,
    the number of the call and its place before the last token of its row: not from padding, nor from a batch's other rows.
    For one answer; calls are counted."""

    def __init__(self, seed: int) -> None:
        self.seed, self.calls = seed, Counter[str]()

    def __call__(self, routing: Routing, block: Any) -> Routing:
        _, weights_TK = token_major(routing)
        random = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {block.name} {self.calls[block.name]}".encode()))
        self.calls[block.name] += 1
        drawn_T1 = torch.randint(block.num_experts, (routing.tokens, 1), generator=random).flip(0)
        return routing.replace(experts_TK=drawn_T1.to(weights_TK.device), weights_TK=weights_TK.sum(1, keepdim=True))
