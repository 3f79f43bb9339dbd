"""Experts stored as fp8 (E4M3) with a scale for every block, as DeepSeek-V3's are: widened when they come into their slot.

A weight is code * scale of its block; the product is taken in fp32 and rounded once, to the model's dtype, which is what
transformers does with `FineGrainedFP8Config(dequantize=True)`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.store import Range

CODES = torch.float8_e4m3fn
SCALES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)
"""uint8: the exponents alone, off by 127."""


def check(codes: Range, scale: Range) -> None:
    """Raises BadInput naming the tensor that is of another dtype, or whose blocks do not cover the matrix."""
    if codes.dtype != CODES:
        kind = str(codes.dtype).removeprefix("torch.")
        raise BadInput(f"{codes.path}: tensor {codes.name} is {kind}: scaled experts stream from float8_e4m3fn only")
    if scale.dtype not in SCALES:
        raise BadInput(f"{scale.path}: tensor {scale.name} is {scale.dtype}, which is no scale that is read here")
    if (
        len(codes.shape) != 2
        or len(scale.shape) != 2
        or any(not blocks or size % blocks for size, blocks in zip(codes.shape, scale.shape, strict=True))
    ):
        raise BadInput(
            f"{scale.path}: tensor {scale.name} {list(scale.shape)} does not cut {codes.name} {list(codes.shape)} into blocks"
        )


def widen(codes_BA: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weights [B, A] in a dtype."""
    (rows, columns), (down, across) = codes_BA.shape, scale.shape
    wide = (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()
    blocks = codes_BA.float().view(down, rows // down, across, columns // across)
    return (blocks * wide.view(down, 1, across, 1)).to(dtype).view(rows, columns)
