"""What a block says to fixed numbers: two blocks with equal answers have the same experts in the same order, and router."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from moesaic.models.reshaped.factored import LEAF
from moesaic.view.block import Block

ROWS = 2
"""Per expert."""


class Probe(NamedTuple):
    """Hashes: of every expert's outputs for fixed rows, and of the block's other tensors by name."""

    outputs: str
    others: str


def probe(block: Block, tensors: dict[str, Tensor]) -> Probe:
    """Ask a block whose weights are in memory. `tensors`: all of the block by name; those of more than two axes are experts."""
    experts, width = block.num_experts, block.bank.width
    weight = block.experts.down_proj
    x_SD = torch.randn(ROWS * experts, width, generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    hashed = hashlib.sha256()
    with torch.no_grad():
        if hasattr(block.experts, LEAF):  # factors: each expert has its own rows at weight 1
            ids_S1 = torch.arange(experts).repeat_interleave(ROWS)[:, None]
            ones_S1 = torch.ones(len(x_SD), 1, dtype=x_SD.dtype)  # not through a hook that takes ids for router rows
            hashed.update(_bytes(type(block.experts).forward(block.experts, x_SD, ids_S1, ones_S1)))
        for e in range(experts) if not hasattr(block.experts, LEAF) else ():
            hashed.update(_bytes(block.bank.run_one(e, x_SD[ROWS * e : ROWS * (e + 1)])[1]))
    others = hashlib.sha256()
    for name in sorted(tensors):
        if tensors[name].dim() < 3:
            others.update(name.encode())
            others.update(_bytes(tensors[name]))
    return Probe(hashed.hexdigest()[:16], others.hexdigest()[:16])


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
