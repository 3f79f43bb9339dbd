"""Expertise trees: advisers are chosen by region of the context, online, from rewards alone.

Shape legend: C context dimensions, M advisers, A arms, n rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from moesaic.core.errors import BadInput
from moesaic.core.registry import register

Array = np.ndarray
MIDDLE = 0.5
"""Expected reward r0 of an adviser of whom nothing is known."""


class Combiner:
    """Ridge regression from advice to reward: arm a has the features [advice[:, a] - 0.5 ; 1], the target is reward - 0.5.

    Prior weight `alpha`; scores are mean + beta * sqrt(f^T A^-1 f); rank-1 updates.
    """

    def __init__(self, advisers: int, alpha: float, beta: float):
        self.inverse = np.eye(advisers + 1) / alpha
        self.b, self.beta = np.zeros(advisers + 1), beta

    @property
    def theta(self) -> Array:
        return self.inverse @ self.b

    def choose(self, advice_MA: Array) -> int:
        features = _features(advice_MA)
        width_A = np.einsum("fa,fg,ga->a", features, self.inverse, features)
        return int(np.argmax(self.theta @ features + self.beta * np.sqrt(np.maximum(width_A, 0))))

    def update(self, advice_MA: Array, arm: int, reward: float) -> None:
        f = _features(advice_MA)[:, arm]
        moved = self.inverse @ f
        self.inverse -= np.outer(moved, moved) / (1 + f @ moved)
        self.b += (reward - MIDDLE) * f


def _features(advice_MA: Array) -> Array:
    return np.concatenate([advice_MA - MIDDLE, np.ones((1, advice_MA.shape[1]))])


@dataclass
class Round:
    """One decision and what came of it; `chance` is the probability that the acting model gave to its arm."""

    context_C: Array
    advice_MA: Array
    arm: int
    reward: float
    chance: float


@dataclass
class Node:
    """A box of contexts, low <= x < high (the upper bound of the whole space belongs to it), with a model of its own."""

    low_C: Array
    high_C: Array
    combiner: Combiner
    value: float = 0.0
    """Sum over its rounds of (reward - 0.5) pi(arm) / chance, pi the greedy policy of its model replayed in order."""
    seen: list[int] = field(default_factory=list)
    replayed: int = 0
    """Of the whole history."""
    splits: dict[tuple[int, float], tuple[Node, Node]] = field(default_factory=dict)
    chosen: tuple[int, float] | None = None

    def replay(self, history: list[Round], top_C: Array) -> None:
        """Take in the rounds since the last time that fall into the box."""
        for index in range(self.replayed, len(history)):
            one = history[index]
            if self.holds(one.context_C, top_C):
                matches = self.combiner.choose(one.advice_MA) == one.arm
                self.value += (one.reward - MIDDLE) * matches / one.chance
                self.combiner.update(one.advice_MA, one.arm, one.reward)
                self.seen.append(index)
        self.replayed = len(history)

    def holds(self, context_C: Array, top_C: Array) -> bool:
        at_top = (context_C == self.high_C) & (self.high_C == top_C)
        return bool(np.all((context_C >= self.low_C) & ((context_C < self.high_C) | at_top)))


@register("orchestration", "expertise_trees", paper="2305.01063", card="routing.md#expertise-trees")
class ExpertiseTrees:
    """`arm = trees.decide(context, advice)`, then `trees.learn(reward)`: a decision tree over contexts, a combiner per region.

    Before a decision the way from the root to the context is walked. A node may split at `thresholds` equally spaced
    places per dimension (1: the middle), where it and each child hold 2 rounds; children replay the history, and the split
    whose children are worth the most is taken when they are worth more than the node unsplit. `incremental` keeps a split
    once made; otherwise it is weighed again in every round. `max_depth=0` is the global combiner.

    Greedy policies make the importance weights 0 or 1 or nothing at all: values are coarse. The whole history is kept.
    Boxes are closed below and open above, so that a context on the lower bound is inside (the released ones lose it).

    Raises BadInput for bounds, contexts or advice that do not fit.
    """

    def __init__(
        self,
        dim: int = 2,
        advisers: int = 2,
        bounds: tuple[float, float] = (0.0, 1.0),
        thresholds: int = 1,
        alpha: float = 100.0,
        beta: float = 1.0,
        max_depth: int = 4,
        incremental: bool = False,
    ):
        if min(dim, advisers, thresholds) < 1 or max_depth < 0 or alpha <= 0 or bounds[0] >= bounds[1]:
            raise BadInput(f"dim={dim}, advisers={advisers}, thresholds={thresholds}, alpha={alpha}, bounds={bounds}")
        self.dim, self.advisers, self.thresholds = dim, advisers, thresholds
        self.alpha, self.beta, self.max_depth, self.incremental = alpha, beta, max_depth, incremental
        self.history: list[Round] = []
        self.root = self._node(np.full(dim, bounds[0], dtype=float), np.full(dim, bounds[1], dtype=float))
        self._pending: tuple[Array, Array, int] | None = None

    def decide(self, context_C: Array, advice_MA: Array) -> int:
        """The arm for this context, given each adviser's expected reward of each arm, in [0, 1]."""
        context_C, advice_MA = np.asarray(context_C, dtype=float), np.asarray(advice_MA, dtype=float)
        if context_C.shape != (self.dim,) or not self.root.holds(context_C, self.root.high_C):
            raise BadInput(f"context {context_C}: {self.dim} numbers from {self.root.low_C[0]} to {self.root.high_C[0]}")
        if advice_MA.ndim != 2 or advice_MA.shape[0] != self.advisers or not np.isfinite(advice_MA).all():
            raise BadInput(f"advice of shape {advice_MA.shape}: one finite row for each of {self.advisers} advisers")
        self._grow(context_C)
        arm = self.leaf(context_C).combiner.choose(advice_MA)
        self._pending = context_C, advice_MA, arm
        return arm

    def learn(self, reward: float) -> None:
        """The reward, in [0, 1], of the last decision. Raises BadInput when there is none to be rewarded."""
        if self._pending is None or not 0 <= reward <= 1:
            raise BadInput(f"reward {reward}: from 0 to 1, once after each decision")
        self.history.append(Round(*self._pending, reward, 1.0))
        self._pending = None

    def leaf(self, context_C: Array) -> Node:
        """The region that decides for this context."""
        return self._walk(np.asarray(context_C, dtype=float))[-1]

    def leaves(self) -> Iterator[Node]:
        """The regions, which cover the space once."""
        todo = [self.root]
        while todo:
            node = todo.pop()
            if node.chosen is None:
                yield node
            else:
                todo.extend(node.splits[node.chosen])

    def _walk(self, context_C: Array) -> list[Node]:
        path = [self.root]
        while path[-1].chosen is not None:
            low, high = path[-1].splits[path[-1].chosen]
            path.append(low if low.holds(context_C, self.root.high_C) else high)
        return path

    def _grow(self, context_C: Array) -> None:
        """Bring the nodes on the way up to date, each choosing whether and where it splits."""
        node, depth = self.root, 0
        while True:
            node.replay(self.history, self.root.high_C)
            if depth < self.max_depth and not (self.incremental and node.chosen is not None):
                self._split(node)
            if node.chosen is None or depth == self.max_depth:
                return
            low, high = node.splits[node.chosen]
            node, depth = (low if low.holds(context_C, self.root.high_C) else high), depth + 1

    def _split(self, node: Node) -> None:
        if len(node.seen) < 2:
            return
        best, best_value = None, node.value
        for place in self._places(node):
            if place not in node.splits:
                node.splits[place] = self._children(node, place)
            low, high = node.splits[place]
            for child in (low, high):
                child.replay(self.history, self.root.high_C)
            if min(len(low.seen), len(high.seen)) >= 2 and low.value + high.value > best_value:
                best, best_value = place, low.value + high.value
        node.chosen = best

    def _places(self, node: Node) -> Iterator[tuple[int, float]]:
        for d in range(self.dim):
            for i in range(1, self.thresholds + 1):
                yield d, float(node.low_C[d] + (node.high_C[d] - node.low_C[d]) * i / (self.thresholds + 1))

    def _children(self, node: Node, place: tuple[int, float]) -> tuple[Node, Node]:
        d, threshold = place
        top, bottom = node.high_C.copy(), node.low_C.copy()
        top[d] = bottom[d] = threshold
        return self._node(node.low_C, top), self._node(bottom, node.high_C)

    def _node(self, low_C: Array, high_C: Array) -> Node:
        return Node(low_C.copy(), high_C.copy(), Combiner(self.advisers, self.alpha, self.beta))
