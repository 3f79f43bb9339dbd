"""What the upper tier of a streamed model lies on: slots, copies into them, and the way there and back.

`CudaDevice` (cuda_device.py) is a GPU. `HostDevice` is plain memory that stands in for one: the same calls, copies made by a
thread of its own, so that everything above can be tested, and a budget tried, where there is no GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.core.errors import BadInput, MoesaicError
from moesaic.store import Slots

Pairs = Sequence[tuple[Tensor, Tensor]]
"""Matrices in host memory, and where on the device each goes."""


class CopyFailed(MoesaicError):
    """A copy between the host and the device that did not happen."""


class Copy(Protocol):
    """Matrices on their way into a slot. What they come from may not change before `wait` has returned."""

    def order(self) -> float:
        """What the device computes from now on comes after it. Seconds that the host waited. Raises CopyFailed."""

    def wait(self) -> float:
        """Return when the bytes are there. Seconds waited. Raises CopyFailed."""


class DeviceSlots(Protocol):
    """Room on a device for experts of one shape: `store.Slots`, or what looks like it."""

    count: int
    slot_bytes: int

    @property
    def tensors(self) -> list[Tensor]: ...
    def matrix(self, m: int, slot: int, shift: int = 0) -> Tensor: ...
    def take(self) -> int: ...
    def give(self, slot: int) -> None: ...


class Device(Protocol):
    """Memory and time of an upper tier. A `mark` is a moment of its computing; None is the present of a host."""

    name: str
    place: torch.device
    ordered: bool
    """Whether experts compute in their order wherever they lie, for the very bits of the CPU kernel; else hits go first and
    sums are made at the end."""

    def slots(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int, stack: bool) -> DeviceSlots: ...
    def mark(self) -> Any: ...
    def copy(self, pairs: Pairs, after: Any) -> Copy: ...
    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """On the host, with one wait for all of them."""

    def to_host(self, rows: Tensor) -> Tensor: ...
    def to_device(self, rows: Tensor) -> Tensor: ...
    def settle(self) -> None:
        """Return when nothing is under way any more."""

    def pin(self, tensors: Sequence[Tensor]) -> None:
        """Make copies from this memory need no stop on the way, where that is possible."""

    def unpin(self) -> None:
        """Before that memory is given back; nothing may be under way."""

    def close(self) -> None: ...


class HostDevice:
    """Plain memory in the place of a device.

    Args:
        gathered: compute as a GPU does (hits, then what was moved, beside what the host computes), not in the order of experts.
        copy: what moves one matrix, `copy(target, source)`; a test's stand-in fails or waits.
    """

    name = "stand-in"
    place = torch.device("cpu")

    def __init__(self, gathered: bool = False, copy: Callable[[Tensor, Tensor], Any] = Tensor.copy_) -> None:
        self.ordered, self.copy_one = not gathered, copy
        self._thread = ThreadPoolExecutor(1, "moesaic-copy")
        self._last: Future[None] | None = None

    def slots(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, count: int, stack: bool) -> DeviceSlots:
        return Slots(shapes, dtype, count, stack)

    def mark(self) -> None:
        return None

    def copy(self, pairs: Pairs, after: Any) -> Copy:
        self._last = self._thread.submit(self._all, list(pairs))
        return _Threaded(self._last)

    def _all(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        with torch.inference_mode():
            for source, target in pairs:
                self.copy_one(target, source)

    def read_back(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return list(tensors)

    def to_host(self, rows: Tensor) -> Tensor:
        return rows

    def to_device(self, rows: Tensor) -> Tensor:
        return rows

    def settle(self) -> None:
        if self._last is not None:
            self._last.exception()

    def pin(self, tensors: Sequence[Tensor]) -> None:
        pass

    def unpin(self) -> None:
        pass

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)


class _Threaded:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> float:
        began = time.perf_counter()
        try:
            self._future.result()
        except Exception as error:
            raise CopyFailed(f"a copy to the device failed: {error}") from error
        return time.perf_counter() - began

    order = wait


def device_of(given: str | Device) -> Device:
    """A device by name: cuda, cuda:1, or stand-in. Raises BadInput for another name, or where there is no such device."""
    if not isinstance(given, str):
        return given
    if given == HostDevice.name:
        return HostDevice()
    kind, _, number = given.partition(":")
    if kind != "cuda" or (number and not number.isdigit()):
        raise BadInput(f"device {given!r}: cuda, cuda:NUMBER, or {HostDevice.name} (plain memory in its place)")
    if not torch.cuda.is_available():
        raise BadInput(f"device {given}: PyTorch {torch.__version__} finds no CUDA device on this machine")
    if number and int(number) >= torch.cuda.device_count():
        raise BadInput(f"device {given}: this machine has {torch.cuda.device_count()} CUDA devices")
    from moesaic.serving.streamed.cuda_device import CudaDevice

    return CudaDevice(int(number or 0))
