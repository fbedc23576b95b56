"""The backward pass's fused sweep: what the gradient dy is projected to and what it is summed to, in one read of it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .lowrank import FLOATS, outer, pad_rank, project, strips_of, sum_strip
from .tiles import tile_for
from .tl_utils import cast, dot, dot_precision


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
    with torch.cuda.device_of(x):
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
