"""A routing policy for one call: what the router sees, what it selects, and what becomes of the finished choice.

A policy never rebuilds an architecture's weights. The router runs again with what its *selection* sees altered, so the
gathering, renormalising and scaling afterwards are the architecture's own code. Three kinds of router exist:

- it selects with top-k over a row per expert (every architecture of transformers 5.23 but the two below, group-limited
  ones and correction biases included): k, mask, bias and force are exact;
- it looks its experts up in a table and gathers their scores (hash routing): force is exact; k and mask keep the
  table's choices first and fill up by score; bias only orders what is filled up;
- it selects by other means (sparse mixer): mask, bias and force rule the other experts out through its logits, so the
  weights are those of a router that has only the experts left; a smaller k keeps the first k slots; a larger k is refused.

In group-limited routers a mask also holds where groups are scored: a masked expert adds nothing to its group, and a group
with none left comes last. Experts outside the chosen groups are taken only where the mask leaves too few inside.

Bias is in the units that the selection sees: the router's scores (probabilities, sigmoids or logits), as in
bias-balanced training. `logits` and `probs` act earlier: on the product that scores the experts, before any softmax or
sigmoid, so that weights follow them too; gradients flow through both. `threshold` and `fn` act last, on the finished
routing, and so on any block whatever its router (view/slots.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moesaic.core.errors import BadInput

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
        force: int [T, K]: exactly these experts, weighted the architecture's own way.
        rank: only the rank-th best expert of the selection (1 = the best), weighted the architecture's own way.
        logits: float [E], or [blocks, E]: added to the router's logits, before softmax or sigmoid; may require gradients.
        probs: float [E], or [blocks, E]: stands in for the softmax of the logits, before top-k; may require gradients.
            Only routers that score by softmax over their experts.
        threshold: 0 to 1: slots with a smaller share of the token's weight are emptied, the others take it over.
        fn: fn(routing, block) -> Routing or None, after all of the above.
        at: "all" tokens, or only the "last" one of each row of the call; then give `rows`, one policy per row.
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
    at: Literal["all", "last"] = "all"

    def both(self, other: Policy) -> Policy:
        """This policy and another as one; functions run in order. Raises BadInput for a field that both set."""
        fields: dict[str, Any] = {}
        for name in VALUES:
            mine, its = getattr(self, name), getattr(other, name)
            if mine is not None and its is not None:
                raise BadInput(f"policy: {name} is set twice, by two things that steer this request; leave one out")
            fields[name] = its if mine is None else mine
        if self.at != other.at and self != Policy(at=self.at) and other != Policy(at=other.at):
            raise BadInput("policy: one steers the last token only and one all of them; leave one out")
        first, second = self.fn, other.fn

        def fn(routing: Any, block: Any) -> Any:
            changed = None if first is None else first(routing, block)
            again = None if second is None else second(routing if changed is None else changed, block)
            return changed if again is None else again

        at = "last" if "last" in (self.at, other.at) else "all"
        return Policy(**fields, fn=fn if first and second else first or second, at=at)


@dataclass(frozen=True)
class Choice:
    """A policy resolved for one block."""

    k: int | None = None
    allow_E: Tensor | None = None
    bias_E: Tensor | None = None
    force_TK: Tensor | None = None
    rank: int | None = None
    logits_E: Tensor | None = None
    probs_E: Tensor | None = None
    threshold: float | None = None
    fn: Callable[..., Any] | None = None
    last: bool = False

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


def resolve(policy: Policy | None, blocks: Sequence[Any]) -> list[Choice]:
    """One Choice per block. Raises BadInput for wrong sizes, unknown layers and impossible k."""
    if policy is None:
        return [Choice() for _ in blocks]
    if policy.at not in ("all", "last"):
        raise BadInput(f"policy at: {policy.at!r}: all or last")
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

    experts = block.num_experts
    allow_E = row(policy.mask, "mask", torch.bool)
    without = pick(policy.without)
    if without is not None:
        banned = torch.as_tensor(list(without), dtype=torch.long)
        if banned.numel() and not 0 <= int(banned.min()) <= int(banned.max()) < experts:
            raise BadInput(f"policy without: {block.name} has experts 0 to {experts - 1}, given {sorted(without)}")
        allow_E = torch.ones(experts, dtype=torch.bool) if allow_E is None else allow_E.clone()
        allow_E[banned] = False
    k = pick(policy.k)
    force_TK = pick(policy.force)
    if force_TK is not None:
        force_TK = torch.as_tensor(force_TK, dtype=torch.long)
        if force_TK.dim() != 2 or not 0 <= int(force_TK.min()) <= int(force_TK.max()) < experts:
            raise BadInput(f"policy force: {block.name} takes ids [T, K] within 0 to {experts - 1}")
    usable = experts if allow_E is None else int(allow_E.sum())
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
        if bool((probs_E < 0).any()) or not abs(float(probs_E.sum()) - 1) <= 1e-3:
            raise BadInput(f"policy probs: those for {block.name} must not be negative, and sum to 1")
    threshold = number(policy.threshold, "threshold", float, lambda share: 0 <= share <= 1, "a share from 0 to 1")
    choice = Choice(
        k, allow_E, row(policy.bias, "bias", torch.float32), force_TK, rank, logits_E, probs_E, threshold, policy.fn,
        policy.at == "last",
    )  # fmt: skip
    if choice.selects and block.router is None:
        raise BadInput(f"policy: {block.name} has no separate router; use fn=, which sees the finished routing")
    return choice


def rerun(router: nn.Module, args: tuple, kwargs: dict, output: Any, choice: Choice, num_experts: int) -> Any:
    """The router's output under a choice, for the same inputs; `output` is what it gave without one."""
    ids_TK = output[ids_at(output)]
    if choice.force_TK is not None and choice.force_TK.shape[0] != ids_TK.shape[0]:
        raise BadInput(f"policy force: ids for {choice.force_TK.shape[0]} tokens, the call has {ids_TK.shape[0]}")
    k = choice.k if choice.force_TK is None else choice.force_TK.shape[1]
    k = 1 if choice.rank is not None else k
    twin: Any = copy.copy(router)  # shares parameters; lets code that reads self.top_k see the other k, in this call only
    if k is not None and isinstance(getattr(twin, "top_k", None), int):
        twin.top_k = k
    selection = _Selection(choice, k, num_experts, ids_TK.shape[1])
    scoring = _Scoring(choice, num_experts, _classes(output, num_experts)) if choice.scores else nullcontext()
    with scoring, selection:
        changed = type(router).forward(twin, *args, **kwargs)
    if isinstance(scoring, _Scoring):
        scoring.check(type(router).__name__)
    if selection.hits or not choice.picks:
        return changed
    if choice.scores:
        raise BadInput(f"policy: {type(router).__name__} selects by no top-k: logits and probs go with no other field there")
    if selection.table is not None:
        return _replace(changed, ids_at(changed), selection.table.reshape(-1, selection.table.shape[-1]))
    return _through_logits(router, args, kwargs, choice, k, num_experts, ids_TK.shape[1])


