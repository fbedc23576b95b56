"""The low-rank linear layer on the machine's own BLAS, by in-place accumulation.

Same names and signatures as ``forgetless.ops.reference``. This is the CPU path, and on other devices the path wherever
the fused kernels do not run. Nothing of size (M, N) or (M, K) is written beside the results and, under dropout, one
bit mask that is rebuilt from the seed and thrown away. Sums are accumulated by ``out=``, into memory allocated here: so
tools that watch products see them, and none is changed that a tool may keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .each_expert import grouped_of
from .reference import (
    LEVELS,
    MIX_1,
    MIX_2,
    PAIRS,
    drop_threshold,
    linear_lowrank_of,
    mix,
    project_terms_of,
)
from .rows import add_pulled, started

# Hash words made at a time: both scratch arrays stay in a core's cache.
_CHUNK = 1 << 18

#: By type of device, what makes ``keep_bits`` there in one launch; ``dispatch`` enters the kernel of CUDA.
MASK_MAKERS: dict[str, Callable[[Tensor, float, int, int], Tensor]] = {}


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """``reference.keep_mask`` as all-ones or all-zeros words, so that one bitwise AND drops a 16-bit number."""
    device = seed.device
    if device.type in MASK_MAKERS:
        return MASK_MAKERS[device.type](seed, p, M, K)
    width = (K + 1) // 2
    constants = _constants(device)
    count = torch.arange(max(M, width), dtype=torch.int32, device=device)
    keys = torch.bitwise_xor(torch.stack([mix(count), mix(count ^ PAIRS)]), seed[:, None])
    _mixed(keys, torch.empty_like(keys), constants)
    row, pair = keys[0, :M, None], keys[1, :width]
    (low, by_fifteen), keep = constants[4:], _scalar(drop_threshold(p) - 1, torch.int16, device)
    bits = torch.empty(M, width, dtype=torch.int32, device=device)
    step = max(1, _CHUNK // max(width, 1))
    scratch = torch.empty(min(step, M), width, dtype=torch.int32, device=device)
    for start in range(0, M, step):
        word, left = (bits, scratch) if step >= M else (bits[start : start + step], scratch[: M - start])
        torch.add(row[start : start + step], pair, out=word)
        _mixed(word, left, constants)
        half = word.view(torch.int16)
        # kept iff half >= threshold, i.e. threshold - 1 - half is negative: its sign, spread over the word
        half.bitwise_and_(low)
        torch.sub(keep, half, out=half).bitwise_right_shift_(by_fifteen)
    return bits.view(torch.int16)[:, :K]


def _mixed(v: Tensor, scratch: Tensor, constants: tuple[Tensor, ...]) -> None:
    """``reference.mix`` in place, the scalars in the dtype of v: a Python number would be converted every time."""
    sixteen, mix_1, fifteen, mix_2 = constants[:4]
    v.bitwise_xor_(torch.bitwise_right_shift(v, sixteen, out=scratch)).mul_(mix_1)
    v.bitwise_xor_(torch.bitwise_right_shift(v, fifteen, out=scratch)).mul_(mix_2)
    v.bitwise_xor_(torch.bitwise_right_shift(v, sixteen, out=scratch))


def _constants(device: torch.device) -> tuple[Tensor, ...]:
    words = [_scalar(value, torch.int32, device) for value in (16, MIX_1, 15, MIX_2)]
    return (*words, _scalar(LEVELS - 1, torch.int16, device), _scalar(15, torch.int16, device))


def _scalar(value: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Filled on the device: ``torch.tensor`` copies from the host, which waits and cannot be captured in a graph."""
    return torch.full((), value, dtype=dtype, device=device)


def as_dtype(t: Tensor, dtype: torch.dtype) -> Tensor:
    """t.to(dtype), without the microseconds that it takes to find out that there is nothing to do."""
    return t if t.dtype == dtype else t.to(dtype)


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
    start: tuple[Tensor, Tensor] | None = None,  # (M, R), dtype of x; (R, R), float32 or float64
) -> Tensor:  # (M, R), dtype of x
    """h = scale * (drop(x) @ down.T + h0 @ (d + d.T)), the second only if ``start`` has h0 and d"""
    if seed is not None and p > 0.0:
        x = _dropped(x, keep_bits(seed, p, *x.shape))
    down = as_dtype(down, x.dtype).t()
    h = torch.mm(x, down) if scale == 1.0 else torch.addmm(x.new_empty(()), x, down, beta=0, alpha=scale)
    return h if start is None else h.add_(started(*start), alpha=scale)


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
    if not h.shape[1] and bias is None:
        return torch.mm(x, weight.t())
    up = as_dtype(up, x.dtype)
    y = x.new_empty(x.shape[0], weight.shape[0])
    if bias is not None and (seed is None or p == 0.0):  # the large product adds the bias for nothing
        torch.addmm(bias, x, weight.t(), out=y)
        return torch.addmm(y, h, up.t(), out=y)
    # the low-rank term first: it is the smaller one, and what the large product rounds is the sum
    torch.mm(h, up.t(), out=y)
    if seed is not None and p > 0.0:
        _drop_(y, keep_bits(seed, p, x.shape[0], weight.shape[0]))
        if bias is not None:
            y.add_(bias)
    return torch.addmm(y, x, weight.t(), out=y)


