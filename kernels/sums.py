"""The sums over rows of the backward pass: a matrix against another (outer), with a projection in one read, too.

Sums over strips of rows, or over blocks of columns, are finished by the program that comes last, in the order of the
strips: a launch less, and the same bits whoever it is. The rows that penalties add are strips of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles, tl_utils
from .launcher import Launch, prepared
from .rows import add_started, sum_numbers, sum_rows
from .tiles import MOST_REGISTERS, tile_for
from .tl_utils import (
    FLOATS,
    cast,
    dot,
    dot_precision,
    drop,
    dropping,
    last_to_come,
    narrow,
    pad_rank,
    pair_key,
    row_key,
    threshold_of,
)


@triton.jit(do_not_specialize=["M", "steps", "threshold"])
def _outer_kernel(
    g_ptr, x_ptr, out_ptr, part_ptr, tickets_ptr, seed_ptr, jobs,
    M, K, stride_gm, stride_gr, stride_xm, stride_xk, stride_or, stride_ok, steps, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out (R, K) = g (M, R).T @ drop(x (M, K)), by way of part (S, R, K) where there are several strips of rows

    Each of ``jobs`` is a strip more.
    """
    # programs of the same part of x are neighbours, as in project
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_k = tl.program_id(0) // blocks_r
    strip = tl.program_id(1)
    strips = tl.num_programs(1)
    own = strips - len(jobs)  # those of x
    offs_r = (tl.program_id(0) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = strip * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    g_ptrs = g_ptr + offs_m.to(tl.int64)[None, :] * stride_gm + (offs_r % R).to(tl.int64)[:, None] * stride_gr
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm
    x_ptrs += (offs_k % K).to(tl.int64)[None, :] * stride_xk
    if HAS_DROP:
        pairs = pair_key(seed_ptr, pid_k * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
    for j in tl.static_range(len(jobs)):
        if strip == own + j:
            part = part_ptr + strip * (R * tl.cast(K, tl.int64))
            sum_rows(
                jobs[j], part, K, 1, offs_r, R, pid_k * BLOCK_K, x_ptr.dtype.element_ty, PRECISION, BLOCK_K
            )  # fmt: skip
            steps = 0
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
    mask = (offs_r < R)[:, None] & (offs_k < K)[None, :]
    out_ptrs = out_ptr + offs_r.to(tl.int64)[:, None] * stride_or + offs_k.to(tl.int64)[None, :] * stride_ok
    if strips == 1:
        tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)
    else:
        size = R * tl.cast(K, tl.int64)
        part_ptrs = part_ptr + offs_r.to(tl.int64)[:, None] * K + offs_k[None, :]
        if len(jobs) == 0:
            tl.store(part_ptrs + strip * size, acc, mask=mask)
        else:
            limit = tl.where(strip < own, R, 0)
            tl.store(part_ptrs + strip * size, acc, mask=mask & (offs_r < limit)[:, None])
        if last_to_come(tickets_ptr + tl.program_id(0), strips):
            total = tl.zeros((BLOCK_R, BLOCK_K), dtype=tl.float32)
            for s in range(0, strips):  # past L1, which knows nothing of other multiprocessors' writes
                total += tl.load(part_ptrs + s * size, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(out_ptrs, narrow(total, out_ptr.dtype.element_ty), mask=mask)


def strips_of(M: int, BLOCK_M: int, columns: int, programs: int = 256) -> tuple[int, int]:
    """(strips, steps per strip) that give a card work enough; of the sizes alone, so that every card sums alike"""
    blocks = triton.cdiv(max(M, 1), BLOCK_M)
    steps = triton.cdiv(blocks, max(1, programs // columns))
    steps = max(steps, min(blocks, 4))  # a strip shorter than the pipeline is not worth its partial sum
    return triton.cdiv(blocks, steps), steps


def _outer(*given: Any) -> Launch:
    """The launch of ``outer``: g, x, out, seed, four facts for each of the jobs, their places, p and the precision"""
    g, x, out, seed, *facts, places, p, precision = given
    (M, R), (_, K) = g.shape, x.shape
    assert x.shape == (M, K) and x.dtype in FLOATS and g.dtype == x.dtype
    # With a mask, sm_100 takes float32 from 64 ranks on to its tensor cores, as TF32 or not at all, whatever is asked.
    BLOCK_R = pad_rank(R, most=32 if x.dtype == torch.float32 else 128)
    tile = tile_for("outer", x.device, x.dtype.itemsize, BLOCK_R)
    columns = triton.cdiv(K, tile["BLOCK_K"]) * triton.cdiv(R, BLOCK_R)
    strips, steps = strips_of(M, tile["BLOCK_M"], columns, 256 - len(places) * columns)
    launch = Launch(
        _outer_kernel, [columns, strips + len(places)],
        M=M, K=K, stride_gm=g.stride[0], stride_gr=g.stride[1], stride_xm=x.stride[0], stride_xk=x.stride[1],
        stride_or=out.stride[0], stride_ok=out.stride[1], steps=steps, threshold=threshold_of(p),
        R=R, HAS_DROP=seed is not None, PRECISION=precision, BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip
    launch.beside = _numbers(facts, places, K)
    return launch


def outer(
    g: Tensor,  # (M, R)
    x: Tensor,  # (M, K), dtype of g
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
) -> Tensor:  # (R, K), dtype given or that of x
    """g.T @ drop(x), summed over the M rows, and over those of ``more``"""
    (M, R), K = g.shape, x.shape[1]
    out = tl_utils.empty((R, K), dtype or x.dtype, x)
    if M == 0 and not more:
        return out.zero_()
    seed, (tensors, places) = dropping(p, seed), _rows(more)
    launch = prepared(_outer, (g, x, out, seed, *tensors), places, p, dot_precision(x.dtype))
    columns, strips, _ = launch.grid
    part = tl_utils.empty((strips if strips > 1 else 0, R, K), torch.float32, x)
    tickets = tl_utils.tickets(columns, x)
    jobs = _jobs(tensors, launch.beside)
    launch(x, part.data_ptr() | tickets.data_ptr(), g, x, out, part, tickets, seed, jobs)
    return out


def _rows(more: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """Four tensors for each of ``more``, V (None of row numbers), its weight, its row numbers and dz; and its place"""
    tensors: list[Any] = []
    places = []
    for (of, V, weight, columns), factor, dz, at, first in more:
        own = V is None is columns
        tensors += factor if own else V, weight, columns, dz
        places.append((of, own, at, first))
    return tensors, tuple(places)


def _numbers(facts: Sequence[Any], places: Sequence[tuple[str, bool, int, int]], dim: int) -> list[tuple[Any, ...]]:
    """The numbers of each job"""
    return [sum_numbers(place, facts[4 * i : 4 * i + 4], dim) for i, place in enumerate(places)]


def _jobs(tensors: Sequence[Any], numbers: Sequence[tuple[Any, ...]]) -> tuple[tuple[Any, ...], ...]:
    """The jobs of the tensors of ``_rows``"""
    four = iter(tensors)
    return tuple([(*own, *job) for *own, job in zip(four, four, four, four, numbers, strict=True)])


@triton.jit(do_not_specialize=["M", "steps"])
def _project_outer_kernel(
    x_ptr, up_ptr, h_ptr, g_ptr, out_ptr, g_part_ptr, out_part_ptr, tickets_ptr, d_ptr, jobs, scale,
    M, K, stride_xm, stride_xk, stride_uk, stride_ur, stride_hm, stride_hr, steps,
    R: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g (M, R) = scale * (x (M, K) @ up (K, R) + h @ (d + d.T)) and out (K, R) = x.T @ h (M, R)

    By way of g_part (C, M, R), one of each block of columns, and out_part (S, K, R), one of each strip of rows. Each of
    ``jobs`` is a strip more of out.
    """
    pid_k = tl.program_id(0)
    strip = tl.program_id(1)
    columns, strips = tl.num_programs(0), tl.num_programs(1)
    own = strips - len(jobs)  # those of x
    offs_r = tl.arange(0, BLOCK_R)
    offs_k = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_m = strip * steps * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_r = offs_r < R
    mask_k = offs_k < K
    k = offs_k.to(tl.int64)
    up_ptrs = up_ptr + k[:, None] * stride_uk + (offs_r % R).to(tl.int64)[None, :] * stride_ur
    up = tl.load(up_ptrs, mask=mask_k[:, None], other=0.0)
    up = cast(up, x_ptr.dtype.element_ty)
    x_ptrs = x_ptr + offs_m.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    h_ptrs += (offs_r % R).to(tl.int64)[None, :] * stride_hr
    size_g = M * tl.cast(R, tl.int64)
    g_ptrs = g_part_ptr + pid_k * size_g + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    rounds = steps
    for j in tl.static_range(len(jobs)):
        if strip == own + j:
            part = out_part_ptr + strip * (K * tl.cast(R, tl.int64))
            sum_rows(
                jobs[j], part, 1, R, offs_r, R, pid_k * BLOCK_K, x_ptr.dtype.element_ty, PRECISION, BLOCK_K
            )  # fmt: skip
            rounds = 0
    for step in range(0, rounds):
        mask_m = offs_m < M
        h = tl.load(h_ptrs, mask=mask_m[:, None], other=0.0)
        if EVEN_K:
            x = tl.load(x_ptrs, mask=mask_m[:, None], other=0.0)
        else:
            x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        # in this order: the other way round ptxas makes each MMA of sm_90 wait for the one before it
        acc = dot(tl.trans(x), h, acc, PRECISION)
        g = dot(x, up, tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), PRECISION)
        rows = tl.arange(0, BLOCK_M) < M - (strip * steps + step) * BLOCK_M  # not mask_m: that spilt 8 bytes on sm_120
        tl.store(g_ptrs, g, mask=rows[:, None] & mask_r[None, :])
        offs_m += BLOCK_M
        x_ptrs += BLOCK_M * tl.cast(stride_xm, tl.int64)
        h_ptrs += BLOCK_M * tl.cast(stride_hm, tl.int64)
        g_ptrs += BLOCK_M * R
    offs_out = k[:, None] * R + offs_r[None, :]
    mask_out = (offs_k < K)[:, None] & (offs_r < R)[None, :]
    size_out = K * tl.cast(R, tl.int64)
    if len(jobs) == 0:
        tl.store(out_part_ptr + strip * size_out + offs_out, acc, mask=mask_out)
    else:
        limit = tl.where(strip < own, R, 0)
        tl.store(out_part_ptr + strip * size_out + offs_out, acc, mask=mask_out & (offs_r < limit)[None, :])
    if last_to_come(tickets_ptr + pid_k, strips):
        total = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
        for s in range(0, strips):
            total += tl.load(out_part_ptr + s * size_out + offs_out, mask=mask_out, other=0.0, cache_modifier=".cg")
        tl.store(out_ptr + offs_out, narrow(total, out_ptr.dtype.element_ty), mask=mask_out)
    if len(jobs) > 0:
        if strip >= own:
            return
    if last_to_come(tickets_ptr + columns + strip, columns):
        offs_m = strip * steps * BLOCK_M + tl.arange(0, BLOCK_M)
        for _ in range(0, steps):
            offs_g = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
            mask_g = (offs_m < M)[:, None] & (offs_r < R)[None, :]
            g = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
            for c in range(0, columns):
                g += tl.load(g_part_ptr + c * size_g + offs_g, mask=mask_g, other=0.0, cache_modifier=".cg")
            if d_ptr is not None:
                g = add_started(g, h_ptr, offs_m, M, stride_hm, stride_hr, d_ptr, offs_r, R)
            tl.store(g_ptr + offs_g, narrow(g * scale, g_ptr.dtype.element_ty), mask=mask_g)
            offs_m += BLOCK_M


#: Bytes that a card moves in the time of one launch: 2 us at 2 TB/s.
LAUNCH_BYTES = 4 << 20


def sweep_pays(M: int, K: int, R: int, columns: int, strips: int, itemsize: int) -> bool:
    """Whether the partial sums, written and read once, cost less than a second read of x in a launch of its own"""
    return 2 * 4 * R * (columns * M + strips * K) < itemsize * M * K + LAUNCH_BYTES


def _project_outer(*given: Any) -> Launch | None:
    """The launch of ``project_outer``: x, up, h, d, four facts for each of the jobs, their places, the dtype of out and
    the precision

    None where two passes are cheaper.
    """
    x, up, h, _, *facts, places, _, precision = given
    (M, K), (_, R) = x.shape, up.shape
    assert up.shape == (K, R) and h.shape == (M, R)
    assert x.dtype in FLOATS and h.dtype == x.dtype
    BLOCK_R = pad_rank(R, most=64)  # above, two passes are cheaper than the partial sums
    tile = tile_for("project_outer", x.device, x.dtype.itemsize, BLOCK_R)
    columns = triton.cdiv(K, tile["BLOCK_K"])
    strips, steps = strips_of(M, tile["BLOCK_M"], columns, 128 - len(places) * columns)
    if R > BLOCK_R or not sweep_pays(M, K, R, columns, strips, x.dtype.itemsize):
        return None
    if tiles.arch_of(x.device) not in (86, 89):  # there two a multiprocessor are one wave of 128
        tile["maxnreg"] = MOST_REGISTERS
    launch = Launch(
        _project_outer_kernel, [columns, strips + len(places)],
        M=M, K=K, stride_xm=x.stride[0], stride_xk=x.stride[1], stride_uk=up.stride[0], stride_ur=up.stride[1],
        stride_hm=h.stride[0], stride_hr=h.stride[1], steps=steps,
        R=R, EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=precision, BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip
    launch.beside = _numbers(facts, places, K)
    return launch


def sweep(
    x: Tensor,  # (M, K)
    up: Tensor,  # (K, R)
    h: Tensor,  # (M, R), dtype of x
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
    start: Tensor | None = None,  # (R, R) float32
) -> tuple[Tensor, Tensor] | None:  # (M, R), dtype of x; (K, R), dtype given or that of x
    """``project_outer`` in one pass over x; None where two are cheaper"""
    (M, K), R, dtype = x.shape, up.shape[1], dtype or x.dtype
    tensors, places = _rows(more)
    given = (x, up, h, start, *tensors)
    launch = prepared(_project_outer, given, places, dtype, dot_precision(x.dtype)) if M else None
    if launch is None:
        return None
    columns, strips, _ = launch.grid
    g, out = tl_utils.empty((M, R), x.dtype, x), tl_utils.empty((K, R), dtype, x)
    g_part = tl_utils.empty((columns, M, R), torch.float32, x)
    out_part = tl_utils.empty((strips, K, R), torch.float32, x)
    tickets = tl_utils.tickets(columns + strips, x)
    scratch = g.data_ptr() | out.data_ptr() | g_part.data_ptr() | out_part.data_ptr() | tickets.data_ptr()
    jobs = _jobs(tensors, launch.beside)
    launch(x, scratch, x, up, h, g, out, g_part, out_part, tickets, start, jobs, float(scale))
    return g, out
