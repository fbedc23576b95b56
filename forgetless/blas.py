"""The low-rank linear layer on the machine's own BLAS, by in-place accumulation.

Same names and signatures as ``forgetless.reference``. This is the CPU path, and on other devices the path wherever the
fused kernels do not run. Nothing of size (M, N) or (M, K) is written beside the results and, under dropout, one
bit mask that is rebuilt from the seed and thrown away.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor
from torch.nn.functional import linear

from .reference import LEVELS, MIX_1, MIX_2, drop_threshold, mask_keys

# Hash words made at a time: both scratch arrays stay in a core's cache.
_CHUNK = 1 << 17

# `matmul_lowrank` and `outer` of one backward pass want the same mask: the first leaves it here, the second takes it.
_last = threading.local()


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """``reference.keep_mask`` as all-ones or all-zeros words, so that one bitwise AND drops a 16-bit number."""
    row, pair = mask_keys(seed, M, K)
    width = pair.shape[1]
    bits = torch.empty(M, width, dtype=torch.int32, device=seed.device)
    step = max(1, _CHUNK // max(width, 1))
    scratch = torch.empty(min(step, M), width, dtype=torch.int32, device=seed.device)
    for start in range(0, M, step):
        word = bits[start : start + step]
        shifted = scratch[: word.shape[0]]
        torch.add(row[start : start + step], pair, out=word)
        word.bitwise_xor_(torch.bitwise_right_shift(word, 16, out=shifted)).mul_(MIX_1)
        word.bitwise_xor_(torch.bitwise_right_shift(word, 15, out=shifted)).mul_(MIX_2)
        word.bitwise_xor_(torch.bitwise_right_shift(word, 16, out=shifted))
        half = word.view(torch.int16)
        # kept iff half >= threshold, i.e. threshold - 1 - half is negative: its sign, spread over the word
        half.bitwise_and_(LEVELS - 1).neg_().add_(drop_threshold(p) - 1).bitwise_right_shift_(15)
    return bits.view(torch.int16)[:, :K]


def _drop_(x: Tensor, bits: Tensor) -> Tensor:
    """Zero the dropped elements of x in place."""
    if x.element_size() == 2 and x.is_contiguous():
        x.view(torch.int16).bitwise_and_(bits)
    else:
        x.mul_(bits.to(x.dtype).neg_())
    return x


def _dropped(x: Tensor, bits: Tensor) -> Tensor:
    if x.element_size() == 2 and x.is_contiguous():
        return torch.bitwise_and(x.view(torch.int16), bits).view(x.dtype)
    return _drop_(x.clone(memory_format=torch.contiguous_format), bits)


def project(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, R), dtype of x
    """h = scale * drop(x) @ down.T"""
    if seed is not None and p > 0.0:
        x = _dropped(x, keep_bits(seed, p, *x.shape))
    h = x.new_empty(x.shape[0], down.shape[0])
    return torch.addmm(h, x, down.to(x.dtype).T, beta=0, alpha=scale, out=h)


def matmul_lowrank(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K), dtype of x
    h: Tensor,  # (M, R), dtype of x
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, N), dtype of x
    """y = x @ weight.T + bias + drop(h @ up.T)"""
    up = up.to(x.dtype)
    if seed is None or p == 0.0:
        return linear(x, weight, bias).addmm_(h, up.T)
    bits = keep_bits(seed, p, x.shape[0], weight.shape[0])
    _last.mask = (seed, p, bits)
    y = _drop_(h @ up.T, bits)  # the low-rank term first: the big product then accumulates onto it in place
    if bias is not None:
        y.add_(bias)
    return y.addmm_(x, weight.T)


def outer(
    g: Tensor,  # (M, R)
    x: Tensor,  # (M, K), dtype of g
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    dtype: torch.dtype | None = None,
) -> Tensor:  # (R, K), dtype given or that of x
    """g.T @ drop(x), summed over the M rows"""
    if seed is not None and p > 0.0:
        last_seed, last_p, bits = _last.__dict__.pop("mask", (None, 0.0, None))
        if last_seed is not seed or last_p != p or bits.shape != x.shape:
            bits = keep_bits(seed, p, *x.shape)
        x = _dropped(x, bits)
    return (g.T @ x).to(dtype or x.dtype)


def project_outer(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    h: Tensor,  # (M, R), dtype of x
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # (M, R), dtype of x; (R, K), dtype given or that of x
    """g = scale * x @ down.T and out = h.T @ x.

    The second is laid out as the transpose of a
    contiguous (K, R), the layout of the factor whose gradient it is.
    """
    return project(x, down, scale), (x.T @ h).to(dtype or x.dtype).T


def linear_lowrank(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K), dtype of x
    down: Tensor,  # (R, K)
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    drop_output: bool = False,
    plan: str = "split",
) -> tuple[Tensor, Tensor]:  # (M, N) and (M, R), dtype of x
    """h = scale * drop(x) @ down.T, y = x @ weight.T + bias + h @ up.T; drop_output drops h @ up.T in place of x"""
    h = project(x, down, scale, *((0.0, None) if drop_output else (p, seed)))
    return matmul_lowrank(x, weight, h, up, bias, *((p, seed) if drop_output else (0.0, None))), h
