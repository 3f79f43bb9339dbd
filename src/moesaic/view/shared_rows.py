"""Router rows that share experts: a block whose router has more rows than the bank holds experts, and a map between them.

Ids are translated in a hook before the experts see them, ahead of every other hook there: what views, traces, policies and
caches see are experts. A token that chose two rows of one expert has it once, at the sum of both weights.
Shape legend: T tokens, K slots, R router rows, F experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.view import implementation

MAP = "shared_rows"
"""Attribute of an experts module: the expert of each row of its router, a tuple of numbers."""
_HOOK = "_row_hook"


def map_of(experts: Any) -> Tensor | None:
    """Expert of each router row, int64 [R]; None where every row has its own."""
    held = getattr(experts, MAP, None)
    return None if held is None else torch.tensor(held, device="cpu")


def share(experts: Any, rows: Sequence[int] | None) -> None:
    """Let router rows run the experts of this map, in place of any that there was; None: each its own."""
    before = experts.__dict__.pop(_HOOK, None)
    if before is not None:
        before.remove()
        delattr(experts, MAP)
    if rows is None:
        return
    held = torch.tensor(list(rows), device="cpu")  # also while a model is built without memory

    def translate(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        names, values = list(kwargs), [*args, *kwargs.values()]
        skips = getattr(getattr(module, "config", None), "_experts_implementation", None) == implementation.NAME
        values[1], values[2] = once(values[1], values[2], held, skips)
        return tuple(values[: len(args)]), dict(zip(names, values[len(args) :], strict=True))

    setattr(experts, MAP, tuple(held.tolist()))
    experts.__dict__[_HOOK] = nn.Module.register_forward_pre_hook(experts, translate, with_kwargs=True, prepend=True)


def once(ids_TK: Tensor, weights_TK: Tensor, held_R: Tensor, skips: bool = False) -> tuple[Tensor, Tensor]:
    """Rows to experts. A repeated expert's weights go to its first slot; the others have weight 0, and are empty (-1) where
    the implementation `skips` such slots.
    """
    known_R = held_R.to(ids_TK.device)
    inside_TK = (ids_TK >= 0) & (ids_TK < len(known_R))
    new_TK = torch.where(inside_TK, known_R[ids_TK.clamp(0, len(known_R) - 1).long()].to(ids_TK.dtype), ids_TK)
    same_TKK = (new_TK[:, :, None] == new_TK[:, None, :]) & inside_TK[:, :, None]
    first_TK = same_TKK.int().argmax(-1) == torch.arange(ids_TK.shape[1], device=ids_TK.device)
    sums_TK = (same_TKK.to(weights_TK.dtype) * weights_TK[:, None, :]).sum(-1)
    again_TK = inside_TK & ~first_TK
    sums_TK = torch.where(inside_TK, sums_TK.masked_fill(again_TK, 0), weights_TK)
    return new_TK.masked_fill(again_TK, -1) if skips else new_TK, sums_TK


def of_experts(logits_TR: Tensor, held_R: Tensor) -> Tensor:
    """Scores of experts [T, F]: the log-sum-exp of their rows', so that a softmax gives each the sum of its rows' shares."""
    at_TR = held_R.to(logits_TR.device).expand_as(logits_TR)
    shape = (len(logits_TR), int(held_R.max()) + 1)
    scores_TR = logits_TR.float()
    top_TF = scores_TR.new_full(shape, float("-inf")).scatter_reduce(1, at_TR, scores_TR.detach(), "amax")
    level_TF = top_TF.masked_fill(top_TF == float("-inf"), 0)  # all rows ruled out: stays so, and is no number less itself
    mass_TF = scores_TR.new_zeros(shape).scatter_add(1, at_TR, (scores_TR - level_TF.gather(1, at_TR)).exp())
    return mass_TF.log() + level_TF


def per_row(values_F: Tensor | None, held_R: Tensor | None) -> Tensor | None:
    """A value per expert as one per row."""
    return values_F if values_F is None or held_R is None else values_F[held_R]
