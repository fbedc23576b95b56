"""The dropout mask as a matrix, for what cannot make it in its own loop."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tl_utils
from .launcher import Facts, Launch, prepared
from .tl_utils import LOW_BITS, mix, pair_key, row_key, threshold_of

ROWS, PAIRS = 16, 64  # of a program


@triton.jit(do_not_specialize=["M", "threshold"])
def _keep_bits_kernel(
    seed_ptr, bits_ptr, M, width, threshold, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """bits (M, width) int32: in each half of a word all ones to keep one column, zeros to drop it"""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    word = mix(row_key(seed_ptr, offs_m)[:, None] + pair_key(seed_ptr, offs_k)[None, :])
    low = tl.where((word & LOW_BITS) >= threshold, 0xFFFF, 0)
    high = tl.where(((word >> 16) & LOW_BITS) >= threshold, -65536, 0)
    ptrs = bits_ptr + offs_m.to(tl.int64)[:, None] * width + offs_k[None, :]
    tl.store(ptrs, low | high, mask=(offs_m < M)[:, None] & (offs_k < width)[None, :])


def _keep_bits(seed: Facts, bits: Facts, p: float) -> Launch:
    (M, width), grid = bits.shape, [triton.cdiv(bits.shape[0], ROWS), triton.cdiv(bits.shape[1], PAIRS)]
    assert seed.dtype == torch.int32 and seed.shape == (2,) and seed.stride == (1,)
    return Launch(
        _keep_bits_kernel, grid, M=M, width=width, threshold=threshold_of(p), BLOCK_M=ROWS, BLOCK_K=PAIRS, num_warps=4
    )


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """The mask of dropout, as words that drop a 16-bit number by one AND: one launch"""
    bits = tl_utils.empty((M, (K + 1) // 2), torch.int32, seed)
    if bits.numel():
        prepared(_keep_bits, (seed, bits), p)(seed, 0, seed, bits)
    return bits.view(torch.int16)[:, :K]
