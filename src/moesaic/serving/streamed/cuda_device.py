"""A CUDA GPU as the upper tier: slots in two tensors, copies on a stream of their own, events instead of waiting.

Not yet run on a GPU. Host memory that experts come from is page-locked where it lies; where the system refuses, copies go
through a few page-locked buffers. Compute never waits on the host for a copy: its stream waits for the copy's event.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.sizes import show_bytes
from moesaic.serving.streamed.devices import Copy, CopyFailed, DeviceSlots, Pairs

BUFFERS = 4
"""Page-locked buffers for memory that is not: one fills while others travel."""


class CudaDevice:
    """GPU number `index`. `buffered`: never page-lock the host's own memory."""

    ordered = False

    def __init__(self, index: int = 0, buffered: bool = False) -> None:
        self.place = torch.device("cuda", index)
        self.name, self.buffered = str(self.place), buffered
        self._copies, self._back = torch.cuda.Stream(self.place), torch.cuda.Stream(self.place)
        self._pinned: dict[int, int] = {}
        """Page-locked ranges: first byte and length. `_locked`: those that were locked here."""
        self._locked: list[int] = []
        self._buffers: list[tuple[Tensor, torch.cuda.Event]] = []
        self._turn = 0

    def slots(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int, stack: bool) -> DeviceSlots:
        try:
            return _Stack(shapes, dtype, count, self.place)
        except torch.OutOfMemoryError as error:
            size = count * dtype.itemsize * sum(math.prod(shape) for shape in shapes)
            free = torch.cuda.mem_get_info(self.place)[0]
            raise BadInput(f"{self.name}: {show_bytes(size)} of experts do not fit, {show_bytes(free)} are free") from error

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self.place))
        return event

    def copy(self, pairs: Pairs, after: Any) -> Copy:
        try:
            if after is not None:
                self._copies.wait_event(after)
            for source, target in pairs:
                self._one(source, target)
            event = torch.cuda.Event()
            event.record(self._copies)
        except RuntimeError as error:
            raise CopyFailed(f"a copy to {self.name} failed: {error}") from error
        return _Evented(self, event)

    def _one(self, source: Tensor, target: Tensor) -> None:
        if self._is_pinned(source):
            with torch.cuda.stream(self._copies):
                target.copy_(source, non_blocking=True)
            return
        buffer, used = self._buffer(source.nbytes)
        used.synchronize()
        held = buffer[: source.nbytes].view(source.dtype).view(source.shape)
        held.copy_(source)
        with torch.cuda.stream(self._copies):
            target.copy_(held, non_blocking=True)
        used.record(self._copies)

    def _buffer(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        if not self._buffers or self._buffers[0][0].numel() < size:
            self.settle()
            self._buffers = [
                (torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.cuda.Event()) for _ in range(BUFFERS)
            ]
        self._turn = (self._turn + 1) % BUFFERS
        return self._buffers[self._turn]

    def _is_pinned(self, tensor: Tensor) -> bool:
        first = tensor.data_ptr()
        return any(start <= first and first + tensor.nbytes <= start + size for start, size in self._pinned.items())

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        made = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for mine, theirs in zip(made, tensors, strict=True):
            mine.copy_(theirs.detach(), non_blocking=True)
        torch.cuda.current_stream(self.place).synchronize()
        return made

    def to_host(self, rows: Tensor) -> Tensor:
        """Rows that were computed before the last `read_back`: whatever was launched since goes on meanwhile."""
        made = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
        with torch.cuda.stream(self._back):
            made.copy_(rows.detach(), non_blocking=True)
        self._back.synchronize()
        return made

    def to_device(self, rows: Tensor) -> Tensor:
        return rows.pin_memory().to(self.place, non_blocking=True)

    def settle(self) -> None:
        try:
            self._copies.synchronize()
        except RuntimeError as error:
            raise CopyFailed(f"{self.name}: {error}") from error

    def pin(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            raw = tensor.untyped_storage()
            if self.buffered or raw.data_ptr() in self._pinned:
                continue
            if not tensor.is_pinned():
                if int(torch.cuda.cudart().cudaHostRegister(raw.data_ptr(), raw.nbytes(), 0)) != 0:
                    continue
                self._locked.append(raw.data_ptr())
            self._pinned[raw.data_ptr()] = raw.nbytes()

    def unpin(self) -> None:
        self.settle()
        for start in self._locked:
            torch.cuda.cudart().cudaHostUnregister(start)
        self._pinned, self._locked = {}, []

    def close(self) -> None:
        self.unpin()
        self._buffers = []


class _Evented:
    def __init__(self, device: CudaDevice, event: torch.cuda.Event) -> None:
        self._device, self._event = device, event

    def order(self) -> float:
        torch.cuda.current_stream(self._device.place).wait_event(self._event)
        return 0.0

    def wait(self) -> float:
        began = time.perf_counter()
        try:
            self._event.synchronize()
        except RuntimeError as error:
            raise CopyFailed(f"a copy to {self._device.name} failed: {error}") from error
        return time.perf_counter() - began


class _Stack:
    """`store.Slots` in a GPU's memory: matrix m of all slots is one tensor."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int, place: torch.device) -> None:
        self.count = count
        self.tensors = [torch.empty((max(1, count), *shape), dtype=dtype, device=place) for shape in shapes]
        self.slot_bytes = sum(dtype.itemsize * math.prod(shape) for shape in shapes)
        self._free = list(range(count - 1, -1, -1))

    def matrix(self, m: int, slot: int, shift: int = 0) -> Tensor:
        return self.tensors[m][slot]

    def take(self) -> int:
        return self._free.pop()

    def give(self, slot: int) -> None:
        self._free.append(slot)