def ids_at(output: Any) -> int:
    """Where a router's output tuple holds the chosen ids: its integer matrix."""
    for i, part in enumerate(output if isinstance(output, tuple | list) else ()):
        if isinstance(part, Tensor) and not part.is_floating_point() and part.dim() == 2:
            return i
    raise BadInput("policy: this router returns no expert ids; use fn=, which sees the finished routing")


def _classes(output: Any, num_experts: int) -> int:
    """How many rows the router scores: its experts, and classes of its own (such as "skip") where it has some."""
    first = output[0] if isinstance(output, tuple | list) else output
    wide = isinstance(first, Tensor) and first.is_floating_point() and first.shape[-1] >= num_experts
    return first.shape[-1] if wide else num_experts


def _replace(output: Any, at: int, part: Tensor) -> tuple:
    return (*output[:at], part, *output[at + 1 :])


class _Selection(TorchFunctionMode):
    """Alters what top-k selections over experts see; values are still gathered from the unaltered scores."""

    def __init__(self, choice: Choice, k: int | None, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.choice, self.k, self.num_experts, self.top_k = choice, k, num_experts, top_k
        self.hits = 0
        self.table: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.topk, torch.Tensor.topk):
            return self._topk(func, *args, **kwargs)
        if func in (torch.max, torch.Tensor.max) and self._groups(args[0]) and (len(args) > 1 or "dim" in kwargs):
            return func(self._altered_groups(args[0]), *args[1:], **kwargs)
        if func in (torch.gather, torch.Tensor.gather) and not self.hits:
            return self._gather(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _topk(self, func, input, k, dim=-1, largest=True, sorted=True):
        if dim not in (-1, input.dim() - 1) or not largest:
            return func(input, k, dim, largest, sorted)
        if self._groups(input):
            return func(self._altered_groups(input), k, dim, largest, sorted)
        if input.shape[-1] < self.num_experts:
            return func(input, k, dim, largest, sorted)
        self.hits += 1
        if self.choice.force_TK is not None:
            index = self.choice.force_TK.to(input.device).reshape(*input.shape[:-1], -1)
        elif self.choice.rank is not None:
            index = self._altered(input).topk(self.choice.rank, dim).indices[..., -1:]
        else:
            index = self._altered(input).topk(k if self.k is None else self.k, dim, largest, sorted).indices
        return torch.return_types.topk((input.gather(-1, index), index))

    def _altered(self, scores: Tensor) -> Tensor:
        """Scores over the last dimension; rows past E (a router's own extra classes) stay as they are."""
        extra = scores.shape[-1] - self.num_experts
        if self.choice.bias_E is not None:
            bias = nn.functional.pad(self.choice.bias_E.to(scores.device), (0, extra))
            scores = scores + bias.to(scores.dtype)
        if self.choice.allow_E is not None:
            # What the router itself ruled out (-inf: other groups) must still beat what the policy rules out.
            scores = scores.clamp(min=torch.finfo(scores.dtype).min / 2)
            allow = nn.functional.pad(self.choice.allow_E.to(scores.device), (0, extra), value=True)
            scores = scores.masked_fill(~allow, float("-inf"))
        return scores

    def _groups(self, scores: Any) -> bool:
        return (
            isinstance(scores, Tensor)
            and scores.dim() == 3
            and scores.shape[2] < self.num_experts
            and scores.shape[1] * scores.shape[2] == self.num_experts
        )

    def _altered_groups(self, scores_TGe: Tensor) -> Tensor:
        """Group scores as if the masked experts gave nothing; a group with no expert left comes last."""
        _, groups, size = scores_TGe.shape
        if self.choice.bias_E is not None:
            scores_TGe = scores_TGe + self.choice.bias_E.to(scores_TGe).view(groups, size)
        if self.choice.allow_E is None:
            return scores_TGe
        allow_Ge = self.choice.allow_E.to(scores_TGe.device).view(groups, size)
        nothing = scores_TGe.detach().amin().clamp(max=0)
        scores_TGe = torch.where(allow_Ge, scores_TGe, nothing)
        return scores_TGe.masked_fill(~allow_Ge.any(1, keepdim=True), float("-inf"))

    def _gather(self, func, input, dim, index, **kwargs):
        table = input.shape[-1] == self.num_experts and index.dim() == 2 and index.shape[-1] == self.top_k
        if not table or dim not in (-1, input.dim() - 1):
            return func(input, dim, index, **kwargs)
        if self.choice.force_TK is not None:
            self.table = self.choice.force_TK.to(index.device)
        else:
            scores = self._altered(input.detach().float())
            places = torch.arange(index.shape[-1], 0, -1, device=index.device) * 1e6
            first = torch.zeros_like(scores).scatter(-1, index, places.to(scores.dtype).expand_as(index))
            rank = self.choice.rank
            ordered = (scores + first).topk(rank or (index.shape[-1] if self.k is None else self.k), -1).indices
            self.table = ordered if rank is None else ordered[..., -1:]
        return func(input, dim, self.table, **kwargs)


class _Scoring(TorchFunctionMode):
    """Adds to the product that scores the experts, or puts the logarithm of other probabilities in its place."""

    def __init__(self, choice: Choice, num_experts: int, classes: int) -> None:
        super().__init__()
        self.choice, self.num_experts, self.classes = choice, num_experts, classes
        self.hits, self.softmax = 0, False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.softmax, torch.Tensor.softmax, nn.functional.softmax):
            self.softmax = True
        if func is not nn.functional.linear or out.shape[-1] != self.classes:
            return out
        self.hits += 1
        if self.choice.logits_E is not None:
            return out + nn.functional.pad(self.choice.logits_E.to(out), (0, self.classes - self.num_experts))
        assert self.choice.probs_E is not None
        probs_E = self.choice.probs_E.to(out.device)
        return probs_E.clamp(min=torch.finfo(torch.float32).tiny).log().to(out.dtype).expand_as(out)

    def check(self, router: str) -> None:
        if self.hits != 1:
            raise BadInput(f"policy: the logits of {router} are not one product over its experts: logits and probs cannot be set")
        if self.choice.probs_E is not None and (not self.softmax or self.classes != self.num_experts):
            raise BadInput(f"policy probs: {router} does not score by a softmax over its experts alone; use logits or fn")


