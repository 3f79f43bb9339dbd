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


class Slots:
    """`tensors[m][s]` is matrix m of slot s. `take` and `give` hand slots out; untouched ones occupy no memory."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int) -> None:
        self.shapes, self.dtype, self.count = [tuple(shape) for shape in shapes], dtype, count
        self.slot_bytes = sum(math.prod(shape) for shape in shapes) * dtype.itemsize
        self._maps = [_anonymous(max(1, count) * math.prod(shape) * dtype.itemsize) for shape in shapes]
        self.tensors: list[Tensor] = [
            torch.frombuffer(memory, dtype=dtype, count=count * math.prod(shape)).view(count, *shape)
            for memory, shape in zip(self._maps, self.shapes, strict=True)
        ]
        self._free = list(range(count - 1, -1, -1))
        self._touched: set[int] = set()

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
            for memory, shape in zip(self._maps, self.shapes, strict=True):
                size = math.prod(shape) * self.dtype.itemsize
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
