"""The whole forward of the layer in one launch (plans full and once), and all that the kernels offer, as one module.

``__all__`` has the names and signatures of ``forgetless.ops.reference``.

Arguments, results and dtypes are its own too, but for float64, which the kernels do not take. A launcher asserts what
it builds on (shapes, dtypes, one device); what users pass has been checked by ``fl.ops.lowrank_linear``, with errors
that name the argument.

Safe to capture in a CUDA graph, on any stream: a launcher never waits for the card and reads nothing back from it.
What it decides (plan, tile, strips) follows from sizes, dtypes and strides alone; the dropout's seed is read by the
kernel, so a replay after the generator moved on drops anew; memory comes from torch's caching allocator
(``tl_utils.empty``), which a capture gives a pool of its own; the tickets and flags of the plan ``once`` are cleared
by a recorded memset before each launch, so that a replay starts as the first run did. Only compiling is out of place
there: run the layer once before capturing, as torch asks of every graph.

Two runs give the same bits: no float is ever added atomically, and partial sums are added in the order of rows. How
rows are cut into strips depends on sizes and tiles, never on the card or on what it does beside. Offsets are 64 bits
wide. Byte counts of the kernels are in closed form in ``bench/static.py`` and asserted in
``tests/triton_kernels/test_bytes.py``, those of experts in ``test_grouped.py`` beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles, tl_utils
from .core import project_core, project_core_outer
from .grouped import grouped_dx_and_ddown, grouped_matmul_lowrank, grouped_outer, grouped_project, grouped_rows
from .grouped_sum import grouped_sum
from .launcher import Facts, Launch, prepared
from .mask import keep_bits
from .matmul_lowrank import MOST_RANKS, add_products, matmul_lowrank, most_pairs
from .project import project, project_outer, project_terms
from .sums import outer
from .tiles import tile_for
from .tl_utils import (
    cast,
    dot,
    dot_precision,
    drop,
    dropping,
    grouped,
    narrow,
    pad_rank,
    pair_key,
    parts_of,
    row_key,
    threshold_of,
    widen,
)

PLANS = ("split", "full", "once")

__all__ = [
    "PLANS",
    "dx_and_ddown",
    "grouped_dx_and_ddown",
    "grouped_matmul_lowrank",
    "grouped_outer",
    "grouped_project",
    "grouped_rows",
    "grouped_sum",
    "keep_bits",
    "linear_lowrank",
    "matmul_lowrank",
    "outer",
    "project",
    "project_core",
    "project_core_outer",
    "project_outer",
    "project_terms",
]


def dx_and_ddown(
    dys: Sequence[Tensor | None],  # (M, N_i) each; None adds no product with the weight
    weights: Sequence[Tensor | None],  # (N_i, K)
    g: Tensor,  # (M, sum of R_i)
    downs: Sequence[Tensor],  # (R_i, K)
    x: Tensor | None,  # (M, K); None if ddown is not needed
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    *,
    need_dx: bool = True,
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
) -> tuple[Tensor | None, Tensor | None]:  # dx (M, K), dtype of g; ddown (sum of R_i, K), dtype given or that of x
    """dx = sum_i dy_i @ weight_i + drop(g @ down), three in a launch where the card can, and ddown as of ``outer``"""
    dx: Tensor | None = None
    if need_dx:
        count, step, at = len(downs), 1, 0
        if count > 1 and len({weight.stride(1) == 1 for weight in weights if weight is not None}) < 2:
            # of more ranks together the GEMM would leave its descriptors
            step = min(most_pairs(g.device), max(1, MOST_RANKS // max(down.shape[0] for down in downs)))
        for first in range(0, count, step):
            down = downs[first] if min(step, count - first) == 1 else torch.cat(list(downs[first : first + step]))
            part = g if step >= count else g.narrow(1, at, down.shape[0])
            at += down.shape[0]
            pairs: list[Tensor] = []
            for i in range(first, min(first + step, count)):
                dy, weight = dys[i], weights[i]
                if dy is not None and weight is not None:
                    pairs += dy, weight
            if not pairs:
                pairs = [g.new_empty(g.shape[0], 0), g.new_empty(0, down.shape[1])]
            term = add_products(pairs, part, down, p, seed)
            dx = term if dx is None else dx.add_(term)
    return dx, None if x is None else outer(g, x, p, seed, dtype, more)


@triton.jit
def _step(x_ptrs, w_ptrs, offs_k, left, EVEN_K: tl.constexpr):
    """One block of x and of the weight, with ``left`` columns left"""
    if EVEN_K:
        x = tl.load(x_ptrs)
        w = tl.load(w_ptrs)
    else:
        x = tl.load(x_ptrs, mask=(offs_k < left)[None, :], other=0.0)
        w = tl.load(w_ptrs, mask=(offs_k < left)[:, None], other=0.0)
    return x, w


@triton.jit
def _product(
    x_ptrs, stride_xk, w_ptrs, stride_wk, K,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T of one tile"""
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        x, w = _step(x_ptrs, w_ptrs, offs_k, K - step * BLOCK_K, EVEN_K)
        acc = dot(x, w, acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    return acc


@triton.jit
def _both_products(
    x_ptrs, stride_xk, w_ptrs, stride_wk, K,
    down_ptr, stride_dr, stride_dk, seed_ptr, threshold, rows, scale,
    R: tl.constexpr, DROP: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T and scale * drop(x) @ down.T of one tile, from one read of x"""
    offs_k = tl.arange(0, BLOCK_K)
    offs_r = tl.arange(0, BLOCK_R)
    down_ptrs = down_ptr + (offs_r % R).to(tl.int64)[None, :] * stride_dr
    down_ptrs += offs_k.to(tl.int64)[:, None] * stride_dk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    low = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    if DROP:
        key = row_key(seed_ptr, rows)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        x, w = _step(x_ptrs, w_ptrs, offs_k, K - step * BLOCK_K, EVEN_K)
        if EVEN_K:
            down = tl.load(down_ptrs)
        else:
            down = tl.load(down_ptrs, mask=(offs_k < K - step * BLOCK_K)[:, None], other=0.0)
        acc = dot(x, w, acc, PRECISION)
        if DROP:
            pairs = pair_key(seed_ptr, step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2))
            x = drop(x, key, pairs, threshold)
        low = dot(x, cast(down, x.dtype), low, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
        down_ptrs += BLOCK_K * tl.cast(stride_dk, tl.int64)
    low = tl.where((offs_r < R)[None, :], low, 0.0)
    return acc, narrow(low * scale, x_ptrs.dtype.scalar.element_ty)


@triton.jit
def _finish(
    acc, low, offs_m, M, first_n, N,
    up_ptr, stride_un, stride_ur, bias_ptr, stride_b, y_ptr, stride_ym, stride_yn,
    seed_ptr, threshold,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """y = acc + bias + drop(low @ up.T) for WIDTH columns from first_n on"""
    if PARTS > 1:  # one after the other: the mask of a whole 128x256 tile spills, on sm_100 that of a half
        HALF: tl.constexpr = WIDTH // 2
        left, right = acc.reshape(BLOCK_M, 2, HALF).permute(0, 2, 1).split()
        _finish(
            left, low, offs_m, M, first_n, N, up_ptr, stride_un, stride_ur, bias_ptr, stride_b,
            y_ptr, stride_ym, stride_yn, seed_ptr, threshold,
            R, HAS_BIAS, DROP, PRECISION, BLOCK_R, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        _finish(
            right, low, offs_m, M, first_n + HALF, N, up_ptr, stride_un, stride_ur, bias_ptr, stride_b,
            y_ptr, stride_ym, stride_yn, seed_ptr, threshold,
            R, HAS_BIAS, DROP, PRECISION, BLOCK_R, BLOCK_M, HALF, PARTS // 2,
        )  # fmt: skip
        return
    offs_r = tl.arange(0, BLOCK_R)
    offs_n = first_n + tl.arange(0, WIDTH)
    rows_n = (offs_n % N).to(tl.int64)
    up_ptrs = up_ptr + rows_n[None, :] * stride_un + offs_r.to(tl.int64)[:, None] * stride_ur
    up = cast(tl.load(up_ptrs, mask=(offs_r < R)[:, None], other=0.0), low.dtype)
    if DROP:
        term = dot(low, up, tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32), PRECISION)
        pairs = pair_key(seed_ptr, first_n // 2 + tl.arange(0, WIDTH // 2))
        acc += drop(term, row_key(seed_ptr, offs_m), pairs, threshold)
    else:
        acc = dot(low, up, acc, PRECISION)
    if HAS_BIAS:
        acc += widen(tl.load(bias_ptr + rows_n * stride_b))[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
    tl.store(y_ptrs, narrow(acc, y_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@triton.jit(do_not_specialize=["M", "threshold"])
def _linear_lowrank_kernel(
    x_ptr, weight_ptr, down_ptr, up_ptr, bias_ptr, y_ptr, h_ptr, flags_ptr, seed_ptr, scale,
    M, N, K, stride_xm, stride_xk, stride_wn, stride_wk, stride_dr, stride_dk, stride_un, stride_ur, stride_b,
    stride_ym, stride_yn, threshold,
    R: tl.constexpr, ONCE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROP: tl.constexpr, DROP_Y: tl.constexpr,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h = scale * drop(x (M, K)) @ down (R, K).T, y (M, N) = x @ weight (N, K).T + bias + h @ up (N, R).T"""
    # ONCE: the first column of tiles makes h, every other tile waits for its rows of it, after its own K loop. This
    # cannot hang, however blocks are scheduled: a tile is known by a ticket drawn when its block already runs, the
    # makers hold the first tickets, and a maker never waits. Whoever waits, waits for running blocks that finish.
    if ONCE:
        ticket = tl.atomic_add(flags_ptr, 1, sem="relaxed")
        makers = tl.cdiv(M, BLOCK_M)
        maker = ticket < makers
        rest = tl.maximum(ticket - makers, 0)
        rest_m, rest_n = grouped(rest, M, tl.maximum(N - BLOCK_N, 1), BLOCK_M, BLOCK_N, GROUP_M)
        pid_m = tl.where(maker, ticket, rest_m)
        pid_n = tl.where(maker, 0, rest_n + 1)
    else:
        pid_m, pid_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_n = pid_n * BLOCK_N
    offs_r = tl.arange(0, BLOCK_R)
    k = tl.arange(0, BLOCK_K).to(tl.int64)
    rows_n = ((first_n + tl.arange(0, BLOCK_N)) % N).to(tl.int64)
    x_ptrs = x_ptr + (offs_m % M).to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    w_ptrs = weight_ptr + rows_n[None, :] * stride_wn + k[:, None] * stride_wk
    h_ptrs = h_ptr + offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    mask_h = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    if ONCE:
        if maker:
            acc, low = _both_products(
                x_ptrs, stride_xk, w_ptrs, stride_wk, K, down_ptr, stride_dr, stride_dk,
                seed_ptr, threshold, offs_m, scale, R, HAS_DROP and not DROP_Y, EVEN_K, PRECISION,
                BLOCK_R, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            tl.store(h_ptrs, low, mask=mask_h)
            tl.debug_barrier()  # every thread's part of h is written before one thread says so
            tl.atomic_xchg(flags_ptr + 1 + pid_m, 1, sem="release")
        else:
            acc = _product(
                x_ptrs, stride_xk, w_ptrs, stride_wk, K, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
            )  # fmt: skip
            while tl.atomic_add(flags_ptr + 1 + pid_m, 0, sem="acquire") == 0:
                pass
            # past L1, which knows nothing of other multiprocessors' writes
            low = tl.load(h_ptrs, mask=mask_h, other=0.0, cache_modifier=".cg")
    else:
        acc, low = _both_products(
            x_ptrs, stride_xk, w_ptrs, stride_wk, K, down_ptr, stride_dr, stride_dk,
            seed_ptr, threshold, offs_m, scale, R, HAS_DROP and not DROP_Y, EVEN_K, PRECISION,
            BLOCK_R, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if pid_n == 0:
            tl.store(h_ptrs, low, mask=mask_h)
    _finish(
        acc, low, offs_m, M, first_n, N, up_ptr, stride_un, stride_ur, bias_ptr, stride_b,
        y_ptr, stride_ym, stride_yn, seed_ptr, threshold,
        R, HAS_BIAS, HAS_DROP and DROP_Y, PRECISION, BLOCK_R, BLOCK_M, BLOCK_N, PARTS,
    )  # fmt: skip


def _linear_lowrank(
    x: Facts, weight: Facts, down: Facts, up: Facts, bias: Facts | None, y: Facts, h: Facts, seed: Facts | None,
    p: float, precision: str, drop_output: bool, plan: str,
) -> Launch:  # fmt: skip
    (M, K), (N, _), (R, _) = x.shape, weight.shape, down.shape
    assert weight.shape == (N, K) and down.shape == (R, K) and up.shape == (N, R) and weight.dtype == x.dtype
    BLOCK_R = pad_rank(R)
    tile = tile_for(plan, x.device, x.dtype.itemsize, BLOCK_R)
    return Launch(
        _linear_lowrank_kernel, [triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])],
        M=M, N=N, K=K, stride_xm=x.stride[0], stride_xk=x.stride[1], stride_wn=weight.stride[0],
        stride_wk=weight.stride[1], stride_dr=down.stride[0], stride_dk=down.stride[1], stride_un=up.stride[0],
        stride_ur=up.stride[1], stride_b=0 if bias is None else bias.stride[0],
        stride_ym=y.stride[0], stride_yn=y.stride[1], threshold=threshold_of(p),
        R=R, ONCE=plan == "once", HAS_BIAS=bias is not None, HAS_DROP=seed is not None, DROP_Y=drop_output,
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=precision,
        PARTS=parts_of(tile["BLOCK_N"], drop_output and seed is not None, tiles.arch_of(x.device)),
        BLOCK_R=BLOCK_R, GROUP_M=8, **tile,
    )  # fmt: skip


def linear_lowrank(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K), dtype of x
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    *,
    drop_output: bool = False,
    plan: str = "split",
) -> tuple[Tensor, Tensor]:  # (M, N) and (M, R), dtype of x
    """h = scale * drop(x) @ down.T, y = x @ weight.T + bias + h @ up.T; drop_output drops h @ up.T in place of x"""
    M, N, R = x.shape[0], weight.shape[0], down.shape[0]
    assert plan in PLANS
    if plan == "split" or M == 0 or R > 64:  # a second accumulator of more ranks spills
        h = project(x, down, scale, *((0.0, None) if drop_output else (p, seed)))
        return matmul_lowrank(x, weight, h, up, bias, *((p, seed) if drop_output else (0.0, None))), h
    y = tl_utils.empty((M, N), x.dtype, x)
    h = tl_utils.empty((M, R), x.dtype, x)
    seed = dropping(p, seed)
    tensors = (x, weight, down, up, bias, y, h, seed)
    launch = prepared(_linear_lowrank, tensors, p, dot_precision(x.dtype), drop_output, plan)
    flags = None
    if plan == "once":  # a ticket counter and a flag for each block of rows
        rows = triton.cdiv(M, launch.named["BLOCK_M"])
        flags = tl_utils.empty((1 + rows,), torch.int32, x).zero_()
    scratch = 0 if flags is None else flags.data_ptr()
    launch(x, scratch, x, weight, down, up, bias, y, h, flags, seed, float(scale))
    return y, h
