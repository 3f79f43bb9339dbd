"""Round to nearest: the grid of least squared error, without calibration."""

from __future__ import annotations

from moesaic.core.registry import register
from moesaic.surgery.rounding import Rounder


@register("quantize", "rtn", card="surgery-and-steering.md#mixed-precision-allocation", exact=False)
class Rtn(Rounder):
    """Every weight to the nearest level, scales of groups searched; what `moesaic pack --bits` writes, bit for bit.

    Args:
        bits: mean bits per weight of an expert, without scales: 16 is untouched; 12 has half of the experts in 8 bits.
        group: weights of a row that share a scale: 32, 64 or 128.
    """

    def __init__(self, bits: float = 4, group: int = 64) -> None:
        super().__init__(bits, group)
