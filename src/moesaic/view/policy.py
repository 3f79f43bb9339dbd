"""A routing policy for one call: what the router sees, what it selects, and what becomes of the finished choice.

A policy never rebuilds an architecture's weights. The router runs again with what its *selection* sees altered
(view/rerun.py), so the gathering, renormalising and scaling afterwards are the architecture's own code. Bias is in the units
that the selection sees: the router's scores (probabilities, sigmoids or logits), as in bias-balanced training. `logits` and
`probs` act earlier: on the product that scores the experts, before any softmax or sigmoid, so that weights follow them too;
gradients flow through both. `threshold` and `fn` act last, on the finished routing, and so on any block whatever its router
(view/slots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.view.shared_rows import per_row

VALUES = ("k", "mask", "without", "bias", "force", "rank", "logits", "probs", "threshold")
"""Fields of a policy that are a value per block."""

PerBlock = Any
"""A value for every block, or a mapping from layer number or block name to a value."""


@dataclass(frozen=True)
class Policy:
    """What to change about routing. Each field is one value for all blocks, or a mapping {layer or block name: value}.

    Args:
        k: experts per token.
        mask: bool [E], or [blocks, E]: False = never chosen.
        without: expert ids that are never chosen (a shorter way to say mask).
        bias: float [E], or [blocks, E]: added to what the selection sees, not to the weights.
        force: int [T, K], or [K] for every token: exactly these experts, weighted the architecture's own way.
        rank: only the rank-th best expert of the selection (1 = the best), weighted the architecture's own way.
        logits: float [E], or [blocks, E]: added to the router's logits, before softmax or sigmoid; may require gradients.
        probs: float [E], or [blocks, E]: stands in for the softmax of the logits, before top-k; may require gradients.
            Only routers that score by softmax over their experts.
        threshold: 0 to 1: slots with a smaller share of the token's weight are emptied, the others take it over.
        fn: fn(routing, block) -> Routing or None, after all of the above; of the tokens that follow this policy.
        at: "all" tokens; or one token of each row of a call, and then `rows` has a policy per row: "last", a number (from the
            row's first token, negative from its end), or "prompt": the last one, but not where a row has only one (a step
            of decoding).
    """

    k: PerBlock = None
    mask: PerBlock = None
    without: PerBlock = None
    bias: PerBlock = None
    force: PerBlock = None
    rank: PerBlock = None
    logits: PerBlock = None
    probs: PerBlock = None
    threshold: PerBlock = None
    fn: Callable[..., Any] | None = None
    at: Literal["all", "last", "prompt"] | int = "all"

    def both(self, other: Policy) -> Policy:
        """This policy and another as one; functions run in order. Raises BadInput for a field that both set."""
        fields: dict[str, Any] = {}
        for name in VALUES:
            mine, its = getattr(self, name), getattr(other, name)
            if mine is not None and its is not None:
                raise BadInput(f"policy: {name} is set twice, by two things that steer this request; leave one out")
            fields[name] = its if mine is None else mine
        if self.at != other.at and self != Policy(at=self.at) and other != Policy(at=other.at):
            raise BadInput("policy: one steers other tokens than the other; leave one out")
        first, second = self.fn, other.fn

        def fn(routing: Any, block: Any) -> Any:
            changed = None if first is None else first(routing, block)
            again = None if second is None else second(routing if changed is None else changed, block)
            return changed if again is None else again

        at = other.at if self.at == "all" else self.at
        return Policy(**fields, fn=fn if first and second else first or second, at=at)


@dataclass(frozen=True)
class Choice:
    """A policy resolved for one block. E: the rows of its router, where several of them run one expert."""

    k: int | None = None
    allow_E: Tensor | None = None
    bias_E: Tensor | None = None
    force_TK: Tensor | None = None
    """Or [K], for every token."""
    rank: int | None = None
    logits_E: Tensor | None = None
    probs_E: Tensor | None = None
    threshold: float | None = None
    fn: Callable[..., Any] | None = None
    at: str | int = "all"

    @property
    def picks(self) -> bool:
        """Whether the selection itself changes."""
        return any(value is not None for value in (self.k, self.allow_E, self.bias_E, self.force_TK, self.rank))

    @property
    def scores(self) -> bool:
        """Whether what the experts score changes."""
        return self.logits_E is not None or self.probs_E is not None

    @property
    def selects(self) -> bool:
        """Whether the router has to run again."""
        return self.picks or self.scores

    @property
    def finishes(self) -> bool:
        """Whether the finished routing changes."""
        return self.threshold is not None or self.fn is not None


def by_layer(value: Any) -> Any:
    """A field's value as JSON or a command line gives it: they know only strings as keys; layers are numbers."""
    if not isinstance(value, Mapping):
        return value
    return {int(key) if isinstance(key, str) and key.isdecimal() else key: entry for key, entry in value.items()}


