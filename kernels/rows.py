"""The rows that penalties add to the skinny passes: programs of their own in project, strips of their own in the sums.

A job is the tuple that a kernel gets for one block of rows V (k, dim): its tensors, then what ``product_numbers`` or
``sum_numbers`` make of their facts when the launch is prepared. Kernels take a tuple of jobs, and each is compiled for
what they hold: without any, nothing of this is.

V is stored; or the factor itself; or, of a Hadamard matrix, made from k row numbers, which then are never in memory.
Whatever is wider than the activations' dtype (factors, gradients) goes in as two numbers of that dtype, high and low:
sums are exact to 2**-16 or so, and what is float32 stays that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from .launcher import Facts
from .tl_utils import cast, dot, last_to_come, narrow, widen

#: Rows of V that one program of project takes, and that one step of a sum takes.
PRODUCT_ROWS = tl.constexpr(32)
#: Columns of V that it takes, where V is wider than x: walking over all it would outlast the programs of x.
PRODUCT_COLUMNS = tl.constexpr(4096)
SUM_ROWS = tl.constexpr(16)
#: Columns that it sums at a time, and half as many from 64 ranks on: else sm_90 spilt.
SUM_COLUMNS = tl.constexpr(128)
#: Blocks of rows whose Gram matrices are added up first.
GRAM_GROUP = tl.constexpr(16)


def _turned(of: str, t: Facts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a factor as (R, dim); of a basis (dim, k), as of "up", as (k, dim)"""
    return (t.shape[::-1], t.stride[::-1]) if of == "up" else (t.shape, t.stride)


def product_numbers(of: str, facts: Sequence[Any], at: int, x: Facts) -> tuple[Any, ...]:
    """For ``product``: k rows of out (float32) from ``at`` on = V @ factor (R, dim).T, beside activations ``x``

    ``facts`` are those of V, of its weight, of its row numbers and of the factor, which is V where both are None.
    """
    V, weight, columns, factor = facts
    (R, dim), factor_strides = _turned(of, factor)
    (k, _), strides = _turned("up", V) if V else ((columns.shape[0], dim), (0, 0)) if columns else _turned(of, factor)
    stored = V or (factor if columns is None else None)
    exact = stored is None or stored.dtype == x.dtype and (weight is None or not weight.dtype.is_floating_point)
    cut = dim > max(x.shape[1], PRODUCT_COLUMNS.value)
    return None if exact else 1, k, dim, R, at, *strides, *factor_strides, 1 if cut else None


def product_programs(numbers: tuple[Any, ...], BLOCK_R: int) -> tuple[int, int]:
    """Blocks of out of a job, and in how many parts each is made, a program each"""
    k, dim, R = numbers[1:4]
    parts = 1 if numbers[-1] is None else triton.cdiv(dim, PRODUCT_COLUMNS.value)
    return triton.cdiv(k, PRODUCT_ROWS.value) * triton.cdiv(R, BLOCK_R), parts


def sum_numbers(place: tuple[str, bool, int, int], facts: Sequence[Any], dim: int) -> tuple[Any, ...]:
    """For ``sum_rows``: d.T @ V (R, dim), and with V the factor itself (d + d.T) @ V

    ``place`` is what V is of, whether it is the factor, the first row of d in dz, and of the result; ``facts`` are
    those of V, of its weight, of its row numbers and of dz.
    """
    (of, own, at, first), (V, _, columns, dz) = place, facts
    R = dz.shape[1]
    (k, columns_of_V), strides = _turned(of if own else "up", V) if V else ((columns.shape[0], dim), (0, 0))
    assert columns_of_V == dim and (k == R or not own)
    assert (dz.shape[0] == 1 or dz.stride[0] == R) and (R == 1 or dz.stride[1] == 1)
    return 1 if own else None, k, dim, R, at, *strides, first


