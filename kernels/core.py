"""The skinny passes of layers whose up is up @ core: the core is applied where h and dy @ up are made.

Forward a pass over x stores h and t = h @ core.T. Backward one over dy makes q = dy @ up, which stays
in registers, stores g = scale * q @ core and adds up q.T @ h. Nothing of the size of up is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .launcher import Launch, prepared
from .project import by_registers, project, skinny
from .rows import GRAM_GROUP, gram
from .sums import outer
from .tiles import tile_for
from .tl_utils import FLOATS, MOST_BLOCK, dot, dot_precision, dropping, narrow, pad_rank, threshold_of, widen


@triton.jit(do_not_specialize=["M", "threshold"])
def _project_core_kernel(
    x_ptr, down_ptr, h_ptr, t_ptr, saved_ptr, seed_ptr, cores, sums, part_ptr, tickets_ptr, scale, t_scale,
    M, K, stride_xm, stride_xk, stride_dr, stride_dk, stride_sm, stride_sr, threshold,
    R: tl.constexpr, HAS_DROP: tl.constexpr, BY_REGISTERS: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """h (M, R) = scale * drop(x (M, K)) @ down (R, K).T, t (M, R) = t_scale * h @ core, and for ``sums`` h.T @ saved

    Each of ``cores`` has ranks of its own: a pointer, the first of them, how many, and two strides.
    """
    dtype: tl.constexpr = t_ptr.dtype.element_ty
    block = tl.program_id(0)
    offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    acc = skinny(
        tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32),
        x_ptr, down_ptr, seed_ptr, offs_m, offs_r, M, K, stride_xm, stride_xk, stride_dr, stride_dk, threshold,
        R, HAS_DROP, BY_REGISTERS, EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    mask = (offs_m < M)[:, None] & (offs_r < R)[None, :]
    at = offs_m.to(tl.int64)[:, None] * R + offs_r[None, :]
    h = narrow(tl.where(mask, acc * scale, 0.0), dtype)
    if h_ptr is not None:
        tl.store(h_ptr + at, h, mask=mask)
    core = tl.zeros((BLOCK_R, BLOCK_R), dtype=tl.float32)  # of all layers, one block of it each
    for j in tl.static_range(len(cores)):
        r = offs_r - cores[j][1]
        inside = (r >= 0) & (r < cores[j][2])
        core_ptrs = cores[j][0] + r[:, None] * cores[j][3] + r[None, :] * cores[j][4]
        core += widen(tl.load(core_ptrs, mask=inside[:, None] & inside[None, :], other=0.0))
    t = dot(h, narrow(core, dtype), tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), PRECISION)
    tl.store(t_ptr + at, narrow(t * t_scale, dtype), mask=mask)
    if saved_ptr is not None:
        saved_ptrs = saved_ptr + offs_m.to(tl.int64)[:, None] * stride_sm + offs_r.to(tl.int64)[None, :] * stride_sr
        saved = tl.load(saved_ptrs, mask=mask, other=0.0)
        gram(h, saved, sums, part_ptr, tickets_ptr, block, tl.cdiv(M, BLOCK_M), R, PRECISION, BLOCK_R)


def _project_core(*given: Any) -> Launch:
    """The launch: x, down, h, t, saved, seed, what is known of the cores, p and the precision"""
    x, down, _, t, saved, seed, cores, p, precision = given
    (M, K), (R, _) = x.shape, down.shape
    assert down.shape == (R, K) and t.shape == (M, R) and x.dtype in FLOATS and sum(core[1] for core in cores) == R
    assert saved is None or saved.shape == (M, R) and saved.dtype == x.dtype
    BLOCK_R = pad_rank(R)
    tile = tile_for("project", x.device, x.dtype.itemsize, BLOCK_R)
    if len(cores) > 1:  # 63 ranks of 3 layers take 246 registers of 4 warps, 144 of 8
        tile["num_warps"] = max(tile["num_warps"], BLOCK_R // 8)
    return Launch(
        _project_core_kernel, [triton.cdiv(M, tile["BLOCK_M"])],
        M=M, K=K, stride_xm=x.stride[0], stride_xk=x.stride[1], stride_dr=down.stride[0], stride_dk=down.stride[1],
        stride_sm=0 if saved is None else saved.stride[0], stride_sr=0 if saved is None else saved.stride[1],
        threshold=threshold_of(p), R=R, HAS_DROP=seed is not None, BY_REGISTERS=by_registers(tile, seed is not None),
        EVEN_K=K % tile["BLOCK_K"] == 0, PRECISION=precision, BLOCK_R=BLOCK_R, **tile,
    )  # fmt: skip


def _cores(cores: Sequence[Tensor], back: bool) -> tuple[Any, Any]:
    """The cores as the kernel gets them, and what a launch may depend on of them"""
    jobs, keys, first = [], [], 0
    for core in cores:
        R, (out, into) = core.shape[0], core.stride()
        ranks = first, R, *((out, into) if back else (into, out))
        jobs.append((core, *ranks))
        keys.append((*ranks, core.dtype, core.data_ptr() % 16, core.device))
        first += R
    return tuple(jobs), tuple(keys)


def project_core(
    x: Tensor,  # (M, K)
    downs: Sequence[Tensor],  # (R_i, K)
    cores: Sequence[Tensor],  # (R_i, R_i)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> tuple[Tensor, Tensor]:  # (M, sum of R_i) each, dtype of x
    """h = scale * drop(x) @ [down_1 .. down_n].T and [h_1 @ core_1.T .. h_n @ core_n.T], each rounded

    In one launch, but for many ranks together.
    """
    down = downs[0] if len(downs) == 1 else torch.cat(list(downs))
    M, R = x.shape[0], down.shape[0]
    seed = dropping(p, seed)
    if R > _most_ranks(x, seed is not None or len(cores) > 1):
        h = project(x, down, scale, p, seed)
        parts = h.split_with_sizes([core.shape[0] for core in cores], 1)
        ts = [part @ core.to(h.dtype).t() for part, core in zip(parts, cores, strict=True)]
        return h, ts[0] if len(ts) == 1 else torch.cat(ts, 1)
    h, t = tl_utils.empty((M, R), x.dtype, x), tl_utils.empty((M, R), x.dtype, x)
    if M:
        jobs, keys = _cores(cores, False)
        launch = prepared(_project_core, (x, down, h, t, None, seed), keys, p, dot_precision(x.dtype))
        launch(x, 0, x, down, h, t, None, seed, jobs, (), None, None, float(scale), 1.0)
    return h, t


def _most_ranks(x: Tensor, costly: bool) -> int:
    """Ranks that a program has registers for; of more, the product with the core is the vendor's.

    ``costly`` are a mask, siblings and a sum: of 128 ranks ptxas serialises the wgmma of sm_90, sm_80 spills, and the
    partial sums are larger than what they save.
    """
    return 32 if x.dtype == torch.float32 else 64 if costly else MOST_BLOCK


def project_core_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    core: Tensor,  # (R, R)
    h: Tensor | None,  # (M, R), dtype of dy; None if dcore is not needed
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # (M, R), dtype of dy; (R, R), dtype given or that of dy
    """g = scale * q @ core and dcore = q.T @ h, of q = dy @ up, rounded

    In one launch, but for many ranks.
    """
    M, R = dy.shape[0], core.shape[0]
    if R > _most_ranks(dy, True) or M == 0:
        q = project(dy, up.t())
        g = torch.addmm(q.new_empty(()), q, core.to(q.dtype), beta=0, alpha=scale)
        return g, None if h is None else outer(q, h, dtype=dtype)
    g, dcore, part, tickets, scratch = tl_utils.empty((M, R), dy.dtype, dy), None, None, None, 0
    jobs, keys = _cores([core], True)
    launch = prepared(_project_core, (dy, up.t(), None, g, h, None), keys, 0.0, dot_precision(dy.dtype))
    sums: tuple[Any, ...] = ()
    if h is not None:
        blocks = launch.grid[0]
        groups = triton.cdiv(blocks, GRAM_GROUP.value)
        dcore = tl_utils.empty((R, R), torch.float32, dy)
        part, tickets = tl_utils.empty((blocks + groups, R, R), torch.float32, dy), tl_utils.tickets(1 + groups, dy)
        scratch, sums = dcore.data_ptr() | part.data_ptr() | tickets.data_ptr(), ((dcore, 0, 0, R),)
    launch(dy, scratch, dy, up.t(), None, g, h, None, jobs, sums, part, tickets, 1.0, float(scale))
    return g, None if dcore is None else dcore.to(dtype or dy.dtype)
