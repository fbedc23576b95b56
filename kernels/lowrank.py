"""The three functions of ``forgetless.reference`` as Triton kernels, with the same names and signatures."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles, tl_utils
from .descriptors import describable, matmul_lowrank_descriptor
from .tiles import has_row, tile_for
from .tl_utils import (
    cast,
    dot,
    dot_precision,
    drop,
    drop_args,
    grouped,
    lowrank_start,
    narrow,
    pair_key,
    parts_of,
    row_key,
    widen,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def pad_rank(R: int, most: int = 128) -> int:
    """The rank as a block size: tensor cores want 16 at least, registers ``most`` at most"""
    return min(most, max(16, triton.next_power_of_2(R)))


@triton.jit(do_not_specialize=["threshold"])
def _project_kernel(
    x_ptr, M, K, stride_xm, stride_xk,
    down_ptr, stride_dr, stride_dk,
    h_ptr, stride_hm, stride_hr,
    seed_ptr, threshold, scale,
    R: tl.constexpr, HAS_DROP: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h (M, R) = scale * drop(x (M, K)) @ down (R, K).T, a block of rows a program"""
    # programs of the same rows are neighbours, so that all but the first find them in L2
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_m = tl.program_id(0) // blocks_r
    pid_r = tl.program_id(0) % blocks_r
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    # rows and ranks past the end wrap around: they are computed from real data and never stored
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_xm
    x_ptrs += offs_k.to(tl.int64)[None, :] * stride_xk
    down_ptrs = down_ptr + (offs_r % R).to(tl.int64)[None, :] * stride_dr
    down_ptrs += offs_k.to(tl.int64)[:, None] * stride_dk
    if HAS_DROP:
        rows = row_key(seed_ptr, offs_m)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            down = tl.load(down_ptrs)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            down = tl.load(down_ptrs, mask=mask_k[:, None], other=0.0)
        if HAS_DROP:
            pairs = pair_key(seed_ptr, k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
            x = drop(x, rows, pairs, threshold)
        acc = dot(x, cast(down, x.dtype), acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        down_ptrs += BLOCK_K * tl.cast(stride_dk, tl.int64)
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    h_ptrs += offs_r.to(tl.int64)[None, :] * stride_hr
    h = narrow(acc * scale, h_ptr.dtype.element_ty)
    tl.store(h_ptrs, h, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])


def project(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, R), dtype of x
    """h = scale * drop(x) @ down.T"""
    (M, K), (R, _) = x.shape, down.shape
    assert down.shape == (R, K) and x.dtype in FLOATS and x.device == down.device
    h = tl_utils.empty((M, R), x.dtype, x)
    if M == 0:
        return h
    BLOCK_R = pad_rank(R)
    tile = tile_for("project", x.device, x.element_size(), BLOCK_R)
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(R, BLOCK_R),)
    with torch.cuda.device_of(x):
        _project_kernel[grid](
            x, M, K, *x.stride(),
            down, *down.stride(),
            h, *h.stride(),
            scale=float(scale), R=R, EVEN_K=K % tile["BLOCK_K"] == 0,
            PRECISION=dot_precision(x.dtype), BLOCK_R=BLOCK_R, **drop_args(p, seed), **tile,
        )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["threshold"])
