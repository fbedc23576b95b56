"""The skinny pass over x that makes h, and the products that penalties want beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .launcher import VERSION, Facts, Launch, prepared
from .rows import (
    GRAM_GROUP,
    PRODUCT_ROWS,
    add_started,
    gram,
    product,
    product_blocks,
    product_numbers,
    product_parts,
    product_programs,
)
from .sums import outer, sweep
from .tiles import for_two, tile_for
from .tl_utils import (
    FLOATS,
    MOST_BLOCK,
    cast,
    dot,
    dot_precision,
    drop,
    dropping,
    narrow,
    pad_rank,
    pair_key,
    row_key,
    threshold_of,
    widen,
)


@triton.jit
def skinny(
    acc, x_ptr, down_ptr, seed_ptr, offs_m, offs_r, M, K, stride_xm, stride_xk, stride_dr, stride_dk, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, BY_REGISTERS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + (drop(x (M, K)) @ down (R, K).T)[offs_m, offs_r]"""
    offs_k = tl.arange(0, BLOCK_K)
    # rows and ranks past the end wrap around: they are computed from real data and never stored
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_xm
    x_ptrs += offs_k.to(tl.int64)[None, :] * stride_xk
    down_ptrs = down_ptr + (offs_r % R).to(tl.int64)[None, :] * stride_dr
    down_ptrs += offs_k.to(tl.int64)[:, None] * stride_dk
    if HAS_DROP:
        rows = row_key(seed_ptr, offs_m)
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
        if BY_REGISTERS and down.dtype == x.dtype:
            down = tl.where((offs_r < R)[None, :], down, tl.zeros_like(down))
        acc = dot(x, cast(down, x.dtype), acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        down_ptrs += BLOCK_K * tl.cast(stride_dk, tl.int64)
    return acc


@triton.jit
def _project_block(
    block, x_ptr, down_ptr, h_ptr, seed_ptr, start_ptr, d_ptr, grams, part_ptr, tickets_ptr, scale,
    M, K, stride_xm, stride_xk, stride_dr, stride_dk, stride_hm, stride_hr, stride_sm, stride_sr, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, BY_REGISTERS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One block of h, and of h.T @ h"""
    # programs of the same rows are neighbours, so that all but the first find them in L2
    blocks_r: tl.constexpr = (R + BLOCK_R - 1) // BLOCK_R
    pid_m = block // blocks_r
    pid_r = block % blocks_r
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if d_ptr is not None:
        acc = add_started(acc, start_ptr, offs_m, M, stride_sm, stride_sr, d_ptr, offs_r, R)
    acc = skinny(
        acc, x_ptr, down_ptr, seed_ptr, offs_m, offs_r, M, K, stride_xm, stride_xk, stride_dr, stride_dk, threshold,
        R, HAS_DROP, BY_REGISTERS, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * stride_hm
    h_ptrs += offs_r.to(tl.int64)[None, :] * stride_hr
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    h = narrow(acc * scale, h_ptr.dtype.element_ty)
    tl.store(h_ptrs, h, mask=mask)
    if len(grams) > 0:
        h = narrow(tl.where(mask, widen(h), 0.0), h_ptr.dtype.element_ty)
        gram(h, h, grams, part_ptr, tickets_ptr, pid_m, tl.cdiv(M, BLOCK_M), R, PRECISION, BLOCK_R)


@triton.jit(do_not_specialize=["M", "threshold"])
def _project_kernel(
    x_ptr, down_ptr, h_ptr, seed_ptr, start_ptr, d_ptr, jobs, grams, part_ptr, tickets_ptr, scale,
    M, K, stride_xm, stride_xk, stride_dr, stride_dk, stride_hm, stride_hr, stride_sm, stride_sr, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, BY_REGISTERS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h (M, R) = scale * (drop(x (M, K)) @ down (R, K).T + start (M, R) @ (d + d.T)), a block of rows a program

    The first programs make the products of ``jobs``; what else there is adds up h.T @ h for ``grams``.
    """
    pid = tl.program_id(0)
    if len(jobs) == 0:
        _project_block(
            pid, x_ptr, down_ptr, h_ptr, seed_ptr, start_ptr, d_ptr, grams, part_ptr, tickets_ptr, scale,
            M, K, stride_xm, stride_xk, stride_dr, stride_dk, stride_hm, stride_hr, stride_sm, stride_sr, threshold,
            R, HAS_DROP, BY_REGISTERS, EVEN_K, PRECISION, BLOCK_R, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    else:
        first = 0
        for j in tl.static_range(len(jobs)):
            blocks = product_blocks(jobs[j], BLOCK_R)
            programs = blocks * product_parts(jobs[j])
            if (pid >= first) & (pid < first + programs):
                product(
                    jobs[j], pid - first, part_ptr, tickets_ptr, x_ptr.dtype.element_ty, PRECISION, BLOCK_R, BLOCK_K
                )  # fmt: skip
            first += programs
            if jobs[j][13] is not None:
                part_ptr += programs * (PRODUCT_ROWS * BLOCK_R)
                tickets_ptr += blocks
        if pid >= first:
            _project_block(
                pid - first, x_ptr, down_ptr, h_ptr, seed_ptr, start_ptr, d_ptr, grams, part_ptr, tickets_ptr, scale,
                M, K, stride_xm, stride_xk, stride_dr, stride_dk, stride_hm, stride_hr, stride_sm, stride_sr,
                threshold, R, HAS_DROP, BY_REGISTERS, EVEN_K, PRECISION, BLOCK_R, BLOCK_M, BLOCK_K,
            )  # fmt: skip


def by_registers(tile: dict[str, Any], dropout: bool) -> bool:
    """Whether a factor in the activations' dtype goes to its product through registers, as those of others do

    Straight from shared memory, ptxas makes each wgmma of sm_90 wait for the one before where x comes from registers,
    and of Triton 3.6 where two groups of warps share the product.
    """
    return dropout or (VERSION < (3, 7) and tile["num_warps"] > 4)


def _project(*given: Any) -> Launch:
    """The launch of ``project``: x, down, h, seed, start, d, four facts for each of the rows; then plain values

    Of each of the rows its layer, whether it joins those before it, and what it is of; the layers' ranks, p, the
    precision.
    """
    x, down, h, seed, start, d, *facts, layout, ranks, p, precision = given
    (M, K), (R, _) = x.shape, down.shape
    assert down.shape == (R, K) and x.dtype in FLOATS and x.device == down.device
    assert d is None or (start.shape == (M, R) and start.dtype == x.dtype and d.shape == (R, R))
    BLOCK_R = pad_rank(R)
    tile = tile_for("project", x.device, x.dtype.itemsize, BLOCK_R)
    programs = triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(R, BLOCK_R)
    products = _products(layout, ranks, facts, x)
    jobs = [job for _, job in products.jobs if job is not None]
    if layout:  # of one program a multiprocessor, those of the jobs would be a second wave
        tile = for_two(tile, x.device, x.dtype.itemsize, BLOCK_R, down.dtype.itemsize)
    if jobs:
        cuts = [product_programs(job, BLOCK_R) for job in jobs]
        programs += sum(blocks * parts for blocks, parts in cuts)
        cuts = [(blocks, parts) for blocks, parts in cuts if parts > 1]
        area = PRODUCT_ROWS.value * BLOCK_R * sum(blocks * parts for blocks, parts in cuts)
        products = products._replace(area=area, counters=sum(blocks for blocks, _ in cuts))
    launch = Launch(
        _project_kernel, [programs],
        M=M, K=K, stride_xm=x.stride[0], stride_xk=x.stride[1], stride_dr=down.stride[0], stride_dk=down.stride[1],
        stride_hm=h.stride[0], stride_hr=h.stride[1], stride_sm=start.stride[0] if start else 0,
        stride_sr=start.stride[1] if start else 0, threshold=threshold_of(p),
        R=R, HAS_DROP=seed is not None, BY_REGISTERS=by_registers(tile, seed is not None),
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=precision, BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip
    launch.beside = products
    return launch


class _Products(NamedTuple):
    """Where the products of a call's terms go."""

    sizes: list[tuple[int, int]]  # of each tensor of products
    jobs: list[tuple[int, Any]]  # of each of the rows: its tensor, and its numbers, None if it is h.T @ h
    grams: list[tuple[int, int, int, int]]  # its tensor, its first row there, its first rank, its ranks
    area: int = 0  # of those that are made in parts: elements of the parts, and their counters
    counters: int = 0


def _products(layout: Any, ranks: Sequence[int], facts: Sequence[Any], x: Facts) -> _Products:
    made, at, some = _Products([], [], []), 0, iter(facts)
    for layer, joins, of in layout:
        R = ranks[layer]
        at = at if joins else 0
        four = [next(some) for _ in range(4)]
        numbers = None if of == "hidden" else product_numbers(of, four, at, x)
        if numbers is None:
            made.grams.append((len(made.sizes) - joins, at, sum(ranks[:layer]), R))
        made.jobs.append((len(made.sizes) - joins, numbers))
        at += R if numbers is None else numbers[1]
        if joins:
            made.sizes[-1] = at, R
        else:
            made.sizes.append((at, R))
    return made


def project(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    start: tuple[Tensor, Tensor] | None = None,  # (M, R), dtype of x; (R, R) float32
) -> Tensor:  # (M, R), dtype of x
    """h = scale * (drop(x) @ down.T + h0 @ (d + d.T)), the second only if ``start`` has h0 and d"""
    h = tl_utils.empty((x.shape[0], down.shape[0]), x.dtype, x)
    if x.shape[0]:
        seed = dropping(p, seed)
        tensors = (x, down, h, seed, *(start or (None, None)))
        launch = prepared(_project, tensors, (), (), p, dot_precision(x.dtype))
        launch(x, 0, *tensors, (), (), None, None, float(scale))
    return h


def project_terms(
    x: Tensor,  # (M, K)
    downs: Sequence[Tensor],  # (R_i, K)
    ups: Sequence[Tensor],  # (N_i, R_i)
    terms: Sequence[Any],  # ``Term``s of forgetless.ops.rows
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> tuple[Tensor, list[Tensor]]:  # (M, sum of R_i), dtype of x; (sum of k, R_i) each, float32
    """h = scale * drop(x) @ [down_1 .. down_n].T, and what the terms want (see ``Term``), in one launch

    Of more than 128 ranks together, h.T @ h is a launch of its own.
    """
    down = downs[0] if len(downs) == 1 else torch.cat(list(downs))
    M, R = x.shape[0], down.shape[0]
    h = tl_utils.empty((M, R), x.dtype, x)
    tensors, layout = [x, down, h, dropping(p, seed), None, None], []
    for layer, some, joins in terms:
        for of, V, weight, columns in some:
            tensors += V, weight, columns, ups[layer] if of == "up" else downs[layer]
            layout.append((layer, joins, of))
            joins = True
    values = tuple(layout), tuple([one.shape[0] for one in downs])
    launch = prepared(_project, tensors, *values, p, dot_precision(x.dtype))
    sizes, numbers, places, area, counters = launch.beside
    zs = [tl_utils.empty(size, torch.float32, x) for size in sizes]
    grams = [(zs[i], *place) for i, *place in places]
    jobs, fours = [], iter(tensors[6:])
    for V, weight, columns, factor, (i, job) in zip(fours, fours, fours, fours, numbers, strict=True):
        if job is not None:
            jobs.append((factor if V is None is columns else V, weight, columns, factor, *job, zs[i]))
    apart = grams if M == 0 or R > MOST_BLOCK else []
    grams = [] if apart else grams
    if M or jobs:
        part, tickets, scratch = None, None, 0
        for z in zs:
            scratch |= z.data_ptr()
        if grams:
            blocks = triton.cdiv(M, launch.named["BLOCK_M"])
            groups = triton.cdiv(blocks, GRAM_GROUP.value)
            area += (blocks + groups) * R * R
            counters += 1 + groups
        if area:
            part, tickets = tl_utils.empty((area,), torch.float32, x), tl_utils.tickets(counters, x)
            scratch |= part.data_ptr() | tickets.data_ptr()
        launch(x, scratch, *tensors[:6], tuple(jobs), tuple(grams), part, tickets, float(scale))
    for out, at, first, own in apart:
        rows = h.narrow(1, first, own)
        out.narrow(0, at, own).copy_(outer(rows, rows, dtype=torch.float32))
    return h, zs


def project_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    h: Tensor,  # (M, R), dtype of dy
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
    start: Tensor | None = None,  # (R, R) float32
) -> tuple[Tensor, Tensor]:  # (M, R), dtype of dy; (N, R), dtype given or that of dy
    """g = scale * (dy @ up + h @ (start + start.T)) and dup = dy.T @ h, and that over the rows of ``more``

    In one pass over dy where that saves time.
    """
    both = sweep(dy, up, h, scale, dtype, more, start)
    if both is not None:
        return both
    g = project(dy, up.t(), scale, start=None if start is None else (h, start))
    return g, outer(h, dy, 0.0, None, dtype, more).t()