def resolve(policy: Policy | None, blocks: Sequence[Any]) -> list[Choice]:
    """One Choice per block. Raises BadInput for wrong sizes, unknown layers and impossible k."""
    if policy is None:
        return [Choice() for _ in blocks]
    if policy.at not in ("all", "last", "prompt") and (isinstance(policy.at, bool) or not isinstance(policy.at, int)):
        raise BadInput(f"policy at: {policy.at!r}: all, last, prompt, or a token's number")
    for field in VALUES:
        value = getattr(policy, field)
        if isinstance(value, Mapping):
            unknown = [key for key in value if not any(key in (block.name, block.layer) for block in blocks)]
            if unknown:
                raise BadInput(f"policy {field}: no MoE block {unknown[0]!r}; layers are {sorted({b.layer for b in blocks})}")
    return [_resolve_block(policy, block, i, len(blocks)) for i, block in enumerate(blocks)]


def _resolve_block(policy: Policy, block: Any, index: int, count: int) -> Choice:
    def pick(value: Any) -> Any:
        if isinstance(value, Mapping):
            return value.get(block.name, value.get(block.layer))
        return value

    def row(value: Any, what: str, dtype: torch.dtype) -> Tensor | None:
        value = pick(value)
        if value is None:
            return None
        tensor = torch.as_tensor(value)
        if tensor.dim() == 2 and tensor.shape[0] == count:
            tensor = tensor[index]
        if tensor.shape != (experts,):
            raise BadInput(f"policy {what}: {block.name} has {experts} experts, given {list(tensor.shape)}")
        return tensor.to(dtype)

    def number(value: Any, what: str, kind: type, fits: Callable[[Any], bool], expected: str) -> Any:
        value = pick(value)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | kind) or not fits(value)):
            raise BadInput(f"policy {what}: {value!r} for {block.name}: {expected}")
        return value

    def whole(value: Any, what: str) -> Tensor:
        ids = torch.as_tensor(value)
        if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
            raise BadInput(f"policy {what}: {value!r} for {block.name}: expert ids are whole numbers")
        return ids.long()

    experts = block.num_experts
    allow_E = row(policy.mask, "mask", torch.bool)
    without = pick(policy.without)
    if without is not None:
        banned = whole(list(without), "without")
        if banned.numel() and not 0 <= int(banned.min()) <= int(banned.max()) < experts:
            raise BadInput(f"policy without: {block.name} has experts 0 to {experts - 1}, given {sorted(without)}")
        allow_E = torch.ones(experts, dtype=torch.bool) if allow_E is None else allow_E.clone()
        allow_E[banned] = False
    k = number(policy.k, "k", int, lambda n: True, "a number of experts")
    force_TK = pick(policy.force)
    if force_TK is not None:
        force_TK = whole(force_TK, "force")
        if not force_TK.numel():
            raise BadInput("policy force: needs at least one expert")
        if force_TK.dim() not in (1, 2) or not 0 <= int(force_TK.min()) <= int(force_TK.max()) < experts:
            raise BadInput(f"policy force: {block.name} takes ids [T, K] or [K] within 0 to {experts - 1}")
        if force_TK.dim() == 1 and len(force_TK.unique()) < len(force_TK):
            raise BadInput("policy force: an expert stands in it twice")
    held_R = block.row_map  # from here on what the router ranks: its rows, of which several may run one expert
    allow_E = per_row(allow_E, held_R)
    usable = block.rows if allow_E is None else int(allow_E.sum())
    rank = number(policy.rank, "rank", int, lambda n: 1 <= n <= usable, f"1 to {usable}, the experts it can rank")
    if rank is not None and (k is not None or force_TK is not None):
        raise BadInput("policy: rank says which one expert a token takes: leave k and force out")
    if rank is None and (k is not None or allow_E is not None):
        wanted = k if k is not None else block.top_k
        if not 1 <= wanted <= usable:
            raise BadInput(f"policy: {block.name} cannot choose {wanted} experts per token of {usable} usable ones")
    logits_E, probs_E = row(policy.logits, "logits", torch.float32), row(policy.probs, "probs", torch.float32)
    if probs_E is not None:
        if logits_E is not None:
            raise BadInput("policy: probs replace what logits add to: leave one out")
        if bool((probs_E < 0).any()) or not abs(float(probs_E.detach().sum()) - 1) <= 1e-3:
            raise BadInput(f"policy probs: those for {block.name} must not be negative, and sum to 1")
    bias_E = row(policy.bias, "bias", torch.float32)
    if held_R is not None:
        count_E = torch.bincount(held_R, minlength=experts)
        probs_E = None if probs_E is None else probs_E / count_E
        logits_E, probs_E, bias_E = (per_row(values_E, held_R) for values_E in (logits_E, probs_E, bias_E))
        if force_TK is not None:
            first_E = torch.tensor([int((held_R == e).nonzero()[0]) for e in range(experts)])
            force_TK = first_E[force_TK]
    threshold = number(policy.threshold, "threshold", float, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    choice = Choice(
        k, allow_E, bias_E, force_TK, rank, logits_E, probs_E, threshold, policy.fn,
        policy.at,
    )  # fmt: skip
    if choice.selects and block.router is None:
        raise BadInput(f"policy: {block.name} has no separate router; use fn=, which sees the finished routing")
    return choice
