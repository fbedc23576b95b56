"""The skinny passes: project a matrix, sum it against another (outer), or both in one read (project_outer)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .tiles import tile_for
from .tl_utils import (
    FLOATS,
    cast,
    dot,
    dot_precision,
    drop,
    drop_args,
    launching,
    narrow,
    pad_rank,
    pair_key,
    row_key,
)


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
    with launching("project", x):
        _project_kernel[grid](
            x, M, K, *x.stride(),
            down, *down.stride(),
            h, *h.stride(),
            scale=float(scale), R=R, EVEN_K=K % tile["BLOCK_K"] == 0,
            PRECISION=dot_precision(x.dtype), BLOCK_R=BLOCK_R, **drop_args(p, seed), **tile,
        )  # fmt: skip
    return h


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
    # With a mask, sm_100 takes float32 from 64 ranks on to its tensor cores, as TF32 or not at all, whatever is asked.
    BLOCK_R = pad_rank(R, most=32 if x.dtype == torch.float32 else 128)
    tile = tile_for("outer", x.device, x.element_size(), BLOCK_R)
    columns = triton.cdiv(K, tile["BLOCK_K"]) * triton.cdiv(R, BLOCK_R)
    strips, steps = strips_of(M, tile["BLOCK_M"], columns)
    part = out[None] if strips == 1 else tl_utils.empty((strips, R, K), torch.float32, x)
    with launching("outer", x):
        _outer_kernel[columns, strips](
            g, M, *g.stride(),
            x, K, *x.stride(),
            part, *part.stride(),
            steps=steps, R=R, PRECISION=dot_precision(x.dtype), BLOCK_R=BLOCK_R, **drop_args(p, seed), **tile,
        )  # fmt: skip
        return out if strips == 1 else sum_strips(part, out)


@triton.jit
def _project_outer_kernel(
    x_ptr, M, K, stride_xm, stride_xk,
    down_ptr, stride_dr, stride_dk,
    h_ptr, stride_hm, stride_hr,
    g_ptr, out_ptr, steps,
    R: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g (C, M, R) = x (M, K) @ down (R, K).T per block of columns, out (S, K, R) = x.T @ h (M, R) per strip of rows"""
    pid_k = tl.program_id(0)
    strip = tl.program_id(1)
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = strip * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < R
    mask_k = offs_k < K
    k = offs_k.to(tl.int64)
    down_ptrs = down_ptr + k[:, None] * stride_dk + (offs_r % R).to(tl.int64)[None, :] * stride_dr
    down = tl.load(down_ptrs, mask=mask_k[:, None], other=0.0)
    down = cast(down, x_ptr.dtype.element_ty)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    h_ptrs += (offs_r % R).to(tl.int64)[None, :] * stride_hr
    g_ptrs = g_ptr + (pid_k * tl.cast(M, tl.int64) + offs_m)[:, None] * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for _ in range(0, steps):
        mask_m = offs_m < M
        h = tl.load(h_ptrs, mask=mask_m[:, None], other=0.0)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        g = dot(x, down, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), PRECISION)
        tl.store(g_ptrs, g, mask=mask_m[:, None] & mask_r[None, :])
        acc = dot(tl.trans(x), h, acc, PRECISION)
        offs_m += BLOCK_M
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)
        h_ptrs += BLOCK_M * tl.cast(stride_hm, tl.int64)
        g_ptrs += BLOCK_M * R
    out_ptrs = out_ptr + (strip * tl.cast(K, tl.int64) + k)[:, None] * R + offs_r[None, :]
    tl.store(out_ptrs, acc, mask=mask_k[:, None] & mask_r[None, :])


@triton.jit
def _sum_both_kernel(
    g_part_ptr, C, L_g, g_ptr, scale,
    out_part_ptr, S, L_out, out_ptr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """g (L_g,) = scale * g_part (C, L_g).sum(0), out (L_out,) = out_part (S, L_out).sum(0), in order"""
    pid = tl.program_id(0)
    blocks_g = tl.cdiv(L_g, BLOCK)
    if pid < blocks_g:
        sum_strip(g_part_ptr, C, L_g, g_ptr, scale, pid, BLOCK)
    else:
        sum_strip(out_part_ptr, S, L_out, out_ptr, 1.0, pid - blocks_g, BLOCK)


def sweep_pays(M: int, K: int, R: int, columns: int, strips: int, itemsize: int) -> bool:
    """Whether the partial sums, written and read once, cost less than a second read of x"""
    return 2 * 4 * R * (columns * M + strips * K) < itemsize * M * K


def project_outer(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    h: Tensor,  # (M, R), dtype of x
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (M, R), dtype of x; (R, K), dtype given or that of x
    """g = scale * x @ down.T and out = h.T @ x, in one pass over x where that saves bytes"""
    (M, K), (R, _) = x.shape, down.shape
    assert down.shape == (R, K) and h.shape == (M, R) and x.dtype in FLOATS and h.dtype == x.dtype
    if M == 0:
        return project(x, down, scale), outer(h, x, dtype=dtype)
    BLOCK_R = pad_rank(R, most=64)  # above, two passes are cheaper than the partial sums
    tile = tile_for("project_outer", x.device, x.element_size(), BLOCK_R)
    columns = triton.cdiv(K, tile["BLOCK_K"])
    strips, steps = strips_of(M, tile["BLOCK_M"], columns, programs=128)
    if R > BLOCK_R or not sweep_pays(M, K, R, columns, strips, x.element_size()):
        return project(x, down, scale), outer(h, x, dtype=dtype)
    g = tl_utils.empty((M, R), x.dtype, x)
    out = tl_utils.empty((K, R), dtype or x.dtype, x)
    g_part = tl_utils.empty((columns, M, R), torch.float32, x)
    out_part = tl_utils.empty((strips, K, R), torch.float32, x)
    BLOCK = 1024
    with launching("project_outer", x):
        _project_outer_kernel[columns, strips](
            x, M, K, *x.stride(),
            down, *down.stride(),
            h, *h.stride(),
            g_part, out_part, steps,
            R=R, EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=dot_precision(x.dtype),
            BLOCK_R=BLOCK_R, **tile,
        )  # fmt: skip
        _sum_both_kernel[triton.cdiv(M * R, BLOCK) + triton.cdiv(K * R, BLOCK),](
            g_part, columns, M * R, g, float(scale),
            out_part, strips, K * R, out, BLOCK=BLOCK,
        )  # fmt: skip
    return g, out.T