@triton.jit
def dot_wide(a, b, acc, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b of numbers that are wider than dtype, each as two of it"""
    high_a = cast(a, dtype)
    high_b = cast(b, dtype)
    acc = dot(high_a, high_b, acc, PRECISION)
    if b.dtype != dtype:
        acc = dot(high_a, narrow(widen(b) - widen(high_b), dtype), acc, PRECISION)
    if a.dtype != dtype:
        acc = dot(narrow(widen(a) - widen(high_a), dtype), high_b, acc, PRECISION)
    return acc


@triton.jit
def _parity(v):
    v ^= v >> 16
    v ^= v >> 8
    v ^= v >> 4
    v ^= v >> 2
    v ^= v >> 1
    return v & 1


@triton.jit
def _hadamard_sizes(c, dim):
    """Of each row c of the block Hadamard matrix its block's size: the binary digits of dim, largest first"""
    size = tl.zeros_like(c)
    start = 0
    for b in tl.static_range(0, 31):
        bit = dim & (1 << (30 - b))
        size = tl.where((c >= start) & (c < start + bit), bit, size)
        start += bit
    return size


@triton.jit
def _tile(job, c, size, offs_m, offs_k, dtype: tl.constexpr):
    """V[offs_m, offs_k], zero past its ends; Hadamard rows are +-1 here"""
    matrix_ptr, weight_ptr, columns_ptr, count, dim = job[0], job[1], job[2], job[5], job[6]
    mask_k = offs_k < dim
    mask = (offs_m < count)[:, None] & mask_k[None, :]
    if columns_ptr is not None:
        k = offs_k[None, :]
        same = mask & (((c[:, None] ^ k) & -size[:, None]) == 0)
        sign = 1 - 2 * _parity(c[:, None] & k & (size[:, None] - 1))
        sign = sign * tl.load(weight_ptr + offs_k, mask=mask_k, other=0).to(tl.int32)[None, :]
        v = narrow(tl.where(same, sign, 0).to(tl.float32), dtype)
    else:
        ptrs = matrix_ptr + offs_m.to(tl.int64)[:, None] * job[9] + offs_k.to(tl.int64)[None, :] * job[10]
        v = tl.load(ptrs, mask=mask, other=0.0)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + offs_k, mask=mask_k, other=0)
            exact: tl.constexpr = weight.dtype == tl.int8  # signs
            v = widen(v) * weight.to(tl.float32)[None, :]
            if exact:
                v = narrow(v, matrix_ptr.dtype.element_ty)
    return v


@triton.jit
def product_blocks(job, BLOCK_R: tl.constexpr):
    """Blocks of a job's result"""
    return tl.cdiv(job[5], PRODUCT_ROWS) * tl.cdiv(job[7], BLOCK_R)


@triton.jit
def product_parts(job):
    """In how many parts each of them is made, a program each"""
    if job[13] is None:
        return 1
    return tl.cdiv(job[6], PRODUCT_COLUMNS)


