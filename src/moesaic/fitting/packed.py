"""From a checkpoint rounded expert by expert to records of codes and scales: the same weights, at the size that they mean."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moesaic.core.errors import BadInput
from moesaic.kernels.low_bits import LEVELS
from moesaic.serving.streamed.bits import WHOLE, Bits
from moesaic.serving.streamed.packing import Plan, pack


def check_packable(name: str, method: Any) -> None:
    """Raises BadInput for a method of `quantize` whose weights records cannot hold, before anything is rounded."""
    width = next((each for each in getattr(method, "widths", ()) if each not in (*LEVELS, WHOLE)), None)
    if width is not None:
        raise BadInput(f"{width} bits cannot be packed: records hold {', '.join(map(str, LEVELS))}; or take --format rounded")
    if not getattr(method, "on_grid", True):
        raise BadInput(f"{name} with these options rounds to other grids than records hold: take --format rounded")


def pack_rounded(rounded: Path, out: Path, blocks: Sequence[dict[str, Any]], group: int, resume: bool = False) -> Plan:
    """Pack `rounded` to `out`, each expert in its own bits, and delete it.

    Args:
        blocks: what the rounding reported of each block: `module` and `bits`, one number per expert.
        group: weights of a row that share a scale.

    Raises BadInput as `pack` does; `rounded` then stays.
    """
    of_experts = {f"{block['module']}.{e}": bits for block in blocks for e, bits in enumerate(block["bits"])}
    packed = pack(rounded, out, bits=Bits(of_experts), group_size=group, resume=resume)
    shutil.rmtree(rounded)
    return packed
