"""What stands around the experts, for the one to four rows of a decoding step on a CPU: products with a stored bf16 matrix
and root mean square norms, each as one compiled pass.

A step reads every matrix of the model once. PyTorch's product takes two thirds longer over it than memory does, and its
norm is seven operations of a few microseconds each. Twins: torch.nn.functional.linear, and the norm modules' own forward.

Shape legend: T rows, A input width, B output width.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from moesaic.kernels.few_rows import MOST_ROWS, MULTIPLE, available

MOST_NORMED = 1 << 14
"""Numbers up to which one core norms them faster than several operations on all of them."""


def suits_linear(weight_BA: Tensor) -> bool:
    """Whether the compiled pass can read this matrix."""
    return weight_BA.dtype is torch.bfloat16 and weight_BA.is_contiguous() and weight_BA.shape[1] % MULTIPLE == 0


def few_rows_linear(x: Tensor, weight_BA: Tensor, bias_B: Tensor | None = None) -> Tensor:
    """x [..., A] @ weight.T + bias as [..., B]: compiled for up to four rows of bf16 without gradients, else PyTorch's."""
    outputs, width = weight_BA.shape
    numbers = x.numel()
    watched = torch._C._is_torch_function_mode_enabled()  # a policy alters the product that scores experts
    if watched or not (0 < numbers <= MOST_ROWS * width and _is_plain(x) and suits_linear(weight_BA)):
        return linear(x, weight_BA, bias_B)
    compiled, cores = _compiled()
    y = x.new_empty(*x.shape[:-1], outputs)
    x = x.contiguous()
    compiled.product(x.data_ptr(), weight_BA.data_ptr(), y.data_ptr(), numbers // width, width, outputs, cores())
    return y if bias_B is None else y.add_(bias_B)


def few_rows_norm(x: Tensor, weight_A: Tensor, eps: float) -> Tensor | None:
    """weight * bf16(x / rms(x)) over the last axis, for few rows of bf16 without gradients; None where it has no pass."""
    width, numbers = weight_A.shape[0], x.numel()
    if not (0 < numbers <= MOST_NORMED and weight_A.dtype is torch.bfloat16 and _is_plain(x)):
        return None
    compiled, _ = _compiled()
    x = x.contiguous()
    made = torch.empty_like(x)
    compiled.norm(x.data_ptr(), weight_A.data_ptr(), made.data_ptr(), numbers // width, width, eps)
    return made


def _is_plain(x: Tensor) -> bool:
    """Whether a pass can take its address: not a stand-in that a compiler traces with, either."""
    return (
        x.dtype is torch.bfloat16
        and x.is_cpu
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and available()
    )


@cache
def _compiled() -> tuple[Any, Any]:
    """The compiled passes, and what gives the number of cores: Numba is imported at their first use."""
    from moesaic.kernels.compiled import pool, rows_by_matrix

    return rows_by_matrix, pool.join
