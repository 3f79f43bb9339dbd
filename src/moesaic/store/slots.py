"""Room for experts of one shape: slots in a few large tensors, whose memory is taken when it is first written.

Stacked, because kernels read expert e of `[E, ., .]`: slot s of `[S, ., .]` looks the same to them.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

PAGE = mmap.PAGESIZE


LINE = 64
"""Bytes of a cache line. Some libraries' products depend, in their last bits, on where in a line a matrix begins."""


class Slots:
    """`matrix(m, s)` is matrix m of slot s. `take` and `give` hand slots out; untouched ones occupy no memory.

    With `stack`, `tensors[m]` holds matrix m of all slots, contiguous. Without, each matrix has room to begin anywhere in a
    cache line.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int, stack: bool = True) -> None:
        self.shapes, self.dtype, self.count, self.stack = [tuple(shape) for shape in shapes], dtype, count, stack
        sizes = [math.prod(shape) * dtype.itemsize for shape in shapes]
        self._strides = sizes if stack else [-(-size // LINE) * LINE + LINE for size in sizes]
        self.slot_bytes = sum(self._strides)
        self._maps = [_anonymous(max(1, count) * stride) for stride in self._strides]
        self._bytes = [torch.frombuffer(memory, dtype=torch.uint8) for memory in self._maps]
        self._sizes = sizes
        self._free = list(range(count - 1, -1, -1))
        self._touched: set[int] = set()

    @property
    def tensors(self) -> list[Tensor]:
        """Matrix m of all slots, `[count, *shapes[m]]`; without `stack` not contiguous."""
        item = self.dtype.itemsize
        stacked = []
        for raw, stride, shape in zip(self._bytes, self._strides, self.shapes, strict=True):
            steps = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            typed = raw[: max(1, self.count) * stride].view(self.dtype)
            stacked.append(typed.as_strided((self.count, *shape), (stride // item, *steps)))
        return stacked

    def matrix(self, m: int, slot: int, shift: int = 0) -> Tensor:
        """Matrix m of a slot, begun `shift` bytes into a cache line (0 with `stack`)."""
        first = slot * self._strides[m] + (0 if self.stack else shift % LINE // self.dtype.itemsize * self.dtype.itemsize)
        return self._bytes[m][first : first + self._sizes[m]].view(self.dtype).view(self.shapes[m])

    @property
    def used(self) -> int:
        """Slots handed out."""
        return self.count - len(self._free)

    @property
    def touched_bytes(self) -> int:
        """Bytes of memory behind all slots that were ever handed out and not trimmed since."""
        return len(self._touched) * self.slot_bytes

    def take(self) -> int:
        """A free slot, one that has memory already if there is any. Raises IndexError when none is left."""
        slot = self._free.pop()
        self._touched.add(slot)
        return slot

    def give(self, slot: int) -> None:
        """The slot is free again; what it holds may be overwritten."""
        self._free.append(slot)

    def trim(self) -> None:
        """Return the memory of free slots to the system."""
        for slot in self._touched.intersection(self._free):
            for memory, size in zip(self._maps, self._strides, strict=True):
                first, last = -(-slot * size // PAGE) * PAGE, (slot + 1) * size // PAGE * PAGE
                if last > first and hasattr(mmap, "MADV_DONTNEED"):
                    memory.madvise(mmap.MADV_DONTNEED, first, last - first)
            self._touched.discard(slot)
        # slots without memory are handed out last
        self._free.sort(key=lambda slot: (slot in self._touched, -slot))


def _anonymous(size: int) -> mmap.mmap:
    if hasattr(mmap, "MAP_PRIVATE"):
        return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return mmap.mmap(-1, size)
