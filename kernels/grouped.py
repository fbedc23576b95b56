"""The products of a stack of experts, each in one launch: rows are sorted by expert, and every block of rows looks up
its expert by itself.

Where each expert's rows end stays on the card (``rows.ends``), so the host reads nothing. A grid has S // BLOCK_M + E
blocks of rows: the blocks of expert e begin with number start_e // BLOCK_M + e, which leaves room for one block of each
expert that is not full. A block that no expert needs ends at once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles, tl_utils
from .launcher import Facts, Launch, prepared
from .matmul_lowrank import add_product
from .tiles import tile_for
from .tl_utils import (
    FLOATS,
    cast,
    dot,
    dot_precision,
    drop,
    grouped,
    lowrank_start,
    narrow,
    pad_rank,
    pair_key,
    parts_of,
    row_key,
    threshold_of,
    widen,
)


@triton.jit
def _rows_of(expert, ends_ptr):
    """(first row, number of rows) of an expert"""
    start = tl.load(ends_ptr + expert - 1, mask=expert > 0, other=0)
    return start, tl.load(ends_ptr + expert) - start


@triton.jit
def _block_of(block, ends_ptr, E, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """(expert, its first row, number of its rows, the first of them that this block of rows has)"""
    e = tl.arange(0, BLOCK_E)
    starts = tl.load(ends_ptr + e - 1, mask=(e > 0) & (e < E), other=0)
    begun = (e < E) & (starts // BLOCK_M + e <= block)
    expert = tl.sum(begun.to(tl.int32), 0) - 1
    start, count = _rows_of(expert, ends_ptr)
    return expert, start, count, (block - start // BLOCK_M - expert) * BLOCK_M


@triton.jit
def _places(index_ptr, rows, mask):
    """Where rows of x are, int64: those of their tokens, or the rows themselves"""
    if index_ptr is not None:
        return tl.load(index_ptr + rows, mask=mask).to(tl.int64)
    return rows.to(tl.int64)


@triton.jit(do_not_specialize=["threshold"])
def _grouped_project_kernel(
    x_ptr, down_ptr, h_ptr, index_ptr, ends_ptr, seeds_ptr, scale,
    E, K, stride_xm, stride_xk, stride_de, stride_dr, stride_dk, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h (S, R) = scale * drop(x[index] (S, K)) @ down (E, R, K).T, each row with its expert's"""
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    expert, start, count, first = _block_of(tl.program_id(0) // blocks_r, ends_ptr, E, BLOCK_M, BLOCK_E)
    if first >= count:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    # rows and ranks past the end wrap around: they are computed from real data and never stored
    rows = _places(index_ptr, start + offs_m % count, None)
    x_ptrs = x_ptr + rows[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk
    down_ptrs = down_ptr + expert.to(tl.int64) * stride_de + (offs_r % R).to(tl.int64)[None, :] * stride_dr
    down_ptrs += offs_k.to(tl.int64)[:, None] * stride_dk
    if HAS_DROP:
        key = row_key(seeds_ptr + 2 * expert, offs_m)
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
            pairs = pair_key(seeds_ptr + 2 * expert, k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
            x = drop(x, key, pairs, threshold)
        acc = dot(x, cast(down, x.dtype), acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        down_ptrs += BLOCK_K * tl.cast(stride_dk, tl.int64)
    h_ptrs = h_ptr + (start + offs_m).to(tl.int64)[:, None] * R + offs_r[None, :]
    h = narrow(acc * scale, h_ptr.dtype.element_ty)
    tl.store(h_ptrs, h, mask=(offs_m < count)[:, None] & (offs_r < R)[None, :])


@triton.jit(do_not_specialize=["tiles_m", "threshold"])
def _grouped_matmul_kernel(
    x_ptr, weight_ptr, y_ptr, h_ptr, up_ptr, bias_ptr, index_ptr, ends_ptr, seeds_ptr,
    tiles_m, E, N, K, stride_xm, stride_xk, stride_we, stride_wn, stride_wk, stride_hm, stride_hr,
    stride_ue, stride_un, stride_ur, stride_be, stride_bn, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr,
    GROUP_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (S, N) = x[index] (S, K) @ weight (E, N, K).T + bias (E, N) + drop(h (S, R) @ up (E, N, R).T), likewise"""
    pid_m, pid_n = grouped(tl.program_id(0), tiles_m * BLOCK_M, N, BLOCK_M, BLOCK_N, GROUP_M)
    expert, start, count, first = _block_of(pid_m, ends_ptr, E, BLOCK_M, BLOCK_E)
    if first >= count:
        return
    offs_m = first + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = _places(index_ptr, start + offs_m % count, None)
    rows_n = (offs_n % N).to(tl.int64)
    wide = expert.to(tl.int64)
    seed_ptr = seeds_ptr
    if HAS_DROP:
        seed_ptr = seeds_ptr + 2 * expert
    acc = lowrank_start(
        h_ptr + start.to(tl.int64) * stride_hm, offs_m, count, stride_hm, stride_hr,
        up_ptr + wide * stride_ue, pid_n * BLOCK_N, N, stride_un, stride_ur,
        seed_ptr, threshold, y_ptr.dtype.element_ty, R, HAS_DROP, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip
    if x_ptr is not None:
        acc = add_product(
            acc, x_ptr, weight_ptr + wide * stride_we, rows_m, rows_n, K, stride_xm, stride_xk, stride_wn, stride_wk,
            EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
    if bias_ptr is not None:
        acc += widen(tl.load(bias_ptr + wide * stride_be + rows_n * stride_bn))[None, :]
    y_ptrs = y_ptr + (start + offs_m).to(tl.int64)[:, None] * N + offs_n[None, :]
    y = narrow(acc, y_ptr.dtype.element_ty)
    tl.store(y_ptrs, y, mask=(offs_m < count)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _grouped_outer_kernel(
    g_ptr, x_ptr, out_ptr, index_ptr, ends_ptr, seeds_ptr,
    K, stride_gm, stride_gr, stride_xm, stride_xk, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (E, R, K) = g (S, R).T @ drop(x[index] (S, K)) over the rows of each expert"""
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_k = tl.program_id(0) // blocks_r
    expert = tl.program_id(1)
    start, count = _rows_of(expert, ends_ptr)
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = tl.arange(0, BLOCK_M)
    g_ptrs = g_ptr + (start + offs_m).to(tl.int64)[None, :] * stride_gm
    g_ptrs += (offs_r % R).to(tl.int64)[:, None] * stride_gr
    x_ptrs = x_ptr + (offs_k % K).to(tl.int64)[None, :] * stride_xk
    if HAS_DROP:
        pairs = pair_key(seeds_ptr + 2 * expert, pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
    acc = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
    for _ in range(0, tl.cdiv(count, BLOCK_M)):
        mask_m = offs_m < count
        rows = _places(index_ptr, start + offs_m, mask_m)
        g = tl.load(g_ptrs, mask=mask_m[None, :], other=0.0)
        x = tl.load(x_ptrs + rows[:, None] * stride_xm, mask=mask_m[:, None], other=0.0)
        if HAS_DROP:
            x = drop(x, row_key(seeds_ptr + 2 * expert, offs_m), pairs, threshold)
        acc = dot(g, x, acc, PRECISION)
        offs_m += BLOCK_M
        g_ptrs += BLOCK_M * tl.cast(stride_gm, tl.int64)
    out_ptrs = out_ptr + (expert.to(tl.int64) * R + offs_r)[:, None] * K + offs_k[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=(offs_r < R)[:, None] & (offs_k < K)[None, :])


def _blocks_of(S: int, E: int, BLOCK_M: int) -> int:
    """Blocks of rows that are enough, however the rows are shared out among the experts"""
    return S // BLOCK_M + E


def _seeds(p: float, seeds: Tensor | None, E: int) -> Tensor | None:
    """The seeds if anything is dropped; without them a kernel's dropout is not compiled"""
    if seeds is None or p == 0.0:
        return None
    assert seeds.dtype == torch.int32 and seeds.is_contiguous() and seeds.shape == (E, 2)
    return seeds


def _check_rows(index: Facts | None, ends: Facts, E: int) -> None:
    assert ends.dtype == torch.int32 and ends.shape == (E,) and ends.stride == (1,)
    assert index is None or index.dtype == torch.int64 and index.stride == (1,)


def _grouped_project(
    x: Facts, down: Facts, h: Facts, index: Facts | None, ends: Facts, seeds: Facts | None, p: float, precision: str
) -> Launch:
    (E, R, K), S = down.shape, h.shape[0]
    assert x.shape == ((S if index is None else x.shape[0]), K) and x.dtype in FLOATS
    _check_rows(index, ends, E)
    BLOCK_R = pad_rank(R)
    tile = tile_for("grouped_project", x.device, x.dtype.itemsize, BLOCK_R)
    return Launch(
        _grouped_project_kernel, [_blocks_of(S, E, tile["BLOCK_M"]) * triton.cdiv(R, BLOCK_R)],
        E=E, K=K, stride_xm=x.stride[0], stride_xk=x.stride[1], stride_de=down.stride[0], stride_dr=down.stride[1],
        stride_dk=down.stride[2], threshold=threshold_of(p), R=R, HAS_DROP=seeds is not None,
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=precision, BLOCK_E=triton.next_power_of_2(E), BLOCK_R=BLOCK_R,
        **tile,
    )  # fmt: skip


def grouped_project(
    x: Tensor,  # (S, K), or (T, K) by token
    down: Tensor,  # (E, R, K)
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    scale: float = 1.0,
    p: float = 0.0,
    seeds: Tensor | None = None,  # (E, 2) int32
    by_token: bool = False,
) -> Tensor:  # (S, R), dtype of x
    """h_s = scale * drop(x_s) @ down_e.T"""
    h = tl_utils.empty((rows.tokens.shape[0], down.shape[1]), x.dtype, x)
    if h.numel():
        seeds = _seeds(p, seeds, down.shape[0])
        operands = (x, down, h, rows.tokens if by_token else None, rows.ends, seeds)
        prepared(_grouped_project, operands, p, dot_precision(x.dtype))(x, 0, *operands, float(scale))
    return h


def _grouped_matmul(
    x: Facts | None, weight: Facts | None, y: Facts, h: Facts, up: Facts, bias: Facts | None, index: Facts | None,
    ends: Facts, seeds: Facts | None, p: float, precision: str,
) -> Launch:  # fmt: skip
    (E, N, R), S, K = up.shape, y.shape[0], 0
    assert h.shape == (S, R) and y.shape == (S, N) and h.dtype == y.dtype and y.dtype in FLOATS
    xm = xk = we = wn = wk = 0
    if x is not None and weight is not None:
        K, (xm, xk), (we, wn, wk) = x.shape[1], x.stride, weight.stride
        assert x.shape[0] == S or index is not None
        assert weight.shape == (E, N, K) and x.dtype == y.dtype
    _check_rows(index, ends, E)
    BLOCK_R = pad_rank(R, most=64 if R <= 128 else 32)
    tile = tile_for("grouped_matmul", y.device, y.dtype.itemsize, BLOCK_R)
    blocks = _blocks_of(S, E, tile["BLOCK_M"])
    be, bn = (0, 0) if bias is None else bias.stride
    # for the mask alone: without one, the low-rank product of so small a tile took more registers in parts
    parts = parts_of(tile["BLOCK_N"], True, tiles.arch_of(y.device)) if K and seeds is not None else 1
    return Launch(
        _grouped_matmul_kernel, [blocks * triton.cdiv(N, tile["BLOCK_N"])],
        tiles_m=blocks, E=E, N=N, K=K, stride_xm=xm, stride_xk=xk, stride_we=we, stride_wn=wn, stride_wk=wk,
        stride_hm=h.stride[0], stride_hr=h.stride[1],
        stride_ue=up.stride[0], stride_un=up.stride[1], stride_ur=up.stride[2], stride_be=be, stride_bn=bn,
        threshold=threshold_of(p), R=R, HAS_DROP=seeds is not None, EVEN_K=K % tile["BLOCK_K"] == 0,
        PRECISION=precision, PARTS=parts, GROUP_M=8,
        BLOCK_E=triton.next_power_of_2(E), BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip


def grouped_matmul_lowrank(
    x: Tensor,  # (S, K), or (T, K) by token; K may be 0
    weight: Tensor,  # (E, N, K), used in the dtype of x
    h: Tensor,  # (S, R), dtype of x
    up: Tensor,  # (E, N, R)
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    bias: Tensor | None = None,  # (E, N), likewise
    p: float = 0.0,
    seeds: Tensor | None = None,  # (E, 2) int32
    by_token: bool = False,
) -> Tensor:  # (S, N), dtype of x
    """y_s = x_s @ weight_e.T + bias_e + drop(h_s @ up_e.T)"""
    y = tl_utils.empty((h.shape[0], weight.shape[1]), x.dtype, x)
    if y.numel():
        seeds = _seeds(p, seeds, weight.shape[0])
        product = (x, weight) if x.shape[1] else (None, None)  # without one, its loop is not compiled
        operands = (*product, y, h, up, bias, rows.tokens if by_token else None, rows.ends, seeds)
        prepared(_grouped_matmul, operands, p, dot_precision(x.dtype))(x, 0, *operands)
    return y


def _grouped_outer(
    g: Facts, x: Facts, out: Facts, index: Facts | None, ends: Facts, seeds: Facts | None, p: float, precision: str
) -> Launch:
    (E, R, K), S = out.shape, g.shape[0]
    assert g.shape == (S, R) and x.shape == ((S if index is None else x.shape[0]), K)
    assert x.dtype == g.dtype and x.dtype in FLOATS
    _check_rows(index, ends, E)
    BLOCK_R = pad_rank(R, most=32 if x.dtype == torch.float32 else 128)  # as of ``outer``
    tile = tile_for("grouped_outer", x.device, x.dtype.itemsize, BLOCK_R)
    return Launch(
        _grouped_outer_kernel, [triton.cdiv(K, tile["BLOCK_K"]) * triton.cdiv(R, BLOCK_R), E],
        K=K, stride_gm=g.stride[0], stride_gr=g.stride[1], stride_xm=x.stride[0], stride_xk=x.stride[1],
        threshold=threshold_of(p), R=R, HAS_DROP=seeds is not None, PRECISION=precision, BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip


def grouped_outer(
    g: Tensor,  # (S, R)
    x: Tensor,  # (S, K), or (T, K) by token; dtype of g
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    p: float = 0.0,
    seeds: Tensor | None = None,  # (E, 2) int32
    dtype: torch.dtype | None = None,
    by_token: bool = False,
) -> Tensor:  # (E, R, K), dtype given or that of x
    """g.T @ drop(x) over the rows of each expert; zero for an expert without rows"""
    E = rows.ends.shape[0]
    out = tl_utils.empty((E, g.shape[1], x.shape[1]), dtype or x.dtype, x)
    if out.numel():
        operands = (g, x, out, rows.tokens if by_token else None, rows.ends, _seeds(p, seeds, E))
        prepared(_grouped_outer, operands, p, dot_precision(x.dtype))(x, 0, *operands)
    return out


def grouped_rows(
    x: Tensor,  # (S, K), or (T, K) by token
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    by_token: bool = False,
) -> tuple[Tensor, bool]:
    """As they are: the kernels look up the rows of the tokens as they read them"""
    return x, by_token


def grouped_dx_and_ddown(
    dy: Tensor | None,  # (S, N); None adds no product with the weight
    weight: Tensor,  # (E, N, K), used in the dtype of g
    g: Tensor,  # (S, R)
    down: Tensor,  # (E, R, K)
    x: Tensor | None,  # (S, K), or (T, K) by token; None if ddown is not needed
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    p: float = 0.0,
    seeds: Tensor | None = None,  # (E, 2) int32
    *,
    need_dx: bool = True,
    dtype: torch.dtype | None = None,
    by_token: bool = False,
) -> tuple[Tensor | None, Tensor | None]:  # dx (S, K), dtype of g; ddown (E, R, K), dtype given or that of x
    """dx_s = dy_s @ weight_e + drop(g_s @ down_e) and ddown as of ``grouped_outer``"""
    ddown = None if x is None else grouped_outer(g, x, rows, p, seeds, dtype, by_token)
    if not need_dx:
        return None, ddown
    product = (g[:, :0], down[:, :0].mT) if dy is None else (dy, weight.mT)
    return grouped_matmul_lowrank(*product, g, down.mT, rows, None, p, seeds), ddown
