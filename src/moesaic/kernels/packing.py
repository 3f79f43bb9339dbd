"""Expert weights in oneDNN's own blocked layout: the CPU reads them at full memory speed instead of half.

A plain row-major matrix is re-blocked inside every matmul; a packed one is not. On the machines measured that is 1.4x
to 2x for a few rows and 1.2x to 2.7x for sixty. Packing is exact (`expert(e)` returns the very same numbers) but costs
a copy of the weights, so nobody packs behind the caller's back: pass `packed=pack(...)`, or grant a budget with
`allow_packing(bytes)` and let "auto" pack each expert the first time it is hit.

Never stale: a bank remembers its sources' identity, address and version counter, and packs anew what changed. Writes
that PyTorch hides from the counter (`weight.data.copy_`, NumPy views) need `bank.refresh()`.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.kernels.products import Span
from moesaic.kernels.weights import Weights

ROWS_HINT = 64
"""Rows that the layout is tuned for. Measured: 16 to 512 give one layout, good from 1 row to hundreds; 1 does not."""


def can_pack(dtype: torch.dtype) -> bool:
    """Whether this machine's oneDNN multiplies packed weights of `dtype` natively."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.float32


class _Source:
    """Identity, address and version of a weight tensor when it was packed."""

    def __init__(self, tensor: Tensor):
        self.ref = weakref.ref(tensor)
        self.stamp = self._stamp(tensor)

    @staticmethod
    def _stamp(tensor: Tensor) -> tuple[int, int, torch.Size]:
        # Inference tensors keep no version counter; they also refuse in-place writes outside inference mode.
        return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version, tensor.shape

    def is_current(self, tensor: Tensor) -> bool:
        return self.ref() is tensor and self._stamp(tensor) == self.stamp


class PackedBank:
    """The packed matrices of one bank, made from its stacked tensors as experts are hit (or all at once, `pack_all`)."""

    def __init__(self, gate_up: Tensor, down: Tensor, transposed: bool = False):
        if gate_up.device.type != "cpu" or not can_pack(gate_up.dtype) or gate_up.dtype != down.dtype:
            raise BadInput(f"oneDNN cannot pack {gate_up.dtype} weights on {gate_up.device} here")
        self.transposed = transposed
        self.dtype = gate_up.dtype
        self.num_experts = gate_up.shape[0]
        self._adopt(gate_up, down)

    def _adopt(self, gate_up: Tensor, down: Tensor) -> None:
        self._sources = _Source(gate_up), _Source(down)
        self._gate_up: list[Tensor | None] = [None] * self.num_experts
        self._down: list[Tensor | None] = [None] * self.num_experts

    @property
    def packed_experts(self) -> int:
        return sum(t is not None for t in self._gate_up)

    @property
    def nbytes(self) -> int:
        """Bytes held by the packed copies."""
        return sum(torch.ops.mkldnn._nbytes(t) for t in (*self._gate_up, *self._down) if t is not None)

    def pack_all(self) -> PackedBank:
        """Pack every expert now; after this the source tensors may be freed."""
        self.ready(range(self.num_experts))
        return self

    def refresh(self) -> None:
        """Forget every packed copy: the next call packs anew. Needed only after writes through `.data` or NumPy."""
        gate_up, down = (source.ref() for source in self._sources)
        if gate_up is None or down is None:
            raise BadInput("the weights this bank was packed from are gone: pack the new ones")
        self._adopt(gate_up, down)

    def follow(self, gate_up: Tensor, down: Tensor) -> None:
        """Make sure that what is packed is what these tensors hold now."""
        if not (self._sources[0].is_current(gate_up) and self._sources[1].is_current(down)):
            self._adopt(gate_up, down)

    def ready(self, experts) -> None:
        """Pack those of `experts` that are not packed yet."""
        missing = [e for e in experts if self._gate_up[e] is None]
        if not missing:
            return
        gate_up, down = (source.ref() for source in self._sources)
        if gate_up is None or down is None:
            raise BadInput("the weights this bank was packed from are gone before every expert was packed: call pack_all first")
        for e in missing:
            self._gate_up[e] = _pack(gate_up[e], self.transposed)
            self._down[e] = _pack(down[e], self.transposed)

    def expert(self, e: int) -> tuple[Tensor, Tensor]:
        """Expert e as plain matrices [H, D] and [D, I], the exact numbers that were packed."""
        self.ready([e])
        gate_up, down = self._gate_up[e], self._down[e]
        assert gate_up is not None and down is not None
        return gate_up.to_dense(), down.to_dense()

    def first(self, x_sD: Tensor, spans: list[Span]) -> Tensor:
        return _products(x_sD, self._gate_up, spans)

    def second(self, a_sI: Tensor, spans: list[Span]) -> Tensor:
        return _products(a_sI, self._down, spans)


