"""Random, changed and crossed trees of the language of balance losses: what a search proposes without a language model."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from moesaic.balancing.language import BINARY, OPERATORS, REDUCTIONS, SCALARS, UNARY, VECTORS, Node, check, evaluate, number
from moesaic.core.errors import BadInput

MOST = 40
"""Nodes of a proposed tree; longer ones are not proposed."""


def random_tree(rng: random.Random, vector: bool, depth: int) -> Node:
    """A random tree of that type, at most `depth` deep below its root."""
    if depth <= 0 or rng.random() < 0.15:
        return Node(rng.choice(VECTORS)) if vector else _scalar_leaf(rng)
    draw = rng.random()
    if not vector and draw < 0.4:
        return Node(rng.choice(list(REDUCTIONS)), (random_tree(rng, True, depth - 1),))
    if draw < 0.75:
        kinds = (True, rng.random() < 0.5) if vector else (False, False)
        args = [random_tree(rng, kind, depth - 1) for kind in kinds]
        rng.shuffle(args)
        return Node(rng.choice([*OPERATORS] * 2 + [*BINARY]), tuple(args))
    return Node(rng.choice(list(UNARY)), (random_tree(rng, vector, depth - 1),))


def _scalar_leaf(rng: random.Random) -> Node:
    if rng.random() < 0.4:
        return Node(rng.choice(SCALARS))
    return number(float(f"{10 ** rng.uniform(-2, 1):.3g}"))


def replace(tree: Node, index: int, new: Node) -> Node:
    """The tree with its part of that index, in the order of `walk()`, replaced."""
    if index == 0:
        return new
    args, index = [], index - 1
    for arg in tree.args:
        args.append(replace(arg, index, new) if 0 <= index < len(arg) else arg)
        index -= len(arg)
    return Node(tree.op, tuple(args), tree.value)


def change(tree: Node, rng: random.Random) -> Node:
    """One small change: a number or a whole term is scaled, a function or operator exchanged, or a part drawn anew."""
    parts = list(tree.walk())
    numbers = [i for i, part in enumerate(parts) if part.op == "number"]
    draw = rng.random()
    if numbers and draw < 0.4:
        index = rng.choice(numbers)
        return replace(tree, index, number(float(f"{parts[index].value * math.exp(rng.gauss(0, 0.7)):.3g}")))
    families = ([*OPERATORS, *BINARY], [*UNARY], [*REDUCTIONS], [*VECTORS], [*SCALARS])
    if draw < 0.55:
        index = rng.choice([i for i, part in enumerate(parts) if not part.vector])
        return replace(tree, index, Node("*", (number(float(f"{math.exp(rng.gauss(0, 1)):.3g}")), parts[index])))
    if draw < 0.75:
        index = rng.randrange(len(parts))
        for family in families:
            if parts[index].op in family:
                return replace(tree, index, Node(rng.choice(family), parts[index].args))
    index = rng.randrange(len(parts))
    return replace(tree, index, random_tree(rng, parts[index].vector, 2))


def rewrite(tree: Node, rng: random.Random) -> Node:
    """A new term beside the tree, or a new tree altogether."""
    term = random_tree(rng, False, 4)
    if rng.random() < 0.3:
        return term
    return Node("+", (tree, Node("*", (_scalar_leaf(rng), term))))


def cross(tree: Node, other: Node, rng: random.Random) -> Node:
    """The tree with one part replaced by a part of the other of the same type."""
    parts = list(tree.walk())
    index = rng.randrange(len(parts))
    same = [part for part in other.walk() if part.vector == parts[index].vector]
    return replace(tree, index, rng.choice(same)) if same else tree


def propose(tree: Node, others: Sequence[Node], rng: random.Random, tries: int = 50) -> tuple[Node, str]:
    """A new loss from a parent, and how: "diff" 0.6, "rewrite" 0.3, "crossover" 0.1, the card's shares.

    Draws again until the tree is a loss of at most `MOST` nodes that differs from its parent.
    """
    for _ in range(tries):
        draw = rng.random()
        if draw < 0.6 or (draw >= 0.9 and not others):
            kind, new = "diff", change(tree, rng)
        elif draw < 0.9:
            kind, new = "rewrite", rewrite(tree, rng)
        else:
            kind, new = "crossover", cross(tree, rng.choice(list(others)), rng)
        try:
            check(new)
        except BadInput:
            continue
        if len(new) <= MOST and new != tree:
            return new, kind
    return Node("*", (number(float(f"{math.exp(rng.gauss(0, 0.7)):.3g}")), tree)), "scaled"


def behaviour(tree: Node, probes: int = 12, experts: int = 8) -> Tensor:
    """What the loss does to a router: its gradients to P on fixed random loads, without their means, [probes, E].

    A softmax does not feel a push on all experts alike, so a constant per load is taken out.
    """
    generator = torch.Generator().manual_seed(17)
    rows = []
    for i in range(probes):
        f_E, p_E = (torch.softmax(torch.randn(experts, generator=generator) * (0.3 + i / 4), 0) for _ in range(2))
        leaf = p_E.clone().requires_grad_()
        value = evaluate(tree, f_E * (f_E > 0.03), leaf, 2.0)
        grad_E = torch.autograd.grad(value, leaf, allow_unused=True)[0] if value.requires_grad else None
        rows.append(torch.zeros(experts) if grad_E is None else grad_E - grad_E.mean())
    return torch.stack(rows)


def novel(tree: Node, known: Sequence[Tensor], cosine: float = 0.99) -> bool:
    """Whether the loss does anything, and does not do what one of `known` does, at about the same strength."""
    own = behaviour(tree).flatten()
    size = own.norm()
    if not torch.isfinite(size) or size < 1e-8:
        return False
    for other in known:
        flat = other.flatten()
        alike = torch.dot(own, flat) / (size * flat.norm()).clamp(min=1e-20)
        if alike > cosine and 0.8 < size / flat.norm().clamp(min=1e-20) < 1.25:
            return False
    return True
