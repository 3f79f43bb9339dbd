"""Triton programs of the grouped SwiGLU layer. S sorted pairs, E experts; every weight comes with its strides.

hidden          rows of x gathered in the kernel, gate and up in one pass, SwiGLU before anything is written
product         rows @ matrix[e], rows gathered or in place, result scattered to its place in token order
hidden_grad     dout @ down[e], SwiGLU's derivative, the pair's weight and its gradient, in one pass
weight_grad     left[e].T @ right[e] over an expert's pairs, either side gathered
token_sum       a token's rows, which lie side by side, summed in fp32: no atomics, so it repeats bit for bit

Programs of one tile follow one another, so its rows are read from memory once; tiles of one expert do too, and share
its matrix in L2.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _silu(gate):
    return gate / (1.0 + tl.exp(-gate))


@triton.jit
def hidden(
    x, token, offsets, tile_expert, tile_row, weight, h, a,
    D, I, E, stride_x, stride_e, stride_h, stride_d,
    STORE_H: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """a = silu(x W_gate) * (x W_up) for one tile of pairs and N inner columns; h [S, 2I] is kept only for training."""
    blocks = tl.cdiv(I, N)
    tile, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    e = tl.load(tile_expert + tile)
    if e < E:
        row = tl.load(tile_row + tile)
        rows = row + tl.arange(0, M)
        live = rows < tl.load(offsets + e + 1)
        columns = column * N + tl.arange(0, N)
        inside = columns < I
        depth = tl.arange(0, K)
        x_at = x + tl.load(token + rows, mask=live, other=0)[:, None] * stride_x + depth[None, :]
        gate_at = weight + e.to(tl.int64) * stride_e + columns[None, :] * stride_h + depth[:, None] * stride_d
        up_at = gate_at + I * stride_h
        gate = tl.zeros((M, N), dtype=tl.float32)
        up = tl.zeros((M, N), dtype=tl.float32)
        for start in range(0, D, K):
            deep = depth < D - start
            x_mk = tl.load(x_at, mask=live[:, None] & deep[None, :], other=0.0)
            mask = deep[:, None] & inside[None, :]
            gate = tl.dot(x_mk, tl.load(gate_at, mask=mask, other=0.0), gate, input_precision=PRECISION)
            up = tl.dot(x_mk, tl.load(up_at, mask=mask, other=0.0), up, input_precision=PRECISION)
            x_at += K
            gate_at += K * stride_d
            up_at += K * stride_d
        keep = live[:, None] & inside[None, :]
        if STORE_H:
            h_at = h + rows[:, None] * (2 * I) + columns[None, :]
            tl.store(h_at, gate.to(h.dtype.element_ty), mask=keep)
            tl.store(h_at + I, up.to(h.dtype.element_ty), mask=keep)
        tl.store(a + rows[:, None] * I + columns[None, :], (_silu(gate) * up).to(a.dtype.element_ty), mask=keep)


@triton.jit
def product(
    rows_in, source, offsets, tile_expert, tile_row, weight, scale, place, out,
    B, A, E, stride_in, stride_e, stride_b, stride_a,
    GATHER: tl.constexpr, SCALE: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[place] = scale * rows @ weight[e].T with weight [E, B, A]; `source` gathers the rows when GATHER."""
    blocks = tl.cdiv(B, N)
    tile, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    e = tl.load(tile_expert + tile)
    if e < E:
        row = tl.load(tile_row + tile)
        rows = row + tl.arange(0, M)
        live = rows < tl.load(offsets + e + 1)
        columns = column * N + tl.arange(0, N)
        inside = columns < B
        depth = tl.arange(0, K)
        from_rows = tl.load(source + rows, mask=live, other=0) if GATHER else rows
        in_at = rows_in + from_rows[:, None] * stride_in + depth[None, :]
        weight_at = weight + e.to(tl.int64) * stride_e + columns[None, :] * stride_b + depth[:, None] * stride_a
        total = tl.zeros((M, N), dtype=tl.float32)
        for start in range(0, A, K):
            deep = depth < A - start
            in_mk = tl.load(in_at, mask=live[:, None] & deep[None, :], other=0.0)
            weight_kn = tl.load(weight_at, mask=deep[:, None] & inside[None, :], other=0.0)
            total = tl.dot(in_mk, weight_kn, total, input_precision=PRECISION)
            in_at += K
            weight_at += K * stride_a
        if SCALE:
            total *= tl.load(scale + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        to_rows = tl.load(place + rows, mask=live, other=0)
        out_at = out + to_rows[:, None] * B + columns[None, :]
        tl.store(out_at, total.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit
def hidden_grad(
    grad, token, offsets, tile_expert, tile_row, down, h, pair_weight, dh, aw, d_weight,
    D, I, E, COLUMNS, stride_grad, stride_e, stride_d, stride_i,
    PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """da = grad @ down[e]; dh from SwiGLU's derivative; aw = weight * a for down's gradient; d_weight [S, COLUMNS] holds
    each column block's share of sum(da * a), summed afterwards so that no two programs add to one number."""
    blocks = tl.cdiv(I, N)
    tile, column = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    e = tl.load(tile_expert + tile)
    if e < E:
        row = tl.load(tile_row + tile)
        rows = row + tl.arange(0, M)
        live = rows < tl.load(offsets + e + 1)
        columns = column * N + tl.arange(0, N)
        inside = columns < I
        depth = tl.arange(0, K)
        grad_at = grad + tl.load(token + rows, mask=live, other=0)[:, None] * stride_grad + depth[None, :]
        down_at = down + e.to(tl.int64) * stride_e + columns[None, :] * stride_i + depth[:, None] * stride_d
        da = tl.zeros((M, N), dtype=tl.float32)
        for start in range(0, D, K):
            deep = depth < D - start
            grad_mk = tl.load(grad_at, mask=live[:, None] & deep[None, :], other=0.0)
            down_kn = tl.load(down_at, mask=deep[:, None] & inside[None, :], other=0.0)
            da = tl.dot(grad_mk, down_kn, da, input_precision=PRECISION)
            grad_at += K
            down_at += K * stride_d
        keep = live[:, None] & inside[None, :]
        h_places = rows[:, None] * (2 * I) + columns[None, :]
        gate = tl.load(h + h_places, mask=keep, other=0.0).to(tl.float32)
        up = tl.load(h + h_places + I, mask=keep, other=0.0).to(tl.float32)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        a = silu * up
        tl.store(d_weight + rows * COLUMNS + column, tl.sum(da * a, axis=1), mask=live)
        weight = tl.load(pair_weight + rows, mask=live, other=0.0).to(tl.float32)[:, None]
        da *= weight
        tl.store(aw + rows[:, None] * I + columns[None, :], (a * weight).to(aw.dtype.element_ty), mask=keep)
        d_gate = da * up * (sigmoid + silu * (1.0 - sigmoid))
        tl.store(dh + h_places, d_gate.to(dh.dtype.element_ty), mask=keep)
        tl.store(dh + h_places + I, (da * silu).to(dh.dtype.element_ty), mask=keep)


@triton.jit
def weight_grad(
    left, left_source, right, right_source, offsets, out,
    B, A, stride_left, stride_right, stride_e, stride_b, stride_a,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """out[e] = sum over the expert's pairs of left.T @ right, [B, A]; an expert without pairs gets zeros."""
    e = tl.program_id(2).to(tl.int64)
    b = tl.program_id(0) * M + tl.arange(0, M)
    a = tl.program_id(1) * N + tl.arange(0, N)
    start, end = tl.load(offsets + e), tl.load(offsets + e + 1)
    total = tl.zeros((M, N), dtype=tl.float32)
    for at in range(start, end, K):
        pairs = at + tl.arange(0, K)
        live = pairs < end
        left_rows = tl.load(left_source + pairs, mask=live, other=0) if GATHER_LEFT else pairs
        right_rows = tl.load(right_source + pairs, mask=live, other=0) if GATHER_RIGHT else pairs
        left_mk = tl.load(
            left + left_rows[None, :] * stride_left + b[:, None], mask=live[None, :] & (b < B)[:, None], other=0.0
        )
        right_kn = tl.load(
            right + right_rows[:, None] * stride_right + a[None, :], mask=live[:, None] & (a < A)[None, :], other=0.0
        )
        total = tl.dot(left_mk, right_kn, total, input_precision=PRECISION)
    out_at = out + e * stride_e + b[:, None] * stride_b + a[None, :] * stride_a
    tl.store(out_at, total.to(out.dtype.element_ty), mask=(b < B)[:, None] & (a < A)[None, :])


@triton.jit
def token_sum(rows_in, starts, out, D, N: tl.constexpr):
    """out[t] = sum of rows starts[t] : starts[t + 1], in that order, in fp32."""
    t = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * N + tl.arange(0, N)
    inside = columns < D
    total = tl.zeros((N,), dtype=tl.float32)
    for row in range(tl.load(starts + t), tl.load(starts + t + 1)):
        total += tl.load(rows_in + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + t * D + columns, total.to(out.dtype.element_ty), mask=inside)
