"""A few rows per expert on a CPU: the whole SwiGLU bank as one compiled pass over the hit experts' stored bf16 weights.

At one to four rows an expert is a matrix-vector product, and reading its weights once is all that counts. Library calls
per expert leave half of the bandwidth unused and want the weights packed; this pass, compiled by Numba (an extra),
reads the stacked tensors as they lie, row after row, shares the rows between cores, and sums in fp32. It runs on the
OpenMP pool that PyTorch uses, so the two do not fight for cores. Its twin is kernels/reference.py.

Shape legend: T tokens, S pairs, P hit experts, D model width, I inner width.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moesaic.core.routing import Dispatch
from moesaic.kernels.products import Span
from moesaic.kernels.weights import Weights

MOST_ROWS = 4
"""Pairs per hit expert up to which reading weights outweighs arithmetic; beyond, matrix products win."""

LEAST_BYTES = 1 << 18
"""Smaller experts sit in cache, and are not worth the seconds of the first compilation."""

MULTIPLE = 32
"""Of which D and I must be multiples: compiled/row_dot.py's LINE."""


@cache  # asked on every call of a bank; a search of the import path each time would cost more than the pass
def available() -> bool:
    """Whether Numba is installed."""
    return find_spec("numba") is not None


@cache
def host_has(*features: str) -> bool:
    """Whether Numba is there and compiles for this machine's processor, which has all of these (LLVM's names)."""
    if not available():
        return False
    import numba
    from llvmlite.binding import get_host_cpu_features

    elsewhere = numba.config.CPU_NAME or numba.config.CPU_FEATURES  # Numba was told to compile for another machine
    host = get_host_cpu_features()
    return not elsewhere and all(host.get(name) for name in features)


def fits(weights: Weights, dtype: torch.dtype, spans: list[Span]) -> bool:
    """Whether this pass computes these weights exactly as asked, and is the fast way for so few rows."""
    return spans[-1][2] <= MOST_ROWS * len(spans) and suits(weights, dtype)


def suits(weights: Weights, dtype: torch.dtype) -> bool:
    """Whether this pass can run these weights at all."""
    form = weights.form
    return (
        dtype == weights.gate_up.dtype == weights.down.dtype == torch.bfloat16
        and form.swiglu
        and form.gate_up_bias_EH is None
        and form.down_bias_ED is None
        and not weights.transposed
        and weights.gate_up.is_contiguous()
        and weights.down.is_contiguous()
        and weights.inner_width % MULTIPLE == weights.model_width % MULTIPLE == 0
        and weights.down[0].nbytes >= LEAST_BYTES
        and available()
    )


def run(x_TD: Tensor, dispatch: Dispatch, weights: Weights, spans: list[Span]) -> Tensor:
    """y [T, D] in x's dtype; no gradients. `spans` are the hit experts, as products.hit_spans gives them.

    The first call on a machine compiles for some seconds; a file cache serves the next process.
    """
    y_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
    add(x_TD, dispatch, weights, spans, y_TD)
    return y_TD.to(x_TD.dtype)


def add(x_TD: Tensor, dispatch: Dispatch, weights: Weights, spans: list[Span], y_TD: Tensor) -> None:
    """Add these spans' weighted outputs to y (fp32). Spans one after another, in however many calls, give the same bits."""
    from moesaic.kernels.compiled import pool
    from moesaic.kernels.compiled.swiglu import swiglu

    cores = pool.join()
    pairs, inner = dispatch.token_S.shape[0], weights.inner_width
    swiglu(
        bits(x_TD.to(torch.bfloat16).contiguous()),
        torch.tensor(spans).numpy(),
        dispatch.token_S.numpy(),
        dispatch.weight_S.detach().float().numpy(),
        bits(weights.gate_up),
        bits(weights.down),
        torch.empty(pairs, 2 * inner).numpy(),
        bits(torch.empty(pairs, inner, dtype=torch.bfloat16)),
        y_TD.numpy(),
        cores,
    )


def one_token(x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor, gate_up: Tensor, down: Tensor) -> Tensor | None:
    """`run` for a single token of bf16 straight from its chosen experts, the same bits in a third of the overhead.

    For weights that `suits` has found to suit; None, and nothing done, where an expert is chosen twice.
    """
    from moesaic.kernels.compiled import pool
    from moesaic.kernels.compiled.swiglu import one_token as step

    ids_1K, weights_1K, x_1D = ids_1K.long().contiguous(), weights_1K.float().contiguous(), x_1D.contiguous()
    y_1D = torch.empty_like(x_1D)
    pointers = (tensor.data_ptr() for tensor in (x_1D, ids_1K, weights_1K, gate_up, down, y_1D))
    done = step(*pointers, ids_1K.shape[1], gate_up.shape[0], down.shape[1], down.shape[2], pool.join())
    return y_1D if done else None


def bits(rows: Tensor) -> Any:
    """bf16 as NumPy knows it: 16-bit words."""
    return rows.detach().view(torch.uint16).numpy()
