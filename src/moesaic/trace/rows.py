"""From passes that wait on their device to the rows of a trace.

Shape legend: T tokens, L layers, K slots, E experts, A layers looked ahead, M experts looked ahead at, H sampled tokens,
D model width.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from moesaic.core.errors import BadInput
from moesaic.trace import segments
from moesaic.trace.file import id_dtype

UNKNOWN = {np.dtype(np.uint16): 0xFFFF, np.dtype(np.uint32): 0xFFFFFFFF}
"""The token id of a row whose text is not known (a model that was given embeddings)."""


class Passed(NamedTuple):
    """A finished pass of one stream, small, waiting on its device until the next flush."""

    ids_LTK: Tensor
    weights_LTK: Tensor | None
    logits_LTE: Tensor | None
    ahead_LTAM: Tensor | None
    hidden_LHD: Tensor | None
    sampled_H: Tensor | None
    tokens_BN: Tensor | None
    mask_BN: Tensor | None
    """As the caller gave it: 0 is padding."""
    ended_by: int | None
    """Rows whose answer has ended are fed this token, which the mask does not show as padding."""
    numbers: range | np.ndarray
    """Sequences: one per row of the batch, or one per token."""
    step: int

    @property
    def sequence_T(self) -> np.ndarray:
        return np.repeat(np.array(self.numbers), self.ids_LTK.shape[1] // len(self.numbers))


class Rows:
    """Turns finished passes into columns; `kept` names those that a trace has beside its choices and tokens."""

    def __init__(self, experts_L: np.ndarray, slots: int, vocabulary: int, kept: set[str]) -> None:
        self.experts_L, self.slots, self.kept = experts_L, slots, kept
        self.dtype = id_dtype(int(experts_L.max()))
        self.token_dtype = np.dtype(np.uint16 if vocabulary < 0xFFFF else np.uint32)

    def of(self, queue: list[Passed]) -> tuple[np.ndarray, np.ndarray, segments.Columns]:
        """Sequence and step of every row, and the columns; padding is gone."""
        sizes = np.array([one.ids_LTK.shape[1] for one in queue])
        ids_TLK = _numpy([one.ids_LTK for one in queue]).view(self.dtype).copy()
        # ids past the last expert are slots that another rank of expert parallelism serves
        ids_TLK[ids_TLK >= self.experts_L.reshape(-1, 1).astype(self.dtype)] = np.iinfo(self.dtype).max
        columns: segments.Columns = {"experts": ids_TLK}
        if "weights" in self.kept:
            columns["weights"] = self._floats(queue, [one.weights_LTK for one in queue], self.slots, 0)
        if "logits" in self.kept:
            columns["logits"] = self._floats(queue, [one.logits_LTE for one in queue], int(self.experts_L.max()), float("-inf"))
        if "ahead" in self.kept:
            parts = [one.ahead_LTAM for one in queue if one.ahead_LTAM is not None]
            columns["ahead"] = _numpy(parts).view(self.dtype).copy()
        columns["tokens"] = np.concatenate([self._tokens(one) for one in queue])
        sequence_T = np.concatenate([one.sequence_T for one in queue])
        step_T = np.repeat([one.step for one in queue], sizes)
        if "hidden" in self.kept:
            _add_hidden(columns, queue, sizes)
        kept_T = _real(queue, sizes, columns["tokens"])
        if not kept_T.all():
            if "hidden" in columns:
                stays_H = kept_T[columns["hidden_rows"]]
                columns["hidden"] = columns["hidden"][stays_H]
                columns["hidden_rows"] = (np.cumsum(kept_T) - 1)[columns["hidden_rows"][stays_H]]
            columns = {name: col if name.startswith("hidden") else col[kept_T] for name, col in columns.items()}
            sequence_T, step_T = sequence_T[kept_T], step_T[kept_T]
        return sequence_T, step_T, columns

    @staticmethod
    def _floats(queue: list[Passed], parts: list[Tensor | None], width: int, empty: float) -> np.ndarray:
        filled = []
        for one, part in zip(queue, parts, strict=True):
            shape = (*one.ids_LTK.shape[:2], width)
            filled.append(torch.full(shape, empty, dtype=torch.float16) if part is None else widened(part, width, empty))
        return _numpy(filled)

    def _tokens(self, one: Passed) -> np.ndarray:
        if one.tokens_BN is None:
            return np.full(one.ids_LTK.shape[1], UNKNOWN[self.token_dtype], self.token_dtype)
        return one.tokens_BN.reshape(-1).cpu().numpy().astype(self.token_dtype)


def _real(queue: list[Passed], sizes: np.ndarray, tokens_T: np.ndarray) -> np.ndarray:
    """Which rows are no padding."""
    masks = [torch.ones(1, int(n)) if one.mask_BN is None else one.mask_BN for one, n in zip(queue, sizes, strict=True)]
    kept_T = torch.cat([mask.reshape(-1).cpu() != 0 for mask in masks]).numpy()
    if any(one.ended_by is not None for one in queue):
        pads = [-1 if one.ended_by is None else one.ended_by for one in queue]
        kept_T &= tokens_T.astype(np.int64) != np.repeat(pads, sizes)
    return kept_T


def _add_hidden(columns: segments.Columns, queue: list[Passed], sizes: np.ndarray) -> None:
    starts = np.cumsum(sizes) - sizes
    rows = [one.sampled_H.numpy() + s for one, s in zip(queue, starts, strict=True) if one.sampled_H is not None]
    columns["hidden"] = _numpy([one.hidden_LHD for one in queue if one.hidden_LHD is not None])
    columns["hidden_rows"] = np.concatenate(rows).astype(np.int64)


def widened(part: Tensor, width: int, empty: float) -> Tensor:
    """`width` columns, the new ones empty. Raises BadInput for more: a trace's slots are fixed when it begins."""
    missing = width - part.shape[-1]
    if missing < 0:
        raise BadInput(f"a layer chose {part.shape[-1]} experts per token; the trace was begun with {width}: start a new one")
    return pad(part, (0, missing), value=empty) if missing else part


def _numpy(parts: list[Tensor]) -> np.ndarray:
    """Passes one after another, rows first: [L, T, ...] each -> [sum of T, L, ...]."""
    together = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    return np.ascontiguousarray(together.cpu().numpy().swapaxes(0, 1))