def _products(rows_sA: Tensor, packed: list[Tensor | None], spans: list[Span]) -> Tensor:
    rows = rows_sA.split([end - start for _, start, end in spans])
    return torch.cat([_linear(r, packed[e], None, "none", [], "") for (e, _, _), r in zip(spans, rows, strict=True)])


_linear = torch.ops.mkldnn._linear_pointwise.default


def _pack(matrix: Tensor, transposed: bool) -> Tensor:
    matrix = matrix.detach()
    return torch.ops.mkldnn._reorder_linear_weight((matrix.T if transposed else matrix).contiguous(), ROWS_HINT)


_banks: dict[int, tuple[weakref.ref, PackedBank]] = {}
_granted = 0
_promised = 0


def allow_packing(nbytes: int) -> None:
    """Let backend "auto" keep packed copies of up to `nbytes` in all (0, the default, packs nothing and frees what is
    packed). Banks are packed in the order in which they are first run, until the next would not fit; a bank's copies
    go when its weights do."""
    global _granted, _promised
    _granted = nbytes
    if nbytes == 0:
        _banks.clear()
        _promised = 0


def packing_state() -> dict[str, int]:
    """Bytes granted, promised to banks, and held so far; number of banks."""
    held = sum(bank.nbytes for _, bank in _banks.values())
    return {"granted_bytes": _granted, "promised_bytes": _promised, "held_bytes": held, "banks": len(_banks)}


def packed_for(weights: Weights, dtype: torch.dtype) -> PackedBank | None:
    """The packed bank of these weights, made now if the budget allows it; None where they are to be read as they are."""
    global _promised
    if not _granted or weights.gate_up.dtype != dtype or weights.down.dtype != dtype or not can_pack(dtype):
        return None
    if weights.gate_up._is_view() or weights.down._is_view():
        return None  # a passing view would be packed on every call
    key = id(weights.gate_up)
    held = _banks.get(key)
    if held is not None and held[0]() is weights.gate_up:
        held[1].follow(weights.gate_up, weights.down)
        return held[1]
    size = weights.gate_up.nbytes + weights.down.nbytes
    if _promised + size > _granted:
        return None

    def forget(_: weakref.ref) -> None:
        global _promised
        if _banks.pop(key, None) is not None:
            _promised -= size

    _promised += size
    bank = PackedBank(weights.gate_up, weights.down, weights.transposed)
    _banks[key] = weakref.ref(weights.gate_up, forget), bank
    return bank


def pack(gate_up: Tensor, down: Tensor, *, transposed: bool = False) -> PackedBank:
    """Pack a whole bank now, whatever the budget; afterwards its source tensors may be freed (`expert_mlp_stored`)."""
    return PackedBank(gate_up, down, transposed).pack_all()


def budget_reason(weights: Weights, dtype: torch.dtype) -> str:
    """Why these weights are, or are not, read from packed copies."""
    if not _granted:
        return "weights as stored (no packing budget granted)"
    if weights.gate_up.dtype != dtype or not can_pack(dtype):
        return f"weights as stored (oneDNN packs no {dtype} of {weights.gate_up.dtype} weights here)"
    if id(weights.gate_up) in _banks or _promised + weights.gate_up.nbytes + weights.down.nbytes <= _granted:
        return "oneDNN-packed weights"
    return f"weights as stored (packing budget of {_granted} bytes is spent)"