class _Logits(TorchFunctionMode):
    """Alters the logits themselves, for a router whose selection cannot be seen."""

    def __init__(self, num_experts: int, bias_E: Tensor | None, allow: Tensor | None) -> None:
        super().__init__()
        self.num_experts, self.bias_E, self.allow = num_experts, bias_E, allow
        self.hits = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is nn.functional.linear and out.shape[-1] == self.num_experts:
            self.hits += 1
            if self.bias_E is not None:
                out = out + self.bias_E.to(out)
            if self.allow is not None:
                low = torch.finfo(out.dtype).min / 4  # finite: routers take differences of logits
                out = out.masked_fill(~self.allow.to(out.device).expand_as(out), low)
        return out


def _through_logits(
    router: nn.Module, args: tuple, kwargs: dict, choice: Choice, k: int | None, num_experts: int, top_k: int
) -> Any:
    """A router without a visible selection: rule experts out through its logits, so that it must choose the rest."""

    def run(bias_E: Tensor | None, allow: Tensor | None) -> Any:
        mode = _Logits(num_experts, bias_E, allow)
        with mode:
            output = type(router).forward(router, *args, **kwargs)
        if not mode.hits:
            raise BadInput(f"policy: the selection of {type(router).__name__} cannot be reached; use fn= instead")
        return output

    if choice.rank is not None and choice.rank > top_k:
        raise BadInput(f"policy: {type(router).__name__} always chooses {top_k} experts; rank may only be as large")
    if k is not None and (k > top_k or (choice.force_TK is not None and k != top_k)):
        raise BadInput(f"policy: {type(router).__name__} always chooses {top_k} experts; k may only be smaller")
    force_TK = choice.force_TK
    if force_TK is None and choice.bias_E is not None:
        biased = run(choice.bias_E, choice.allow_E)
        force_TK = biased[ids_at(biased)]  # the weights then come from unbiased logits
    if force_TK is not None:
        allow_TE = torch.zeros(force_TK.shape[0], num_experts, dtype=torch.bool, device=force_TK.device)
        output = run(None, allow_TE.scatter(1, force_TK, True))
    else:
        output = run(None, choice.allow_E)
    if choice.rank is not None and choice.rank <= top_k:
        first = choice.rank - 1
        shape = output[ids_at(output)].shape
        return tuple(p[:, first : first + 1] if isinstance(p, Tensor) and p.shape == shape else p for p in output)
    if k is not None and k < top_k:
        shape = output[ids_at(output)].shape
        output = tuple(part[:, :k] if isinstance(part, Tensor) and part.shape == shape else part for part in output)
    return output
