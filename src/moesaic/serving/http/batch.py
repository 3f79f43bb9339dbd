"""One forward pass for several rows: a batch shares a cache, rows join it and leave it between steps.

B rows, L positions (padded on the left), V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from moesaic.serving.http import cache as caches
from moesaic.serving.http.jobs import Beside, Row
from moesaic.serving.http.steering import steer
from moesaic.view import View


class Runner:
    """Calls the model with what its forward takes, under the rows' routing policies."""

    def __init__(self, model: Any, blocks: View | None) -> None:
        self.model, self.blocks = model, blocks
        self.device = model.get_input_embeddings().weight.device
        self._takes = set(inspect.signature(model.forward).parameters)
        default = getattr(model, "_supports_default_dynamic_cache", lambda: True)()
        self._own_cache = default and "past_key_values" in self._takes
        self.shares = self._own_cache and {"attention_mask", "position_ids"} <= self._takes
        """Whether rows of different lengths can share a call."""

    def __call__(
        self, ids_BN: Tensor, mask_BL: Tensor, positions_BN: Tensor, cache: Any, rows: Sequence[Row | Beside]
    ) -> tuple[Tensor, Any]:
        """Logits [B, V] of the last position, float32 on the CPU, and the cache."""
        if cache is None and self._own_cache:
            cache = DynamicCache(config=self.model.config.get_text_config(decoder=True))
        given = {
            "input_ids": ids_BN,
            "attention_mask": mask_BL,
            "position_ids": positions_BN,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        given = {name: value for name, value in given.items() if name in self._takes}
        around = rows[0].course.around  # such a row is alone in its batch
        with around() if around is not None else nullcontext(), steer(self.blocks, [row.policy for row in rows]):
            output = self.model(**given)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        return output.logits[:, -1].float().cpu(), cache


class Batch:
    """Rows that run in one call. `rows[i]` is row i of the cache."""

    def __init__(self, runner: Runner, rows: Sequence[Row | Beside], cache: Any, mask_BL: Tensor) -> None:
        self.runner, self.rows, self._cache, self._mask_BL = runner, list(rows), cache, mask_BL
        self._before: list[tuple[Any, ...]] | None = None
        self.shares = True
        """Whether other answers may join."""

    @classmethod
    def read(cls, runner: Runner, row: Row | Beside, copies: int) -> tuple[Batch, Tensor]:
        """Read the row's text, alone; the batch has `copies` places for it, to be named by `keep`. And its logits [V]."""
        length = row.length
        ids_BN = torch.tensor([[*row.job.prompt_ids, *row.written]], device=runner.device)
        positions_BN = torch.arange(length, device=runner.device)[None]
        mask_BL = torch.ones(1, length, dtype=torch.long, device=runner.device)
        logits_BV, cache = runner(ids_BN, mask_BL, positions_BN, None, [row])
        return cls(runner, [row] * copies, cache, mask_BL), logits_BV[0]

    @property
    def joins(self) -> bool:
        return self.runner.shares and caches.mergeable(self._cache)

    def split(self, rows: Sequence[Row]) -> list[Batch]:
        """After `read`: a batch for each of these rows, each with a cache of its own."""
        own = [self._cache, *(caches.duplicate(self._cache) for _ in rows[1:])]
        return [Batch(self.runner, [row], cache, self._mask_BL) for row, cache in zip(rows, own, strict=False)]

    def spread(self, rows: Sequence[Row | Beside]) -> Batch:
        """After `read`: one batch in which every one of these rows starts from the prompt."""
        self.rows = list(rows)
        self._cache = caches.select(self._cache, [0] * len(rows), self._mask_BL.shape[1])
        self._mask_BL = self._mask_BL.expand(len(rows), -1)
        return self

    def join(self, other: Batch) -> None:
        """Take in the rows of another batch."""
        mine, its = self._mask_BL.shape[1], other._mask_BL.shape[1]
        self._cache = caches.merge(self._cache, other._cache, mine, its)
        width = max(mine, its)
        self._mask_BL = torch.cat([_left(self._mask_BL, width), _left(other._mask_BL, width)])
        self.rows = self.rows + other.rows

    def step(self) -> Tensor:
        """Feed each row its last token; logits [B, V]. After an error, `undo` before anything else."""
        self._before = caches.mark(self._cache) if self.joins else None
        ids_B1 = torch.tensor([[row.last] for row in self.rows], device=self.runner.device)
        positions_B1 = torch.tensor([[row.length] for row in self.rows], device=self.runner.device)
        mask_BL = torch.cat([self._mask_BL, self._mask_BL.new_ones(len(self.rows), 1)], 1)
        logits_BV, self._cache = self.runner(ids_B1, mask_BL, positions_B1, self._cache, self.rows)
        self._mask_BL = mask_BL
        for row in self.rows:
            row.length += 1
        return logits_BV

    def undo(self) -> bool:
        """Take a failed step back; False where the cache is of a kind that cannot be."""
        if self._before is None:
            return False
        caches.rewind(self._cache, self._before)
        return True

    def apart(self) -> list[Batch]:
        """A batch for each answer and the rows beside it, without the padding of the others."""
        places: dict[int, list[int]] = {}
        for i, row in enumerate(self.rows):
            places.setdefault(id(row.owner), []).append(i)
        return [self._only(at) for at in places.values()]

    def _only(self, at: list[int]) -> Batch:
        length = self.rows[at[0]].length
        cache = caches.some_rows(self._cache, at, length)
        return Batch(self.runner, [self.rows[i] for i in at], cache, self._mask_BL[at, -length:])

    def keep(self, wanted: list[bool]) -> None:
        """Rows that are not wanted leave, and so does padding that only they needed."""
        if all(wanted):
            return
        places = [i for i, stays in enumerate(wanted) if stays]
        self.rows = [self.rows[i] for i in places]
        if not places:
            return
        width = max(row.length for row in self.rows)
        self._cache = caches.select(self._cache, places, width)
        self._mask_BL = self._mask_BL[places, self._mask_BL.shape[1] - width :]


def _left(mask_BL: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(mask_BL, (width - mask_BL.shape[1], 0))