@triton.jit
def _product_step(
    acc, job, c, size, offs_m, k, factor_ptr, dtype: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """acc + V @ factor.T, of the columns from k * STEP on"""
    offs_k = k * STEP + tl.arange(0, STEP)
    v = _tile(job, c, size, offs_m, offs_k, dtype)
    factor = tl.load(factor_ptr + offs_k.to(tl.int64)[:, None] * job[12], mask=(offs_k < job[6])[:, None], other=0.0)
    return dot_wide(v, factor, acc, dtype, PRECISION)


@triton.jit
def product(
    job, pid, part_ptr, tickets_ptr,
    dtype: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A block of out = V @ factor.T, or a part of it; the last part to come adds them up, in their order"""
    factor_ptr, count, dim, R = job[3], job[5], job[6], job[7]
    out_ptr = job[14] + job[8] * R
    blocks_r = tl.cdiv(R, BLOCK_R)
    parts = product_parts(job)
    block = pid // parts
    offs_m = (block // blocks_r) * PRODUCT_ROWS + tl.arange(0, PRODUCT_ROWS)
    offs_r = (block % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = offs_m
    size = offs_m
    if job[2] is not None:
        c = tl.load(job[2] + offs_m, mask=offs_m < count, other=0).to(tl.int32)
        size = _hadamard_sizes(c, dim)
    factor_ptr += (offs_r % R).to(tl.int64)[None, :] * job[11]
    acc = tl.zeros((PRODUCT_ROWS, BLOCK_R), dtype=tl.float32)
    HALF: tl.constexpr = BLOCK_K // 2  # of whole blocks, those of three siblings spill
    first = 0
    stop = tl.cdiv(dim, HALF)
    if job[13] is not None:
        STEPS: tl.constexpr = PRODUCT_COLUMNS // HALF
        first = (pid % parts) * STEPS
        stop = tl.minimum(first + STEPS, stop)
    if job[4] is not None:  # wide: every number of it is in registers twice
        for k in tl.range(first, stop, num_stages=2):
            acc = _product_step(acc, job, c, size, offs_m, k, factor_ptr, dtype, PRECISION, HALF)
    else:
        for k in range(first, stop):
            acc = _product_step(acc, job, c, size, offs_m, k, factor_ptr, dtype, PRECISION, HALF)
    if job[2] is not None:
        acc *= tl.rsqrt(size.to(tl.float32))[:, None]
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    mask = (offs_m < count)[:, None] & (offs_r < R)[None, :]
    if job[13] is None:
        tl.store(out_ptrs, acc, mask=mask)
    else:
        AREA: tl.constexpr = PRODUCT_ROWS * BLOCK_R
        part_ptrs = part_ptr + tl.arange(0, PRODUCT_ROWS)[:, None] * BLOCK_R + tl.arange(0, BLOCK_R)[None, :]
        tl.store(part_ptrs + pid * AREA, acc)
        if last_to_come(tickets_ptr + block, parts):
            total = tl.zeros((PRODUCT_ROWS, BLOCK_R), dtype=tl.float32)
            for i in range(0, parts):
                total += tl.load(part_ptrs + (block * parts + i) * AREA, cache_modifier=".cg")
            tl.store(out_ptrs, total, mask=mask)


@triton.jit
def sum_rows(
    job, out_ptr, stride_r, stride_k, offs_r, most, first_k, dtype: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = d.T @ V, at ranks offs_r of ``most`` and BLOCK_K columns from first_k on, float32"""
    count, dim, R = job[5], job[6], job[7]
    d_ptr = job[3] + job[8] * R
    own_r = offs_r - job[11]
    mask_r = (own_r >= 0) & (own_r < R)
    MOST: tl.constexpr = SUM_COLUMNS if offs_r.shape[0] < 64 else SUM_COLUMNS // 2
    WIDTH: tl.constexpr = BLOCK_K if BLOCK_K < MOST else MOST
    for part in tl.range(0, BLOCK_K, WIDTH, num_stages=1):
        offs_k = first_k + part + tl.arange(0, WIDTH)
        acc = tl.zeros((offs_r.shape[0], WIDTH), dtype=tl.float32)
        for m in tl.range(0, tl.cdiv(count, SUM_ROWS), num_stages=1):
            offs_m = m * SUM_ROWS + tl.arange(0, SUM_ROWS)
            c = offs_m
            size = offs_m
            if job[2] is not None:
                c = tl.load(job[2] + offs_m, mask=offs_m < count, other=0).to(tl.int32)
                size = _hadamard_sizes(c, dim)
            v = _tile(job, c, size, offs_m, offs_k, dtype)
            mask = (offs_m < count)[:, None] & mask_r[None, :]
            d = tl.load(d_ptr + offs_m.to(tl.int64)[:, None] * R + own_r[None, :], mask=mask, other=0.0)
            if job[4] is not None:
                d += tl.load(d_ptr + own_r.to(tl.int64)[None, :] * R + offs_m[:, None], mask=mask, other=0.0)
            if job[2] is not None:
                d *= tl.rsqrt(size.to(tl.float32))[:, None]
            acc = dot_wide(tl.trans(d), v, acc, dtype, PRECISION)
        out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * stride_r + offs_k.to(tl.int64)[None, :] * stride_k
        tl.store(out_ptrs, acc, mask=(offs_r < most)[:, None] & (offs_k < dim)[None, :])


@triton.jit
def add_started(
    acc, h_ptr, offs_m, M, stride_hm, stride_hr, d_ptr, offs_r,
    R: tl.constexpr,
):  # fmt: skip
    """acc + (h (M, R) @ (d + d.T))[offs_m, offs_r]"""
    mask_r = (offs_r < R)[None, :]
    for s in tl.range(0, R, SUM_ROWS, num_stages=1):  # few at a time: every warp holds all of d's rows
        offs_s = s + tl.arange(0, SUM_ROWS)
        mask_s = offs_s < R
        h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm + offs_s.to(tl.int64)[None, :] * stride_hr
        h = tl.load(h_ptrs, mask=(offs_m < M)[:, None] & mask_s[None, :], other=0.0)
        d = tl.load(d_ptr + offs_s[:, None] * R + offs_r[None, :], mask=mask_s[:, None] & mask_r, other=0.0)
        d += tl.load(d_ptr + offs_r[None, :] * R + offs_s[:, None], mask=mask_s[:, None] & mask_r, other=0.0)
        acc = dot(widen(h), d, acc, "ieee")  # not on tensor cores: sm_90 has no registers left for one wgmma more
    return acc


@triton.jit
def gram(
    a, b, grams, part_ptr, tickets_ptr, block, blocks,
    R: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """a.T @ b over all blocks of rows, of each layer its own ranks, by way of part (blocks and their groups, R, R)"""
    r = tl.arange(0, BLOCK_R)[:, None]
    s = tl.arange(0, BLOCK_R)[None, :]
    mask = (r < R) & (s < R)
    part_ptrs = part_ptr + r * R + s
    zero = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)
    size = tl.cast(R * R, tl.int64)
    tl.store(part_ptrs + block * size, dot(tl.trans(a), b, zero, PRECISION), mask=mask)
    groups = tl.cdiv(blocks, GRAM_GROUP)
    group = block // GRAM_GROUP
    members = tl.minimum(blocks - group * GRAM_GROUP, GRAM_GROUP)
    if last_to_come(tickets_ptr + 1 + group, members):
        total = zero
        for i in range(0, members):
            at = part_ptrs + (group * GRAM_GROUP + i) * size
            total += tl.load(at, mask=mask, other=0.0, cache_modifier=".cg")
        tl.store(part_ptrs + (blocks + group) * size, total, mask=mask)
        if last_to_come(tickets_ptr, groups):
            total = zero
            for i in range(0, groups):
                total += tl.load(part_ptrs + (blocks + i) * size, mask=mask, other=0.0, cache_modifier=".cg")
            for j in tl.static_range(len(grams)):
                out_ptr, at, first, own = grams[j][0], grams[j][1], grams[j][2], grams[j][3]
                inside = (r >= first) & (r < first + own) & (s >= first) & (s < first + own)
                tl.store(out_ptr + (at + r - first) * own + (s - first), total, mask=inside)
