"""A router runs again under a policy: for the same input, with what its scoring product or its selection sees altered.

Three kinds of router exist:

- it selects with top-k over a row per expert (every architecture of transformers 5.23 but the two below, group-limited
  ones and correction biases included): k, rank, mask, bias and force are exact;
- it looks its experts up in a table and gathers their scores (hash routing): force is exact; k, rank and mask keep the
  table's choices first and fill up by score; bias only orders what is filled up;
- it selects by other means (sparse mixer): mask, bias and force rule the other experts out through its logits, so the
  weights are those of a router that has only the experts left; a smaller k keeps the first k slots; a larger k is refused.

In group-limited routers a mask also holds where groups are scored: a masked expert adds nothing to its group, and a group
with none left comes last. Experts outside the chosen groups are taken only where the mask leaves too few inside.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from moesaic.core.errors import BadInput
from moesaic.view.policy import Choice


def rerun(router: nn.Module, args: tuple, kwargs: dict, output: Any, choice: Choice, num_experts: int) -> Any:
    """The router's output under a choice, for the same inputs; `output` is what it gave without one."""
    ids_TK = output[ids_at(output)]
    if choice.force_TK is not None and choice.force_TK.dim() == 1:
        choice = replace(choice, force_TK=choice.force_TK.to(ids_TK.device).expand(ids_TK.shape[0], -1))
    if choice.force_TK is not None and choice.force_TK.shape[0] != ids_TK.shape[0]:
        raise BadInput(f"policy force: ids for {choice.force_TK.shape[0]} tokens, the call has {ids_TK.shape[0]}")
    k = choice.k if choice.force_TK is None else choice.force_TK.shape[1]
    k = 1 if choice.rank is not None else k
    twin: Any = copy.copy(router)  # shares parameters; lets code that reads self.top_k see the other k, in this call only
    if k is not None and isinstance(getattr(twin, "top_k", None), int):
        twin.top_k = k
    selection = _Selection(choice, k, num_experts, ids_TK.shape[1])
    scoring = _Scoring(choice, num_experts, _widths(router, output, num_experts)) if choice.scores else nullcontext()
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


def _widths(router: nn.Module, output: Any, num_experts: int) -> set[int]:
    """Rows that the scoring product may have: what the router returns, or its only large enough matrix, has them. More rows
    than experts are classes of its own, such as "skip"."""
    first = output[0] if isinstance(output, tuple | list) else output
    wide = isinstance(first, Tensor) and first.is_floating_point() and first.shape[-1] >= num_experts
    matrices = [p.shape[0] for p in router.parameters() if p.dim() == 2 and p.shape[0] >= num_experts]
    return {first.shape[-1] if wide else num_experts, *(matrices if len(matrices) == 1 else ())}


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
        nothing = scores_TGe.detach().amin((1, 2), keepdim=True).clamp(max=0)  # of the token: rows of a batch do not meet
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

    def __init__(self, choice: Choice, num_experts: int, widths: set[int]) -> None:
        super().__init__()
        self.choice, self.num_experts, self.widths = choice, num_experts, widths
        self.products: list[int] = []
        self.softmax = False
        self.logits: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.softmax, torch.Tensor.softmax, nn.functional.softmax):
            self.softmax = True
            return self._probs(args[0] if args else (kwargs or {})["input"], out)
        if func is not nn.functional.linear or out.shape[-1] not in self.widths:
            return out
        self.products.append(out.shape[-1])
        if self.choice.logits_E is not None:
            return out + nn.functional.pad(self.choice.logits_E.to(out), (0, out.shape[-1] - self.num_experts))
        assert self.choice.probs_E is not None
        if out.shape[-1] != self.num_experts:
            return out  # `check` refuses
        probs_E = self.choice.probs_E.to(out.device).clamp(min=torch.finfo(torch.float32).tiny)
        self.logits = probs_E.log().to(out.dtype).expand_as(out)
        return self.logits

    def _probs(self, given: Tensor, out: Tensor) -> Tensor:
        """The probabilities themselves where the softmax is of their logarithm: exact, gradients of the selected ones only."""
        if self.logits is None or out.shape != self.logits.shape or not torch.equal(given.to(self.logits.dtype), self.logits):
            return out
        assert self.choice.probs_E is not None
        return self.choice.probs_E.to(out).expand_as(out)

    def check(self, router: str) -> None:
        if len(self.products) != 1:
            raise BadInput(
                f"policy: the logits of {router} are not one product over its experts: logits and probs cannot be set"
            )
        if self.choice.probs_E is not None and (not self.softmax or self.products[0] != self.num_experts):
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
