"""The rows of each token, which went through several experts, weighed and summed in one launch, in one order."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .launcher import Facts, Launch, prepared
from .tl_utils import FLOATS, narrow, widen


@triton.jit(do_not_specialize=["T"])
def _grouped_sum_kernel(
    y_ptr, weights_ptr, places_ptr, out_ptr, T, N, stride_ym, stride_yn,
    TOP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out (T, N) = sum over j of weights[places[:, j]] * y[places[:, j]], places (T, TOP)"""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < T
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for j in tl.static_range(TOP):
        places = tl.load(places_ptr + offs_m.to(tl.int64) * TOP + j, mask=mask_m, other=0).to(tl.int64)
        y_ptrs = y_ptr + places[:, None] * stride_ym + offs_n.to(tl.int64)[None, :] * stride_yn
        y = widen(tl.load(y_ptrs, mask=mask, other=0.0))
        if weights_ptr is not None:
            y *= widen(tl.load(weights_ptr + places, mask=mask_m, other=0.0))[:, None]
        acc += y
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, narrow(acc, out_ptr.dtype.element_ty), mask=mask)


def _grouped_sum(y: Facts, weights: Facts | None, places: Facts, out: Facts) -> Launch:
    (T, N), (S, _), M, COLUMNS = out.shape, y.shape, 4, 256
    assert places.shape == (S,) and places.stride == (1,) and y.dtype in FLOATS and S % T == 0
    assert weights is None or weights.shape == (S,) and weights.stride == (1,)
    return Launch(
        _grouped_sum_kernel, [triton.cdiv(T, M), triton.cdiv(N, COLUMNS)],
        T=T, N=N, stride_ym=y.stride[0], stride_yn=y.stride[1], TOP=S // T, BLOCK_M=M, BLOCK_N=COLUMNS, num_warps=4,
    )  # fmt: skip


def grouped_sum(
    y: Tensor,  # (S, N)
    rows: Any,  # ``Rows`` of forgetless.ops.grouped
    weights: Tensor | None = None,  # (S,), any floating dtype
) -> Tensor:  # (T, N), dtype of y
    """out_t = sum of weights_s * y_s over the rows s of token t, in at least float32, rounded once"""
    out = tl_utils.empty((rows.size, y.shape[1]), y.dtype, y)
    if out.numel():
        weights = None if weights is None else weights.contiguous()
        operands = (y, weights, rows.places, out)
        prepared(_grouped_sum, operands)(y, 0, *operands)
    return out
