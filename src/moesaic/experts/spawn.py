"""EvoMoE's diversification: every expert of a bank becomes a varied copy of one of them."""

from __future__ import annotations

from typing import Any

import torch

from moesaic.core.errors import BadInput


@torch.no_grad()
def spawn(
    bank: Any,
    source: int = 0,
    zeroed: float = 0.5,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    *,
    every_matrix: bool = False,
    rescale: bool = False,
) -> None:
    """Copy expert `source` over all others; each copy's first matrix then loses its own random share of entries.

    `bank` is an ExpertBank, or a block's bank of the view: what reads and replaces `bank[e]`.

    `zeroed` is that share, of every matrix with `every_matrix`; with `rescale` what is left grows by 1 / (1 - zeroed), so that
    each copy is the source in expectation. `noise` adds N(0, (noise * std)^2) instead or as well, std over the matrix. Both
    0: exact copies, so that a layer whose weights sum to 1 gives what the single expert gave. Card: routing.md, "EvoMoE".
    Raises BadInput for a bank whose experts differ in shape.
    """
    if not 0 <= zeroed < 1 or noise < 0:
        raise BadInput(f"zeroed={zeroed}, noise={noise}: a share in [0, 1) and a factor of at least 0")
    parent = bank[source]
    for e in range(len(bank)):
        child = {name: tensor.clone() for name, tensor in parent.items()}
        matrices = [name for name, tensor in child.items() if tensor.dim() > 1]
        for name in matrices if every_matrix else matrices[:1]:
            matrix = child[name]
            if noise:
                draw = torch.randn(matrix.shape, generator=generator, device=matrix.device)
                matrix += noise * matrix.float().std() * draw.to(matrix.dtype)
            if zeroed:
                matrix[torch.rand(matrix.shape, generator=generator, device=matrix.device) < zeroed] = 0
                if rescale:
                    matrix /= 1 - zeroed
        bank[e] = child
