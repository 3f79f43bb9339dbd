"""What stands around the experts, for the one to four rows of a decoding step on a CPU: products with a stored bf16 matrix
and root mean square norms, each as one compiled pass.

A step reads every matrix of the model once. PyTorch's product takes two thirds longer over it than memory does, and its
norm is seven operations of a few microseconds each. Twins: torch.nn.functional.linear, and the norm modules' own forward.

Shape legend: T rows, A input width, B output width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.kernels.few_rows import MOST_ROWS, MULTIPLE, available, bits

MOST_NORMED = 1 << 14
"""Numbers up to which one core norms them faster than several operations on all of them."""


def _on_cpu(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.is_grad_enabled() and available()


def suits_linear(weight_BA: Tensor) -> bool:
    """Whether the compiled pass can read this matrix."""
    return weight_BA.dtype == torch.bfloat16 and weight_BA.is_contiguous() and weight_BA.shape[1] % MULTIPLE == 0


def few_rows_linear(x: Tensor, weight_BA: Tensor, bias_B: Tensor | None = None) -> Tensor:
    """x [..., A] @ weight.T + bias as [..., B]: compiled for up to four rows of bf16 without gradients, else PyTorch's."""
    width = weight_BA.shape[1]
    if not (0 < x.numel() <= MOST_ROWS * width and _on_cpu(x) and suits_linear(weight_BA)):
        return linear(x, weight_BA, bias_B)
    from moesaic.kernels.compiled import pool
    from moesaic.kernels.compiled.rows_by_matrix import product

    cores = pool.join()
    y_TB = torch.empty(x.numel() // width, weight_BA.shape[0], dtype=torch.bfloat16)
    product(bits(x.detach().reshape(-1, width)), bits(weight_BA), bits(y_TB), cores)
    if bias_B is not None:
        y_TB += bias_B
    return y_TB.view(*x.shape[:-1], -1)


def few_rows_norm(x: Tensor, weight_A: Tensor, eps: float) -> Tensor | None:
    """weight * bf16(x / rms(x)) over the last axis, for few rows of bf16 without gradients; None where it has no pass."""
    if not (0 < x.numel() <= MOST_NORMED and weight_A.dtype == torch.bfloat16 and _on_cpu(x)):
        return None
    from moesaic.kernels.compiled.rows_by_matrix import norm

    rows = x.detach().reshape(-1, weight_A.shape[0])
    made = torch.empty_like(rows)
    norm(bits(rows), bits(weight_A), eps, bits(made))
    return made.view(x.shape)
