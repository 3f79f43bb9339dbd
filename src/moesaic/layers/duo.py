"""Duo-LLM: a big FFN, a small one, or neither, per token and layer; and the oracle that knows the best pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor

from moesaic.balancing.balancer import Balancer
from moesaic.core.context import RoutingContext
from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.core.routing import Routing
from moesaic.experts.unequal import Unequal
from moesaic.layers.moe import MoE
from moesaic.routing.router import Router, empty_padding
from moesaic.routing.score import LinearScore
from moesaic.routing.select import top_k
from moesaic.routing.weigh import gather

State = TypeVar("State")


class DuoRouter(Router):
    """Rows are the sizes, big first, then skip where there is one. What it does is `mode`:

    "random": in training every token draws a row evenly (stage 1); evaluation takes the big one.
    "soft": in training all rows run, weighed by softmax(l / temperature); evaluation takes the best at weight 1.
    "hard": the best row at weight 1 always (its router learns from the budget loss alone).
    `pattern` overrides all: one row for every token, or one per token (int64 [T]).
    """

    bank = "unequal"

    def __init__(self, dim: int, experts: int, skip: bool, mode: Literal["random", "soft", "hard"], temperature: float):
        super().__init__(experts, 1)
        if mode not in ("random", "soft", "hard") or temperature <= 0:
            raise BadInput(f"mode={mode!r}, temperature={temperature}: random, soft or hard; above 0")
        self.skip, self.mode, self.temperature = skip, mode, temperature
        self.pattern: int | Tensor | None = None
        self.score = LinearScore(dim, experts)

    @property
    def true_experts(self) -> int:
        """Rows that a bank serves: all but skip."""
        return self.num_experts - self.skip

    def forward(self, x_TD: Tensor, ctx: RoutingContext) -> Routing:
        logits_TE = self.score(x_TD, ctx) / self.temperature
        probs_TE = logits_TE.softmax(-1)
        selected_TK = self._rows(logits_TE, ctx)
        weights_TK = gather(probs_TE, selected_TK) if selected_TK.shape[1] > 1 else torch.ones_like(probs_TE[:, :1])
        skipped_TK = selected_TK >= self.true_experts
        return empty_padding(
            Routing(
                logits_TE,
                probs_TE,
                selected_TK.masked_fill(skipped_TK, -1),
                weights_TK.masked_fill(skipped_TK, 0.0),
                selected_TK,
            ),
            ctx,
        )

    def _rows(self, logits_TE: Tensor, ctx: RoutingContext) -> Tensor:
        tokens, device = len(logits_TE), logits_TE.device
        if self.pattern is not None:
            return torch.as_tensor(self.pattern, device=device).expand(tokens).unsqueeze(1)
        if self.mode == "random":
            if not ctx.training:
                return torch.zeros(tokens, 1, dtype=torch.long, device=device)
            return torch.randint(self.num_experts, (tokens, 1), generator=ctx.generator, device=device)
        if self.mode == "soft" and ctx.training:
            return torch.arange(self.num_experts, device=device).expand(tokens, -1)
        return top_k(logits_TE, 1)


@register("layers", "duo", paper="2410.10846", card="routing.md#duo-llm")
class Duo(MoE):
    """`experts` choices per token: SwiGLUs of width, width / 16, width / 256 ..., the last one skip (residual only).

    The paper has big and small (experts=2, skip=False), and skip as a third. Train both sizes at random first
    (mode "random"), then freeze all but the routers and train them with the budget loss over all layers, soft with a
    falling `router.temperature`, then hard. The budget is no part of the layer: `Budget.over(routings, scope)`.
    """

    router: DuoRouter

    def __init__(
        self,
        dim: int,
        experts: int = 3,
        width: int | None = None,
        skip: bool = True,
        mode: Literal["random", "soft", "hard"] = "soft",
        temperature: float = 1.0,
        ratio: int = 16,
        balance: Mapping[str, float] | Iterable[Balancer] = (),
        *,
        causal: bool = False,
        host: Iterable[str] | None = None,
    ):
        if experts < 2 + skip or ratio < 2:
            raise BadInput(f"experts={experts}, skip={skip}, ratio={ratio}: a big and a smaller one at least")
        width = 4 * dim if width is None else width
        widths = [max(1, width // ratio**e) for e in range(experts - skip)]
        bank = Unequal(dim, experts - skip, widths=widths)
        router = DuoRouter(dim, experts, skip, mode, temperature)
        super().__init__(dim, experts, router, bank, balance=balance, causal=causal, host=host)


class Oracle(NamedTuple):
    """The least loss of every token, [T], the pattern that reaches it, int64 [T, L], and layers evaluated."""

    loss_T: Tensor
    pattern_TL: Tensor
    evaluations: int


def oracle(
    start: State,
    layers: Sequence[Callable[[State, int], State]],
    loss: Callable[[State], Tensor],
    options: int,
    big: int | None = None,
) -> Oracle:
    """Best pattern of options per predicted token, over all options ** L, or those with exactly `big` layers at option 0.

    `layers[l](state, option)` runs layer l for the tokens being predicted (their context keeps one fixed pattern, so that
    its keys and values are shared); `loss(state)` is [T]. Prefixes are shared: at most sum of options ** l evaluations.
    It looks at the label: a bound, not a policy, and never a model's quality. Raises BadInput for an impossible `big`.
    """
    depth = len(layers)
    if depth == 0 or options < 1 or (big is not None and not 0 <= big <= depth):
        raise BadInput(f"{depth} layers, options={options}, big={big}: nothing to search")
    best: list[Tensor] = []
    evaluations = 0

    def visit(state: State, chosen: tuple[int, ...], bigs: int) -> None:
        nonlocal evaluations
        level = len(chosen)
        if level == depth:
            value_T = loss(state)
            pattern_TL = torch.tensor(chosen, device=value_T.device).expand(len(value_T), -1)
            if not best:
                best.extend((value_T, pattern_TL))
            else:
                better_T = value_T < best[0]
                best[0] = torch.where(better_T, value_T, best[0])
                best[1] = torch.where(better_T.unsqueeze(1), pattern_TL, best[1])
            return
        for option in range(options):
            count = bigs + (option == 0)
            if big is not None and (count > big or count + depth - level - 1 < big):
                continue
            evaluations += 1
            visit(layers[level](state, option), (*chosen, option), count)

    with torch.no_grad():
        visit(start, (), 0)
    if not best:
        raise BadInput(f"no pattern of {options} options has exactly {big} big layers of {depth}")
    return Oracle(best[0], best[1], evaluations)