def _matmul_lowrank_kernel(
    x_ptr, M, K, stride_xm, stride_xk,
    weight_ptr, N, stride_wn, stride_wk,
    h_ptr, stride_hm, stride_hr,
    up_ptr, stride_un, stride_ur,
    bias_ptr, stride_b,
    y_ptr, stride_ym, stride_yn,
    seed_ptr, threshold,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROP: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) @ weight (N, K).T + bias (N,) + drop(h (M, R) @ up (N, R).T)"""
    pid_m, pid_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    # rows and columns past the end wrap around: they are computed from real data and never stored
    rows_m = (offs_m % M).to(tl.int64)
    rows_n = (offs_n % N).to(tl.int64)
    # The low-rank product comes first: the accumulator starts from it and nothing of it is live in
    # the loop. As an epilogue it cost 255 registers and a spill at 128x256x64 on sm_80.
    acc = lowrank_start(
        h_ptr, offs_m, M, stride_hm, stride_hr,
        up_ptr, pid_n * BLOCK_N, N, stride_un, stride_ur,
        seed_ptr, threshold, x_ptr.dtype.element_ty, R, HAS_DROP, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip
    x_ptrs = x_ptr + rows_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    w_ptrs = weight_ptr + rows_n[None, :] * stride_wn + offs_k.to(tl.int64)[:, None] * stride_wk
    for k in range(0, tl.cdiv(K, BLOCK_K)):
        if EVEN_K:
            x = tl.load(x_ptrs)
            w = tl.load(w_ptrs)
        else:
            mask_k = offs_k < K - k * BLOCK_K
            x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
            w = tl.load(w_ptrs, mask=mask_k[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    if HAS_BIAS:
        acc += widen(tl.load(bias_ptr + rows_n * stride_b))[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym
    y_ptrs += offs_n.to(tl.int64)[None, :] * stride_yn
    y = narrow(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


def matmul_lowrank(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K), dtype of x
    h: Tensor,  # (M, R), dtype of x
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, N), dtype of x
    """y = x @ weight.T + bias + drop(h @ up.T), rounded once"""
    (M, K), (N, _), (_, R) = x.shape, weight.shape, up.shape
    assert weight.shape == (N, K) and h.shape == (M, R) and up.shape == (N, R)
    assert x.dtype in FLOATS and weight.dtype == x.dtype and h.dtype == x.dtype
    y = tl_utils.empty((M, N), x.dtype, x)
    if M == 0:
        return y
    kernel = "matmul_lowrank" if weight.stride(1) == 1 else "matmul_lowrank_t"
    matrices = (x, weight if weight.stride(1) == 1 else weight.T, y)
    descriptor = has_row(kernel + "_descriptor", x.device) and x.element_size() == 2 and R <= 128
    if descriptor and all(map(describable, matrices)):
        # sm_100 takes the low-rank product in one block: of a chain of them Triton makes an empty kernel
        BLOCK_R = pad_rank(R, most=128 if tiles.arch_of(x.device) >= 100 else 64)
        tile = tile_for(kernel + "_descriptor", x.device, x.element_size(), BLOCK_R)
        matmul_lowrank_descriptor(x, weight, h, up, bias, p, seed, y, tile, BLOCK_R)
        return y
    BLOCK_R = pad_rank(R, most=64 if R <= 128 else 32)
    tile = tile_for(kernel, x.device, x.element_size(), BLOCK_R)
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    with torch.cuda.device_of(x):
        _matmul_lowrank_kernel[grid](
            x, M, K, *x.stride(),
            weight, N, *weight.stride(),
            h, *h.stride(),
            up, *up.stride(),
            bias, 0 if bias is None else bias.stride(0),
            y, *y.stride(),
            R=R, HAS_BIAS=bias is not None, EVEN_K=K % tile["BLOCK_K"] == 0,
            PRECISION=dot_precision(x.dtype), PARTS=parts_of(tile["BLOCK_N"], p > 0.0 and seed is not None),
            BLOCK_R=BLOCK_R, GROUP_M=8, **drop_args(p, seed), **tile,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["threshold"])
def _outer_kernel(
    g_ptr, M, stride_gm, stride_gr,
    x_ptr, K, stride_xm, stride_xk,
    out_ptr, stride_os, stride_or, stride_ok,
    seed_ptr, threshold, steps,
    R: tl.constexpr, HAS_DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (S, R, K): g (M, R).T @ drop(x (M, K)) over each strip of rows"""
    # programs of the same part of x are neighbours, as in project
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_k = tl.program_id(0) // blocks_r
    strip = tl.program_id(1)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = strip * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    g_ptrs = g_ptr + offs_m.to(tl.int64)[None, :] * stride_gm + (offs_r % R).to(tl.int64)[:, None] * stride_gr
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    x_ptrs += (offs_k % K).to(tl.int64)[None, :] * stride_xk
    if HAS_DROP:
        pairs = pair_key(seed_ptr, pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for _ in range(0, steps):
        mask_m = offs_m < M
        g = tl.load(g_ptrs, mask=mask_m[None, :], other=0.0)
        x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
        if HAS_DROP:
            x = drop(x, row_key(seed_ptr, offs_m), pairs, threshold)
        acc = dot(g, x, acc, PRECISION)
        offs_m += BLOCK_M
        g_ptrs += BLOCK_M * tl.cast(stride_gm, tl.int64)
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)
    out_ptrs = out_ptr + strip * tl.cast(stride_os, tl.int64) + offs_k.to(tl.int64)[None, :] * stride_ok
    out_ptrs += offs_r.to(tl.int64)[:, None] * stride_or
    out = narrow(acc, out_ptr.dtype.element_ty)
    tl.store(out_ptrs, out, mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


@triton.jit
def sum_strip(part_ptr, S, L, out_ptr, scale, pid, BLOCK: tl.constexpr):
    """out = scale * part (S, L).sum(0) for one block of the L elements, in the order of the strips"""
    offs = pid.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < L
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for s in range(0, S):
        acc += tl.load(part_ptr + s * tl.cast(L, tl.int64) + offs, mask=mask, other=0.0)
    tl.store(out_ptr + offs, narrow(acc * scale, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _sum_strips_kernel(part_ptr, S, L, out_ptr, BLOCK: tl.constexpr):
    """out (L,) = part (S, L).sum(0)"""
    sum_strip(part_ptr, S, L, out_ptr, 1.0, tl.program_id(0), BLOCK)


def sum_strips(part: Tensor, out: Tensor) -> Tensor:
    """out = part.sum(0), in the order of the strips and rounded once"""
    L, BLOCK = out.numel(), 1024
    _sum_strips_kernel[triton.cdiv(L, BLOCK),](part, part.shape[0], L, out, BLOCK=BLOCK)
    return out


def strips_of(M: int, BLOCK_M: int, columns: int, programs: int = 256) -> tuple[int, int]:
    """(strips, steps per strip) that give a card work enough; of the sizes alone, so that every card sums alike"""
    blocks = triton.cdiv(M, BLOCK_M)
    steps = triton.cdiv(blocks, max(1, programs // columns))
    steps = max(steps, min(blocks, 4))  # a strip shorter than the pipeline is not worth its partial sum
    return triton.cdiv(blocks, steps), steps


def outer(
    g: Tensor,  # (M, R)
    x: Tensor,  # (M, K), dtype of g
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    dtype: torch.dtype | None = None,
) -> Tensor:  # (R, K), dtype given or that of x
    """g.T @ drop(x), summed over the M rows"""
    (M, R), (_, K) = g.shape, x.shape
    assert x.shape == (M, K) and x.dtype in FLOATS and g.dtype == x.dtype
    out = tl_utils.empty((R, K), dtype or x.dtype, x)
    if M == 0:
        return out.zero_()
    BLOCK_R = pad_rank(R)
    tile = tile_for("outer", x.device, x.element_size(), BLOCK_R)
    columns = triton.cdiv(K, tile["BLOCK_K"]) * triton.cdiv(R, BLOCK_R)
    strips, steps = strips_of(M, tile["BLOCK_M"], columns)
    part = out[None] if strips == 1 else tl_utils.empty((strips, R, K), torch.float32, x)
    with torch.cuda.device_of(x):
        _outer_kernel[columns, strips](
            g, M, *g.stride(),
            x, K, *x.stride(),
            part, *part.stride(),
            steps=steps, R=R, PRECISION=dot_precision(x.dtype), BLOCK_R=BLOCK_R, **drop_args(p, seed), **tile,
        )  # fmt: skip
        return out if strips == 1 else sum_strips(part, out)
