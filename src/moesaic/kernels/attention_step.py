"""A decoding step of a whole attention module on a CPU: projections, norms, rotary positions, cache and output in one pass.

Module by module a step is some thirty small operations, whose own time is a third of what an attention layer of a small model
takes. The pass does what transformers' modules do, rounding where they round; its twin is such a module's own forward.

Shape legend: H query heads, G key-value heads, W head width, D model width, S cached positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.few_rows import MULTIPLE
from moesaic.kernels.memory import scratch
from moesaic.kernels.stored_matrix import StoredMatrix


@dataclass(frozen=True, eq=False)
class AttentionStep:
    """q [H W, D], k and v [G W, D], o [D, H W]; norms of W numbers (each head) or of all heads' together, or none."""

    q: StoredMatrix
    k: StoredMatrix
    v: StoredMatrix
    o: StoredMatrix
    width: int
    scale: float
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None
    eps: float = 0.0

    @property
    def heads(self) -> int:
        return self.q.shape[0] // self.width

    @property
    def groups(self) -> int:
        return self.k.shape[0] // self.width

    @cached_property
    def suits(self) -> bool:
        """Whether the pass can take these matrices and norms."""
        matrices, dim = (self.q, self.k, self.v, self.o), self.q.shape[1]
        inner, kv = self.q.shape[0], self.k.shape[0]
        shapes = (self.k.shape, self.v.shape, self.o.shape) == ((kv, dim), (kv, dim), (dim, inner))
        whole = self.width % MULTIPLE == inner % self.width == kv % self.width == 0 and kv and inner % kv == 0
        alike = self.q.packing == self.k.packing == self.v.packing  # they share the prepared activations
        norms = (self.q_norm is None) == (self.k_norm is None) and (
            self.q_norm is None or self.k_norm is None or self._norm_sizes() in ((self.width, self.width), (inner, kv))
        )
        return bool(shapes and whole and alike and norms and all(matrix.suits for matrix in matrices))

    def _norm_sizes(self) -> tuple[int, int]:
        assert self.q_norm is not None and self.k_norm is not None
        return self.q_norm.numel(), self.k_norm.numel()

    @cached_property
    def _fixed(self) -> tuple[np.ndarray, int, int, bool, int]:
        """The matrices, the norms' addresses, whether norms are per head, and the words of prepared activations."""
        table = np.stack([matrix.row_6 for matrix in (self.q, self.k, self.v, self.o)])
        at = [0 if norm is None else norm.data_ptr() for norm in (self.q_norm, self.k_norm)]
        per_head = self.q_norm is not None and self.q_norm.numel() == self.width
        return table, at[0], at[1], per_head, max(self.q.words(1), self.o.words(1))

    def __call__(self, x_1D: Tensor, cos_W: Tensor, sin_W: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """y of x's shape. keys and values are contiguous [G, room, W]; position `length` - 1 is written."""
        from moesaic.kernels.compiled import pool
        from moesaic.kernels.compiled.attention_step import step

        table, q_norm_at, k_norm_at, per_head, words = self._fixed
        dim, heads, groups = self.q.shape[1], self.heads, self.groups
        x_1D, cos_W, sin_W, y_1D = x_1D.contiguous(), cos_W.contiguous(), sin_W.contiguous(), torch.empty_like(x_1D)
        held = scratch("attention_step", 2 * (heads + groups), self.width, torch.bfloat16)
        step(
            x_1D.data_ptr(), table, scratch("stored_matrix", 1, words, torch.int16)[0].numpy(), q_norm_at, k_norm_at, per_head,
            self.eps, cos_W.data_ptr(), sin_W.data_ptr(), keys.data_ptr(), values.data_ptr(), keys.shape[-2], length,
            heads, groups, self.width, dim, self.scale, held.data_ptr(), y_1D.data_ptr(), pool.join(),
        )  # fmt: skip
        return y_1D
