"""The GEMM whose accumulator takes the low-rank product: on pointers, and on tensor descriptors (sm_90, sm_100)."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles, tl_utils
from .tiles import has_row, tile_for
from .tl_utils import (
    FLOATS,
    dot,
    dot_precision,
    drop_args,
    grouped,
    launching,
    lowrank_start,
    narrow,
    pad_rank,
    parts_of,
    widen,
)


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


@triton.jit(do_not_specialize=["threshold"])
def _matmul_lowrank_descriptor_kernel(
    x_desc, weight_desc, y_desc,
    M, N, K,
    h_ptr, stride_hm, stride_hr,
    up_ptr, stride_un, stride_ur,
    bias_ptr, stride_b,
    seed_ptr, threshold,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROP: tl.constexpr, TRANSPOSED: tl.constexpr,
    PROGRAMS: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = x (M, K) @ weight (N, K).T + bias (N,) + drop(h (M, R) @ up (N, R).T), many tiles a program"""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    # Not flattened: with the accumulator started from the low-rank product, a flattened loop waits for each MMA on
    # sm_90 (wait_group 0 instead of 1). Not specialised out here either: Triton 3.7 drops the stores and 3.8 and 3.9
    # the whole kernel on sm_100. Specialising the inner loop compiles whole in 3.6 to 3.9; sm_90 ignores it.
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS):
        pid_m, pid_n = grouped(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        acc = lowrank_start(
            h_ptr, offs_m, M, stride_hm, stride_hr,
            up_ptr, pid_n * BLOCK_N, N, stride_un, stride_ur,
            seed_ptr, threshold, y_desc.dtype, R, HAS_DROP, "ieee", BLOCK_R, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        for k in tl.range(0, steps, warp_specialize=True):
            x = x_desc.load([pid_m * BLOCK_M, k * BLOCK_K])
            if TRANSPOSED:
                w = weight_desc.load([k * BLOCK_K, pid_n * BLOCK_N])
            else:
                w = weight_desc.load([pid_n * BLOCK_N, k * BLOCK_K]).T
            acc = dot(x, w, acc, "ieee")
        # two halves through one staging buffer: half the shared memory of the whole tile
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        if HAS_BIAS:  # by halves too: of the whole tile, it spilt on sm_100 with Triton 3.9
            offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
            left += widen(tl.load(bias_ptr + (offs_n % N).to(tl.int64) * stride_b))[None, :]
            right += widen(tl.load(bias_ptr + ((offs_n + BLOCK_N // 2) % N).to(tl.int64) * stride_b))[None, :]
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N], narrow(left, y_desc.dtype))
        y_desc.store([pid_m * BLOCK_M, pid_n * BLOCK_N + BLOCK_N // 2], narrow(right, y_desc.dtype))


def describable(t: Tensor) -> bool:
    """Whether a tensor descriptor can name this matrix: rows of contiguous elements, every row 16-byte aligned"""
    row, element = t.stride()
    return (
        element == 1
        and row >= t.shape[1]
        and row * t.element_size() % 16 == 0
        and t.data_ptr() % 16 == 0
        and min(t.shape) > 0
    )


@functools.cache
def programs_of(device: torch.device) -> int:
    """One program for each multiprocessor"""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


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
    stored = weight.stride(1) == 1  # as a linear layer does; its transpose is dx's weight
    kernel = "matmul_lowrank" if stored else "matmul_lowrank_t"
    dropout = p > 0.0 and seed is not None
    low_rank = (h, *h.stride(), up, *up.stride(), bias, 0 if bias is None else bias.stride(0))
    descriptor = has_row(kernel + "_descriptor", x.device) and x.element_size() == 2 and R <= 128
    if descriptor and all(map(describable, (x, weight if stored else weight.T, y))):
        # sm_100 takes the low-rank product in one block: of a chain of them Triton makes an empty kernel
        BLOCK_R = pad_rank(R, most=128 if tiles.arch_of(x.device) >= 100 else 64)
        tile = tile_for(kernel + "_descriptor", x.device, x.element_size(), BLOCK_R)
        BM, BN, BK = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
        described = TensorDescriptor.from_tensor
        programs = min(triton.cdiv(M, BM) * triton.cdiv(N, BN), programs_of(x.device))
        with launching(kernel + "_descriptor", x):
            _matmul_lowrank_descriptor_kernel[programs,](
                described(x, [BM, BK]),
                described(weight, [BN, BK]) if stored else described(weight.T, [BK, BN]),
                described(y, [BM, BN // 2]),
                M, N, K, *low_rank,
                R=R, HAS_BIAS=bias is not None, TRANSPOSED=not stored, PROGRAMS=programs,
                PARTS=parts_of(BN, dropout), BLOCK_R=BLOCK_R, GROUP_M=8, **drop_args(p, seed), **tile,
            )  # fmt: skip
        return y
    BLOCK_R = pad_rank(R, most=64 if R <= 128 else 32)
    tile = tile_for(kernel, x.device, x.element_size(), BLOCK_R)
    grid = (triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"]),)
    with launching(kernel, x):
        _matmul_lowrank_kernel[grid](
            x, M, K, *x.stride(),
            weight, N, *weight.stride(), *low_rank,
            y, *y.stride(),
            R=R, HAS_BIAS=bias is not None, EVEN_K=K % tile["BLOCK_K"] == 0,
            PRECISION=dot_precision(x.dtype), PARTS=parts_of(tile["BLOCK_N"], dropout),
            BLOCK_R=BLOCK_R, GROUP_M=8, **drop_args(p, seed), **tile,
        )  # fmt: skip
    return y
