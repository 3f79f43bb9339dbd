"""ExpertFlow: predict all layers' experts from the token ids, give layers slots by predicted demand, regroup batches.

Card serving-and-scale.md, "ExpertFlow: whole-path predictor, regrouped batches". The pipeline over two batches is not here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from moesaic.core.errors import BadInput, MissingNeed
from moesaic.core.registry import register
from moesaic.trace.order import EMPTY, Order, wide
from moesaic.trace.policies import state as S
from moesaic.trace.policies.loops import compiled
from moesaic.trace.policies.policy import Policy, Replayed
from moesaic.trace.policies.regroup import regrouped


@register(
    "policies", "expertflow", paper="2410.17954", card="serving-and-scale.md#expertflow-whole-path-predictor-regrouped-batches",
    needs={"history", "tokens"},
)  # fmt: skip
class ExpertFlow(Policy):
    """`oracle`: predict what was recorded (the bound of any predictor). `steps`: training steps of the predictor. `window`:
    passes after which slots are shared out anew. `extra`: experts predicted beyond the slots of a token. `regroup`: in a
    replay of batches, regroup every two."""

    rule = S.RECENCY
    source = S.PREDICTED
    learns = True

    def __init__(
        self, oracle: bool = False, steps: int = 300, window: int = 32, extra: int = 0, regroup: bool = True, seed: int = 0
    ) -> None:
        if steps < 1 or window < 1 or extra < 0:
            raise BadInput(f"steps {steps}, window {window}, extra {extra}: at least 1, 1 and 0")
        self.oracle, self.steps, self.window, self.extra, self.regroup, self.seed = oracle, steps, window, extra, regroup, seed
        self._predictor: Any = None
        self._guess: tuple[Any, np.ndarray] | None = None

    @property
    def needs(self) -> frozenset[str]:
        return frozenset() if self.oracle else self.entry.needs

    def learn(self, history: Any) -> None:
        super().learn(history)
        self._predictor = self._guess = None

    def setup(self) -> None:
        self.state.note[S.WIDTH] = self.shape.top_k + self.extra
        self.state.note[S.DEPTH] = len(self.shape.experts_L)
        self.state.note[S.WINDOW] = self.window

    def predicted(self, trace: Any) -> np.ndarray:
        """Predicted ids [T, L, M] of every row of a trace, best first; trains at first use."""
        if self.oracle:
            return wide(np.asarray(trace.experts_TLK))
        if self.history is None:
            raise MissingNeed("policy expertflow trains its predictor: give --learn-from FILE or --learn-share, or oracle=true")
        for held in (trace, self.history.trace):
            if held.tokens_T is None:
                raise MissingNeed(f"policy expertflow reads token ids, which {held.name} lacks: record it with `moesaic trace`")
        if self._guess is None or self._guess[0] is not trace:
            from moesaic.trace import path_predictor

            if self._predictor is None:
                sequences = np.unique(self.history.trace.sequence_T[self.history.order.rows_T])
                self._predictor = path_predictor.train(self.history.trace, sequences, self.steps, self.seed)
            width = min(trace.num_experts, trace.top_k + self.extra)
            self._guess = (trace, path_predictor.predict(self._predictor, trace, width))
        return self._guess[1]

    def arrange(self, trace: Any, sequences: np.ndarray | None, batch: int) -> np.ndarray | None:
        if not self.regroup:
            return sequences
        chosen = np.arange(len(trace.starts_S1) - 1) if sequences is None else sequences
        guess_TLM = self.predicted(trace)
        active = np.zeros((len(chosen), len(trace.layers), trace.num_experts + 1), bool)
        for i, s in enumerate(chosen):
            ids = guess_TLM[trace.starts_S1[s] : trace.starts_S1[s + 1]].astype(np.int64)
            ids = np.where(ids == EMPTY, trace.num_experts, ids)
            for l in range(ids.shape[1]):
                active[i, l, ids[:, l].ravel()] = True
        return chosen[regrouped(active[..., :-1].reshape(len(chosen), -1), batch)]

    def replayed(self, trace: Any, order: Order) -> Replayed:
        guess_TLM = self.predicted(trace)[order.rows_T]
        demand_WL = _demand(guess_TLM, order.starts_N1.astype(np.int64), self.window, trace.num_experts, self.oracle)
        if self.oracle:
            return Replayed(guess_TLM, demand_WL, notes=("an oracle predicts",))
        taken = self.shape.top_k
        true_TLK = wide(np.asarray(trace.experts_TLK)[order.rows_T])
        found = sum(
            int(((true_TLK == guess_TLM[..., m][..., None]) & (true_TLK != EMPTY)).sum()) for m in range(guess_TLM.shape[2])
        )
        recall = found / max(1, int((true_TLK != EMPTY).sum()))
        return Replayed(
            guess_TLM, demand_WL, notes=(f"predictor finds {recall:.1%} of choices with {taken + self.extra} guesses",)
        )


@compiled
def _demand(guess_TLM, starts_N1, window, experts, oracle):
    """Distinct predicted experts [W, L] of the window before each, or, for an oracle, of each window itself."""
    passes = len(starts_N1) - 1
    windows = (passes + window - 1) // window
    layers = guess_TLM.shape[1]
    out = np.ones((windows, layers))
    seen = np.full((layers, experts), -1, np.int64)
    for w in range(windows):
        at = w if oracle else w - 1
        if at < 0:
            continue
        first, last = starts_N1[at * window], starts_N1[min(passes, (at + 1) * window)]
        for l in range(layers):
            out[w, l] = 0.0
            for t in range(first, last):
                for m in range(guess_TLM.shape[2]):
                    e = guess_TLM[t, l, m]
                    if e != EMPTY and seen[l, e] != w:
                        seen[l, e] = w
                        out[w, l] += 1.0
    return out
