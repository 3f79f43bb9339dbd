"""A small language of balance losses: typed trees over the load f, the probability P and E, as text and as numbers.

    E * sum(f * P) + 0.1 * (1.5 - entropy(P) / log(E)) * sum(below(f, 0.064 / E) * relu(0.064 / E - P))

Vectors [E]: `f` the shares of the choices (no gradient), `P` the mean probabilities (the only way to the router), `q` whose
value is f and whose gradient is P's, `rank_f` and `rank_P` from 0 (least) to 1 (most; no gradient). Scalars: `E`, `K` and
numbers. Elementwise: + - * /, `abs`, `relu`, `square`, `sqrt`, `log`, `exp`, `min(a, b)`, `max(a, b)`, `stop` (no gradient),
`below(a, b)` (1 where a < b, no gradient). Vector to scalar: `sum`, `mean`, `largest`, `smallest`, `std`, `entropy`.

Text is parsed by Python's own parser into a tree of which only these forms are taken: nothing is ever executed. Roots,
logarithms and quotients are guarded, so that every tree is finite on every load.
"""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.balancing.mutual_information import entropy
from moesaic.core.errors import BadInput

EPS = 1e-6
LONGEST, MOST_NODES = 2000, 200
VECTORS = ("f", "P", "q", "rank_f", "rank_P")
SCALARS = ("E", "K")


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / torch.where(b < 0, b.clamp(max=-EPS), b.clamp(min=EPS))


OPERATORS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "+": torch.add, "-": torch.sub, "*": torch.mul, "/": _divide,
}  # fmt: skip
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "min": torch.minimum,
    "max": torch.maximum,
    "below": lambda a, b: (a < b).float(),
}
UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "abs": torch.abs,
    "relu": torch.relu,
    "square": torch.square,
    "sqrt": lambda a: (a.clamp(min=0) + EPS).sqrt(),
    "log": lambda a: a.clamp(min=EPS).log(),
    "exp": lambda a: a.clamp(max=20).exp(),
    "stop": torch.detach,
}
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": torch.sum,
    "mean": torch.mean,
    "largest": torch.amax,
    "smallest": torch.amin,
    "std": lambda a: ((a - a.mean()).square().mean() + EPS).sqrt(),
    "entropy": lambda a: entropy(a.clamp(min=0)),
}

FUNCTIONS: dict[str, Callable[..., Tensor]] = {}
for _group in (OPERATORS, BINARY, UNARY, REDUCTIONS):
    FUNCTIONS.update(_group)


@dataclass(frozen=True)
class Node:
    """`op` is an operator, a function, a name, or "number" with its `value`."""

    op: str
    args: tuple[Node, ...] = ()
    value: float = 0.0

    @property
    def vector(self) -> bool:
        """True for a value per expert; scalars spread over them."""
        return self.op in VECTORS or (self.op not in REDUCTIONS and any(arg.vector for arg in self.args))

    @property
    def moves(self) -> bool:
        """Whether P can get a gradient: it stands somewhere that no `stop`, `below` or rank cuts off."""
        if self.op in ("P", "q"):
            return True
        return self.op not in ("stop", "below") and any(arg.moves for arg in self.args)

    def __len__(self) -> int:
        return 1 + sum(map(len, self.args))

    def walk(self) -> Iterator[Node]:
        yield self
        for arg in self.args:
            yield from arg.walk()

    def __str__(self) -> str:
        if self.op == "number":
            return f"{self.value:.6g}"
        if self.op in OPERATORS:
            return f"({self.args[0]} {self.op} {self.args[1]})"
        return f"{self.op}({', '.join(map(str, self.args))})" if self.args else self.op


def number(value: float) -> Node:
    return Node("number", (), float(value))


def parse(text: str) -> Node:
    """The tree of a balance loss: a scalar with a gradient to the router.

    Raises BadInput naming the part that is not in the language, a vector where a scalar is due, or a loss without gradient.
    """
    if len(text) > LONGEST:
        raise BadInput(f"expression of {len(text)} characters: at most {LONGEST}")
    try:
        tree = _node(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"expression {text!r}: not a formula ({type(error).__name__})") from error
    check(tree)
    return tree


def check(tree: Node) -> None:
    """Raises BadInput for a tree that is no loss."""
    if len(tree) > MOST_NODES:
        raise BadInput(f"expression of {len(tree)} parts: at most {MOST_NODES}")
    if tree.vector:
        raise BadInput(f"expression {tree}: one number per expert; a loss is one number: sum(...) or mean(...)")
    if not tree.moves:
        raise BadInput(f"expression {tree}: no gradient reaches the router; it must read P or q outside stop and below")


def _node(found: ast.AST) -> Node:
    signs = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
    match found:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            if abs(value) > 1e9:
                raise BadInput(f"expression: the number {value} is beyond 1e9")
            return number(value)
        case ast.Name(id=name) if name in VECTORS or name in SCALARS:
            return Node(name)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            node = _node(inner)
            return number(-node.value) if node.op == "number" else Node("*", (number(-1), node))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in signs:
            return Node(signs[type(op)], (_node(left), _node(right)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            places = 2 if name in BINARY else 1 if name in UNARY or name in REDUCTIONS else 0
            if places != len(args) or not places:
                raise BadInput(
                    f"expression: {name} with {len(args)} values: {_known(name) if not places else f'takes {places}'}"
                )
            node = Node(name, tuple(map(_node, args)))
            if name in REDUCTIONS and not node.args[0].vector:
                raise BadInput(f"expression: {name} of a single number, {node.args[0]}: it takes one per expert")
            return node
        case ast.Name(id=name):
            raise BadInput(f"expression: {name}: {_known(name)}")
    raise BadInput(f"expression: {ast.unparse(found)[:60]!r} is not in the language of balance losses")


def _known(name: str) -> str:
    names = [*VECTORS, *SCALARS, *BINARY, *UNARY, *REDUCTIONS]
    close = difflib.get_close_matches(name, names, 1)
    return f"no such name; did you mean {close[0]}?" if close else f"no such name: one of {', '.join(names)}"


def evaluate(tree: Node, f_E: Tensor, p_E: Tensor, k: float) -> Tensor:
    """The loss of this load and these probabilities: a float32 scalar with gradient to `p_E`, finite."""
    experts = f_E.numel()
    f_E = f_E.detach()

    def rank(values_E: Tensor) -> Tensor:
        order_E = values_E.detach().argsort().argsort().float()
        return order_E / max(experts - 1, 1)

    names = {
        "f": lambda: f_E,
        "P": lambda: p_E,
        "q": lambda: f_E + (p_E - p_E.detach()),
        "rank_f": lambda: rank(f_E),
        "rank_P": lambda: rank(p_E),
        "E": lambda: f_E.new_tensor(float(experts)),
        "K": lambda: f_E.new_tensor(float(k)),
    }

    def value(node: Node) -> Tensor:
        if node.op == "number":
            return f_E.new_tensor(node.value)
        if node.op in names:
            return names[node.op]()
        args = [value(arg) for arg in node.args]
        return FUNCTIONS[node.op](*args).clamp(-1e12, 1e12)

    return value(tree)