def outer(
    g: Tensor,  # (M, R)
    x: Tensor,  # (M, K), dtype of g
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
) -> Tensor:  # (R, K), dtype given or that of x
    """g.T @ drop(x), summed over the M rows, and over those of ``more``"""
    if seed is not None and p > 0.0:
        x = _dropped(x, keep_bits(seed, p, *x.shape))
    return add_pulled(as_dtype(torch.mm(g.t(), x), dtype or x.dtype), more)


def project_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    h: Tensor,  # (M, R), dtype of dy
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
    start: Tensor | None = None,  # (R, R)
) -> tuple[Tensor, Tensor]:  # (M, R), dtype of dy; (N, R), dtype given or that of dy
    """g = scale * (dy @ up + h @ (start + start.T)) and dup = dy.T @ h, and that over the rows of ``more``"""
    up = as_dtype(up, dy.dtype)
    g = torch.mm(dy, up) if scale == 1.0 else torch.addmm(dy.new_empty(()), dy, up, beta=0, alpha=scale)
    if start is not None:
        g.add_(started(h, start), alpha=scale)
    dup = as_dtype(torch.mm(dy.t(), h), dtype or dy.dtype)
    if more:
        add_pulled(dup.t(), more)
    return g, dup


def project_core(
    x: Tensor,  # (M, K)
    downs: Sequence[Tensor],  # (R_i, K)
    cores: Sequence[Tensor],  # (R_i, R_i)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> tuple[Tensor, Tensor]:  # (M, sum of R_i) each, dtype of x
    """h = scale * drop(x) @ [down_1 .. down_n].T and [h_1 @ core_1.T .. h_n @ core_n.T], each rounded"""
    if seed is not None and p > 0.0:
        x = _dropped(x, keep_bits(seed, p, *x.shape))
    down = as_dtype(downs[0] if len(downs) == 1 else torch.cat(list(downs)), x.dtype).t()
    h = torch.mm(x, down) if scale == 1.0 else torch.addmm(x.new_empty(()), x, down, beta=0, alpha=scale)
    if len(cores) == 1:
        return h, torch.mm(h, as_dtype(cores[0], x.dtype).t())
    parts = zip(h.split_with_sizes([len(core) for core in cores], 1), cores, strict=True)
    return h, torch.cat([torch.mm(part, as_dtype(core, x.dtype).t()) for part, core in parts], 1)


def project_core_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    core: Tensor,  # (R, R)
    h: Tensor | None,  # (M, R), dtype of dy; None if dcore is not needed
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # (M, R), dtype of dy; (R, R), dtype given or that of dy
    """g = scale * q @ core and dcore = q.T @ h, of q = dy @ up, rounded"""
    q, core = torch.mm(dy, as_dtype(up, dy.dtype)), as_dtype(core, dy.dtype)
    g = torch.mm(q, core) if scale == 1.0 else torch.addmm(dy.new_empty(()), q, core, beta=0, alpha=scale)
    return g, None if h is None else as_dtype(torch.mm(q.t(), h), dtype or dy.dtype)


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
    """dx = sum_i dy_i @ weight_i + drop(g @ down) and ddown = g.T @ drop(x), as ``outer``, with one mask

    dx is added to in place.
    """
    bits = None if seed is None or p == 0.0 else keep_bits(seed, p, g.shape[0], downs[0].shape[1])
    dx = ddown = None
    if need_dx:
        down = as_dtype(downs[0] if len(downs) == 1 else torch.cat(list(downs)), g.dtype)
        dx = torch.mm(g, down)  # first, alone, to be masked
        if bits is not None:
            _drop_(dx, bits)
        for dy, weight in zip(dys, weights, strict=True):
            if dy is not None and weight is not None:
                torch.addmm(dx, dy, weight, out=dx)
    if x is not None:
        ddown = as_dtype(torch.mm(g.t(), x if bits is None else _dropped(x, bits)), dtype or x.dtype)
        add_pulled(ddown, more)
    return dx, ddown


linear_lowrank = linear_lowrank_of(project, matmul_lowrank)
project_terms = project_terms_of(project)
grouped_rows, grouped_project, grouped_matmul_lowrank, grouped_outer, grouped_dx_and_ddown, grouped_sum = grouped_of(
    project, matmul_lowrank, outer, dx_and_ddown
)
