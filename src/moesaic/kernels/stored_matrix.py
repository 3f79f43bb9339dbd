"""A matrix as it is stored, in bf16 or in few bits (low_bits.py), times the few rows of a decoding step on a CPU.

One compiled pass reads it once: bf16 as in linear.py, codes as quantized.py reads experts (activations of 16 bits). More
rows, or a machine without the instructions, take the dequantised matrix to PyTorch, a stretch of rows at a time; that is
also the twin.

Shape legend: T rows, A input width, B output width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.core.errors import BadInput
from moesaic.kernels import quantized
from moesaic.kernels.few_rows import MOST_ROWS, MULTIPLE, available
from moesaic.kernels.low_bits import Packing, dequantize_matrix, open_record, part_offsets, quantize_matrix, record_bytes
from moesaic.kernels.memory import scratch

WIDENED_BYTES = 16 << 20
"""Of a matrix widened at a time, in bf16: half of a third-level cache."""


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """[B, A]: bf16 in `held` [B, A], or its record (uint8) where there is a packing. Keeps the memory as long as it lives."""

    held: Tensor
    shape: tuple[int, int]
    packing: Packing | None = None

    def __post_init__(self) -> None:
        if self.packing is not None:
            open_record(self.held, self.packing, self.shape)
        elif self.held.dtype is not torch.bfloat16 or tuple(self.held.shape) != self.shape or not self.held.is_contiguous():
            raise BadInput(
                f"a stored matrix is contiguous bf16 {list(self.shape)}; got {self.held.dtype} {list(self.held.shape)}"
            )
        if self.held.device.type != "cpu":
            raise BadInput(f"a stored matrix lies on the CPU; got {self.held.device}")

    @classmethod
    def quantize(cls, weight_BA: Tensor, packing: Packing) -> StoredMatrix:
        """The nearest matrix in few bits. Raises BadInput for what quantize_matrix refuses."""
        return cls(quantize_matrix(weight_BA, packing), (weight_BA.shape[0], weight_BA.shape[1]), packing)

    @property
    def nbytes(self) -> int:
        return self.held.nbytes

    @cached_property
    def suits(self) -> bool:
        """Whether the compiled pass can read it on this machine."""
        if self.packing is None:
            return self.shape[1] % MULTIPLE == 0 and available()
        whole = self.shape[1] % (256 // self.packing.bits) == self.shape[0] % 4 == 0
        return whole and quantized.available()

    @cached_property
    def row_6(self) -> np.ndarray:
        """As compiled/stored_matrix.py takes it."""
        at = self.held.data_ptr()
        if self.packing is None:
            return np.array([16, at, 0, 0, 0, 0])
        kind, bits, size, shift = quantized.form_row(self.packing)
        return np.array([bits, at, at + part_offsets(self.packing, self.shape)[1], kind, size, shift])

    def words(self, rows: int) -> int:
        """16-bit words that the pass needs to prepare so many rows of activations."""
        if self.packing is None:
            return 32
        from moesaic.kernels.compiled import codes

        return rows * codes.row_bytes(self.shape[1], self.packing.bits) // 2

    def dequantize(self, low: int = 0, high: int | None = None) -> Tensor:
        """Rows `low` to `high`, fp32 (bf16 as stored)."""
        high = self.shape[0] if high is None else high
        if self.packing is None:
            return self.held[low:high]
        codes, scale = (part[low:high] for part in open_record(self.held, self.packing, self.shape))
        shape = (high - low, self.shape[1])
        record = torch.zeros(record_bytes(self.packing, shape), dtype=torch.uint8)
        for mine, part in zip(open_record(record, self.packing, shape), (codes, scale), strict=True):
            mine.copy_(part)
        return dequantize_matrix(record, self.packing, shape)

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., A] @ matrix.T as [..., B] in x's dtype; no gradients through the matrix."""
        rows = x.numel() // self.shape[1]
        if 0 < rows <= MOST_ROWS and x.dtype is torch.bfloat16 and x.is_cpu and not torch.is_grad_enabled() and self.suits:
            return self._few(x, rows)
        return self._many(x)

    def _few(self, x: Tensor, rows: int) -> Tensor:
        from moesaic.kernels.compiled import pool, stored_matrix

        x, y = x.contiguous(), x.new_empty(*x.shape[:-1], self.shape[0])
        words = scratch("stored_matrix", 1, self.words(rows), torch.int16)[0].numpy()
        stored_matrix.product(
            x.data_ptr(), rows, self.shape[1], self.row_6, self.shape[0], words, y.data_ptr(), pool.join()
        )  # fmt: skip
        return y

    def _many(self, x: Tensor) -> Tensor:
        if self.packing is None:
            return linear(x, self.held)
        step = max(4, WIDENED_BYTES // (2 * self.shape[1]))
        y = x.new_empty(*x.shape[:-1], self.shape[0])
        for low in range(0, self.shape[0], step):
            high = min(low + step, self.shape[0])
            y[..., low:high] = linear(x, self._widened(low, high, x.dtype))
        return y

    def _widened(self, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Rows `low` to `high` in the activations' dtype; in scratch, where a compiled pass widens them."""
        if dtype is not torch.bfloat16 or not self.suits:
            return self.dequantize(low, high).to(dtype)
        from moesaic.kernels.compiled import pool
        from moesaic.kernels.compiled.code_widen import widen

        assert self.packing is not None
        _, codes_at, scale_at, *_ = (int(number) for number in self.row_6)
        code_row, scale_row = self.shape[1] * self.packing.bits // 8, -(-self.shape[1] // self.packing.group_size) * 2
        out = scratch("stored_wide", high - low, self.shape[1], torch.bfloat16)
        widen(
            np.array([[codes_at + low * code_row, scale_at + low * scale_row, out.data_ptr(), high - low, self.shape[1],
                       self.packing.bits, self.packing.group_size]]),
            pool.join(),
        )  # fmt: skip
        return out
