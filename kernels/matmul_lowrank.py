"""The GEMM whose accumulator takes the low-rank product: on pointers, and on tensor descriptors (sm_90, sm_100)."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import tiles, tl_utils
from .launcher import Facts, Launch, prepared
from .tiles import has_row, tile_for
from .tl_utils import (
    FLOATS,
    cast,
    dot,
    dot_precision,
    dropping,
    grouped,
    lowrank_start,
    narrow,
    pad_rank,
    parts_of,
    threshold_of,
    widen,
)

#: Products that one launch adds up at most: q, k and v.
MOST_PAIRS = 3
#: Ranks up to which it runs on descriptors.
MOST_RANKS = 128


@triton.jit
def add_product(
    acc, x_ptr, weight_ptr, rows_m, rows_n, K, stride_xm, stride_xk, stride_wn, stride_wk,
    EVEN_K: tl.constexpr, PRECISION: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """acc + x[rows_m] @ weight[rows_n].T"""
    offs_k = tl.arange(0, BLOCK_K)
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
        acc = dot(x, cast(w, x.dtype), acc, PRECISION)
        x_ptrs += BLOCK_K * tl.cast(stride_xk, tl.int64)
        w_ptrs += BLOCK_K * tl.cast(stride_wk, tl.int64)
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _matmul_lowrank_kernel(
    x_ptr, weight_ptr, x1_ptr, weight1_ptr, x2_ptr, weight2_ptr, y_ptr, h_ptr, up_ptr, bias_ptr, seed_ptr,
    M, N,
    K, stride_xm, stride_xk, stride_wn, stride_wk,
    K1, stride_xm1, stride_xk1, stride_wn1, stride_wk1,
    K2, stride_xm2, stride_xk2, stride_wn2, stride_wk2,
    stride_ym, stride_yn, stride_hm, stride_hr, stride_un, stride_ur, stride_b, threshold,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROP: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = sum of x (M, K) @ weight (N, K).T, up to three, + bias (N,) + drop(h (M, R) @ up (N, R).T)"""
    pid_m, pid_n = grouped(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
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
    acc = add_product(
        acc, x_ptr, weight_ptr, rows_m, rows_n, K, stride_xm, stride_xk, stride_wn, stride_wk,
        EVEN_K, PRECISION, BLOCK_K,
    )  # fmt: skip
    if x1_ptr is not None:
        acc = add_product(
            acc, x1_ptr, weight1_ptr, rows_m, rows_n, K1, stride_xm1, stride_xk1, stride_wn1, stride_wk1,
            EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
    if x2_ptr is not None:
        acc = add_product(
            acc, x2_ptr, weight2_ptr, rows_m, rows_n, K2, stride_xm2, stride_xk2, stride_wn2, stride_wk2,
            EVEN_K, PRECISION, BLOCK_K,
        )  # fmt: skip
    if HAS_BIAS:
        acc += widen(tl.load(bias_ptr + rows_n * stride_b))[None, :]
    y_ptrs = y_ptr + offs_m.to(tl.int64)[:, None] * stride_ym
    y_ptrs += offs_n.to(tl.int64)[None, :] * stride_yn
    y = narrow(acc, y_ptr.dtype.element_ty)
    rows = tl.arange(0, BLOCK_M) < M - pid_m * BLOCK_M  # not offs_m < M: that spilt 8 bytes on sm_80
    tl.store(y_ptrs, y, mask=rows[:, None] & (offs_n < N)[None, :])


@triton.jit
def _add_described(
    acc, x_desc, weight_desc, first_m, first_n, K, TRANSPOSED: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """acc + x @ weight.T of the tile that starts there"""
    # Specialising this loop compiles whole in Triton 3.6 to 3.9; sm_90 ignores it. See below for the outer one.
    for k in tl.range(0, tl.cdiv(K, BLOCK_K), warp_specialize=True):
        x = x_desc.load([first_m, k * BLOCK_K])
        if TRANSPOSED:
            w = weight_desc.load([k * BLOCK_K, first_n])
        else:
            w = weight_desc.load([first_n, k * BLOCK_K]).T
        acc = dot(x, w, acc, "ieee")
    return acc


@triton.jit(do_not_specialize=["M", "threshold"])
def _matmul_lowrank_descriptor_kernel(
    x_desc, weight_desc, x1_desc, weight1_desc, x2_desc, weight2_desc, y_desc, h_ptr, up_ptr, bias_ptr, seed_ptr,
    M, N, K, K1, K2, stride_hm, stride_hr, stride_un, stride_ur, stride_b, threshold,
    R: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROP: tl.constexpr, TRANSPOSED: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_R: tl.constexpr, GROUP_M: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y (M, N) = sum of x (M, K) @ weight (N, K).T, up to three, + bias + drop(h @ up.T), many tiles a program"""
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    # Not flattened: with the accumulator started from the low-rank product, a flattened loop waits for each MMA on
    # sm_90 (wait_group 0 instead of 1). Not specialised out here either: Triton 3.7 drops the stores and 3.8 and 3.9
    # the whole kernel on sm_100.
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0)):
        pid_m, pid_n = grouped(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        first_m, first_n = pid_m * BLOCK_M, pid_n * BLOCK_N
        acc = lowrank_start(
            h_ptr, first_m + tl.arange(0, BLOCK_M), M, stride_hm, stride_hr,
            up_ptr, first_n, N, stride_un, stride_ur,
            seed_ptr, threshold, y_desc.dtype, R, HAS_DROP, "ieee", BLOCK_R, BLOCK_M, BLOCK_N, PARTS,
        )  # fmt: skip
        acc = _add_described(acc, x_desc, weight_desc, first_m, first_n, K, TRANSPOSED, BLOCK_K)
        if x1_desc is not None:
            acc = _add_described(acc, x1_desc, weight1_desc, first_m, first_n, K1, TRANSPOSED, BLOCK_K)
        if x2_desc is not None:
            acc = _add_described(acc, x2_desc, weight2_desc, first_m, first_n, K2, TRANSPOSED, BLOCK_K)
        # two halves through one staging buffer: half the shared memory of the whole tile
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        if HAS_BIAS:  # by halves too: of the whole tile, it spilt on sm_100 with Triton 3.9
            offs_n = first_n + tl.arange(0, BLOCK_N // 2)
            left += widen(tl.load(bias_ptr + (offs_n % N).to(tl.int64) * stride_b))[None, :]
            right += widen(tl.load(bias_ptr + ((offs_n + BLOCK_N // 2) % N).to(tl.int64) * stride_b))[None, :]
        y_desc.store([first_m, first_n], narrow(left, y_desc.dtype))
        y_desc.store([first_m, first_n + BLOCK_N // 2], narrow(right, y_desc.dtype))


def describable(t: Facts, transposed: bool = False) -> bool:
    """Whether a tensor descriptor can name this matrix: rows of contiguous elements, every row 16-byte aligned"""
    (row, element), columns = t.stride, t.shape[1]
    if transposed:
        row, element, columns = element, row, t.shape[0]
    aligned = row * t.dtype.itemsize % 16 == 0 and t.alignment == 0
    return element == 1 and row >= columns and aligned and min(t.shape) > 0


def most_pairs(device: torch.device) -> int:
    """Products that one launch adds up there; of a second loop on descriptors Triton drops the stores on sm_100"""
    return 1 if 100 <= tiles.arch_of(device) < 110 else MOST_PAIRS


@functools.cache
def programs_of(device: torch.device) -> int:
    """One program for each multiprocessor"""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


def _turned(t: Facts) -> Facts:
    return t._replace(shape=t.shape[::-1], stride=t.stride[::-1])


def _add_products(h: Facts, up: Facts, bias: Facts | None, y: Facts, seed: Facts | None, *others: Any) -> Launch:
    """The launch of ``add_products``; ``others`` are x and weight of each product, turned, p and the precision"""
    *pairs, turned, p, precision = others
    xs, weights = pairs[::2], pairs[1::2]
    if turned:
        weights, up = [_turned(weight) for weight in weights], _turned(up)
    (M, N), R = y.shape, up.shape[1]
    dtype, device, itemsize, arch = y.dtype, y.device, y.dtype.itemsize, tiles.arch_of(y.device)
    assert h.shape == (M, R) and up.shape == (N, R) and dtype in FLOATS and h.dtype == dtype
    for x, weight in zip(xs, weights, strict=True):
        assert x.shape[0] == M and weight.shape == (N, x.shape[1]) and x.dtype == weight.dtype == dtype
    stored = weights[0].stride[1] == 1  # as a linear layer does; its transpose is dx's weight
    kernel = "matmul_lowrank" if stored else "matmul_lowrank_t"
    named: dict[str, Any] = {
        "M": M, "N": N, "stride_hm": h.stride[0], "stride_hr": h.stride[1],
        "stride_un": up.stride[0], "stride_ur": up.stride[1], "stride_b": 0 if bias is None else bias.stride[0],
        "threshold": threshold_of(p), "R": R, "HAS_BIAS": bias is not None, "HAS_DROP": seed is not None, "GROUP_M": 8,
    }  # fmt: skip
    for i, name in enumerate(("", "1", "2")):
        named[f"K{name}"] = xs[i].shape[1] if i < len(xs) else 0
    descriptor = has_row(kernel + "_descriptor", device) and itemsize == 2 and R <= MOST_RANKS and describable(y)
    if descriptor and all(map(describable, xs)) and all(describable(w, not stored) for w in weights):
        # sm_100 takes the low-rank product in one block: of a chain of them Triton makes an empty kernel. sm_90 takes
        # large ranks in small blocks: larger ones spill in dx
        BLOCK_R = pad_rank(R, most=128 if arch >= 100 else 64 if R <= 64 else 32)
        tile = tile_for(kernel + "_descriptor", device, itemsize, BLOCK_R)
        BM, BN, BK = tile["BLOCK_M"], tile["BLOCK_N"], tile["BLOCK_K"]
        return Launch(
            _matmul_lowrank_descriptor_kernel, [min(triton.cdiv(M, BM) * triton.cdiv(N, BN), programs_of(device))],
            ([BM, BK], [BN, BK] if stored else [BK, BN], [BM, BN // 2]),
            TRANSPOSED=not stored, PARTS=parts_of(BN, seed is not None, arch), BLOCK_R=BLOCK_R, **named, **tile,
        )  # fmt: skip
    # of float32, and an up that is stored by columns, 32 ranks at once spilt 112 bytes on sm_80
    BLOCK_R = pad_rank(R, most=16 if itemsize == 4 else 64 if R <= 128 else 32)
    tile = tile_for(kernel, device, itemsize, BLOCK_R)
    if len(xs) > 1 and tile["num_warps"] == 4:  # as few as Triton 3.6 takes by itself spilt on sm_86
        tile["maxnreg"] = tiles.MOST_REGISTERS
    for i, name in enumerate(("", "1", "2")):
        strides = (*xs[i].stride, *weights[i].stride) if i < len(xs) else (0, 0, 0, 0)
        named.update(zip([f"stride_{axis}{name}" for axis in ("xm", "xk", "wn", "wk")], strides, strict=True))
    return Launch(
        _matmul_lowrank_kernel, [triton.cdiv(M, tile["BLOCK_M"]) * triton.cdiv(N, tile["BLOCK_N"])],
        stride_ym=y.stride[0], stride_yn=y.stride[1], EVEN_K=all(x.shape[1] % tile["BLOCK_K"] == 0 for x in xs),
        PRECISION=precision, PARTS=parts_of(tile["BLOCK_N"], seed is not None, arch), BLOCK_R=BLOCK_R, **named, **tile,
    )  # fmt: skip


class _Described(TensorDescriptor):
    """One whose matrix was checked by ``describable`` when the launch was prepared, and is not checked again."""

    def __init__(self, base: Tensor, shape: Sequence[int], strides: Sequence[int], block_shape: list[int]):
        self.base, self.shape, self.strides, self.block_shape = base, shape, strides, block_shape


def _operands(launch: Launch, pairs: Sequence[Tensor], y: Tensor, turned: bool) -> list[Any]:
    """The kernel's first operands: the products' and y, as they are or by descriptors, of weights row by row"""
    absent = [None] * (2 * MOST_PAIRS - len(pairs))
    if not launch.blocks:
        return [*pairs, *absent, y]
    (of_x, of_weight, of_y), described = launch.blocks, []
    describe = TensorDescriptor if launch.compiled is None else _Described
    for x, weight in zip(pairs[::2], pairs[1::2], strict=True):
        shape, stride = weight.shape, weight.stride()
        if launch.named["TRANSPOSED"] != turned:
            shape, stride = shape[::-1], stride[::-1]
        described.append(describe(x, x.shape, x.stride(), of_x))
        described.append(describe(weight, shape, stride, of_weight))
    return [*described, *absent, describe(y, y.shape, y.stride(), of_y)]


def add_products(
    pairs: Sequence[Tensor],  # dy (M, N) and weight (N, K) of each product, N its own: one to MOST_PAIRS products
    g: Tensor,  # (M, R), dtype of dy
    down: Tensor,  # (R, K)
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, K), dtype of g
    """dx = sum of dy @ weight + drop(g @ down), rounded once; the weights all stored by rows, or by columns"""
    dx = tl_utils.empty((g.shape[0], down.shape[1]), g.dtype, g)
    if g.shape[0]:
        seed = dropping(p, seed)
        launch = prepared(_add_products, (g, down, None, dx, seed, *pairs), True, p, dot_precision(g.dtype))
        launch(g, 0, *_operands(launch, pairs, dx, True), g, down, None, seed)
    return dx


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
    y = tl_utils.empty((h.shape[0], up.shape[0]), h.dtype, h)
    if h.shape[0]:
        seed = dropping(p, seed)
        launch = prepared(_add_products, (h, up, bias, y, seed, x, weight), False, p, dot_precision(h.dtype))
        launch(h, 0, *_operands(launch, (x, weight), y, False), h, up, bias, seed)
    return y
