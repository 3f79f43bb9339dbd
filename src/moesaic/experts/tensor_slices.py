"""Union of Experts' bank: one MLP cut along its inner width, so that all slices together are exactly that MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from moesaic.core.errors import BadInput
from moesaic.core.registry import register
from moesaic.experts.mlp import Mlp


@register("experts", "tensor_slices", paper="2503.02495", card="routing.md#uoe")
class TensorSlices(Mlp):
    """`width` is a slice's, so the whole MLP has E times as much: slice e owns its rows of W1 and columns of W2.

    With every slice run at weight 1 the sum is the dense MLP. Each slice adds its own output bias, so `cut` splits the
    dense one evenly.
    """

    @torch.no_grad()
    def cut(self, in_ID: Tensor, out_DI: Tensor, in_bias_I: Tensor | None = None, out_bias_D: Tensor | None = None) -> None:
        """Fill the slices from a dense MLP. Raises BadInput for a shape that does not fit, or biases without a place."""
        experts, width, dim = self.in_EID.shape
        if in_ID.shape != (experts * width, dim) or out_DI.shape != (dim, experts * width):
            wanted = f"{experts} slices of {width} over width {dim}"
            raise BadInput(f"a dense MLP of {tuple(in_ID.shape)} and {tuple(out_DI.shape)} does not cut into {wanted}")
        if (in_bias_I is not None or out_bias_D is not None) and self.in_bias_EI is None:
            raise BadInput("the dense MLP has biases: build the slices with bias=True")
        self.in_EID.copy_(in_ID.view(experts, width, dim))
        self.out_EDI.copy_(out_DI.view(dim, experts, width).transpose(0, 1))
        if in_bias_I is not None and self.in_bias_EI is not None:
            self.in_bias_EI.copy_(in_bias_I.view(experts, width))
        if out_bias_D is not None and self.out_bias_ED is not None:
            self.out_bias_ED.copy_(out_bias_D.expand(experts, -1) / experts)
