"""Linear layers in few bits, for inference on a CPU: their class becomes a subclass that multiplies with a stored matrix.

Routers stay as they are: they are small, and what they round decides which experts run. Tied embeddings stay too: the head
that shared their matrix gets one of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from moesaic.kernels import Packing
from moesaic.kernels.stored_matrix import StoredMatrix
from moesaic.view.block import View
from moesaic.view.quick import QuickLinear


class StoredLinear(nn.Linear):
    """A linear layer whose weights are `stored`; `weight` is left as a shape on the meta device, or None where it was another
    module's, too."""

    stored: StoredMatrix

    def forward(self, input: Tensor) -> Tensor:
        y = self.stored(input)
        return y if self.bias is None else y + self.bias


def quantize_linears(model: nn.Module, packing: Packing) -> dict[str, int]:
    """Round every linear layer that is no router's; returns {"layers", "nbytes", "stored_bytes"} (after and before).

    A layer whose rows are no whole number of bytes in so few bits stays as it is. Raises BadInput for weights that are not
    finite or lie elsewhere than on the CPU.
    """
    routers = {id(module) for block in View(model) for module in block.router.modules()}
    made: list[tuple[nn.Linear, StoredMatrix]] = []
    for module in model.modules():
        if not isinstance(module, nn.Linear) or type(module) not in (nn.Linear, QuickLinear) or id(module) in routers:
            continue
        if module.in_features * packing.bits % 8:
            continue
        made.append((module, StoredMatrix.quantize(module.weight, packing)))
    before = sum(module.weight.nbytes for module, _ in made)
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for module, stored in made:
        _replace(module, stored, shared=uses[id(module.weight)] > 1)
    return {"layers": len(made), "nbytes": sum(stored.nbytes for _, stored in made), "stored_bytes": before}


def _replace(module: Any, stored: StoredMatrix, shared: bool) -> None:
    shape = None if shared else nn.Parameter(torch.empty_like(module.weight, device="meta"), requires_grad=False)
    module.weight = shape
    module.stored = stored
    module.__class__ = StoredLinear
