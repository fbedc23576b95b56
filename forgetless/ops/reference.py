"""The low-rank linear layer in plain torch: the truth every fast path is measured against.

Three products carry the forward and the backward of every method (see ``forgetless.ops`` for how they compose):

    h  = scale * drop(x) @ down.T             project
    y  = x @ weight.T + bias + drop(h @ up.T) matmul_lowrank
    dW = g.T @ drop(x)                        outer

``drop`` zeroes the elements that ``keep_mask`` says; it does not rescale, callers fold 1 / (1 - p) into ``scale``.
Products are taken in float32 (float64 for float64 inputs) and rounded once, to the dtype of the first argument.
The others are made of them; a kernel may do each in one launch. ``forgetless.ops.blas`` and
``forgetless_kernels.fused`` offer the same names with the same signatures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .each_expert import grouped_of
from .rows import products, pulled, started

# Multipliers of the two-round 32-bit integer hash "lowbias32" (C. Wellons, hash-prospector), as signed integers.
MIX_1 = 0x7FEB352D
MIX_2 = 0x846CA68B - (1 << 32)
# Sets the numbers of column pairs apart from those of rows: 2**32 over the golden ratio, as a signed integer.
PAIRS = 0x9E3779B9 - (1 << 32)
#: Keep probabilities are quantised to multiples of 2**-15: the hash gives 15 usable bits per element.
LEVELS = 1 << 15


def mix(v: Tensor) -> Tensor:
    """Hash int32 to int32. Shifts are arithmetic, as int32 shifts are in torch and in Triton: so mix(~v) == mix(v)."""
    v = (v ^ (v >> 16)) * MIX_1
    v = (v ^ (v >> 15)) * MIX_2
    return v ^ (v >> 16)


def drop_threshold(p: float) -> int:
    """The 15-bit hash value below which an element is dropped."""
    return round(p * LEVELS)


def keep_mask(
    seed: Tensor,  # (2,) int32
    p: float,
    M: int,
    K: int,
) -> Tensor:  # (M, K) bool
    """True where an element of an (M, K) matrix survives: it is dropped with probability ``p``.

    A pure function of (seed, row, column), so that the backward pass and every backend rebuild the same mask from
    eight bytes. One 32-bit hash serves two neighbouring columns: the low half the even one, the high half the odd one.
    """
    row, pair = mask_keys(seed, M, K)
    word = mix(row + pair)
    half = torch.stack((word, word >> 16), dim=-1).flatten(1)[:, :K]
    return (half & (LEVELS - 1)) >= drop_threshold(p)


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """``keep_mask`` as all-ones or all-zeros words, so that one bitwise AND drops a 16-bit number."""
    return -keep_mask(seed, p, M, K).to(torch.int16)


def mask_keys(seed: Tensor, M: int, K: int) -> tuple[Tensor, Tensor]:  # (M, 1) and (1, ceil(K / 2)) int32
    """Well mixed keys of the rows and of the column pairs; their sum is hashed once more per element."""
    rows = torch.arange(M, dtype=torch.int32, device=seed.device)
    pairs = torch.arange((K + 1) // 2, dtype=torch.int32, device=seed.device)
    row = mix(mix(rows) ^ seed[0])
    pair = mix(mix(pairs ^ PAIRS) ^ seed[1])
    return row[:, None], pair[None, :]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _drop(x: Tensor, p: float, seed: Tensor | None) -> Tensor:
    return x if seed is None or p == 0.0 else x * keep_mask(seed, p, *x.shape)


def project(
    x: Tensor,  # (M, K)
    down: Tensor,  # (R, K)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    start: tuple[Tensor, Tensor] | None = None,  # (M, R), dtype of x; (R, R), float32 or float64
) -> Tensor:  # (M, R), dtype of x
    """h = scale * (drop(x) @ down.T + h0 @ (d + d.T)), the second only if ``start`` has h0 and d

    Args:
        x: bfloat16, float16, float32 or float64, as in all of these; ``down`` is used in the dtype of ``x``.
        scale: a factor of the result, which ``drop`` does not rescale.
        p: probability of dropout, a multiple of 2**-15 below 1; 0 drops nothing.
        seed: of the mask of x, see ``keep_mask``; None drops nothing.
        start: an h and the gradient of its h.T @ h: what that adds to the gradient of h.

    Raises:
        RuntimeError: shapes do not fit. What users pass is checked before, by ``fl.ops.lowrank_linear``.
    """
    wide = _wide(x.dtype)
    h = _drop(x, p, seed).to(wide) @ down.to(x.dtype).to(wide).T
    return (scale * (h if start is None else h + started(*start).to(wide))).to(x.dtype)


def matmul_lowrank(
    x: Tensor,  # (M, K)
    weight: Tensor,  # (N, K), dtype of x
    h: Tensor,  # (M, R), dtype of x
    up: Tensor,  # (N, R)
    bias: Tensor | None = None,  # (N,)
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> Tensor:  # (M, N), dtype of x
    """y = x @ weight.T + bias + drop(h @ up.T), rounded once

    Forward of the layer with ``h`` of ``project``; of dy, weight.T, g and down.T it is its dx. The mask is one of the
    result. Dtypes and errors as of ``project``.
    """
    wide = _wide(x.dtype)
    y = x.to(wide) @ weight.to(wide).T
    if bias is not None:
        y = y + bias.to(wide)
    return (y + _drop(h.to(wide) @ up.to(x.dtype).to(wide).T, p, seed)).to(x.dtype)


def outer(
    g: Tensor,  # (M, R)
    x: Tensor,  # (M, K), dtype of g
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
) -> Tensor:  # (R, K), dtype given or that of x
    """g.T @ drop(x), summed over the M rows, and over those of ``more``: the gradients of both factors

    Mask, dtypes and errors as of ``project``; ``dtype`` is that of the result, the sum's own is at least float32.
    """
    wide = _wide(x.dtype)
    out = g.to(wide).T @ _drop(x, p, seed).to(wide)
    for one in more:  # out of place, for what torch vectorises
        part = pulled(one).to(wide)
        out = out + torch.nn.functional.pad(part, (0, 0, one.first, len(out) - one.first - len(part)))
    return out.to(dtype or x.dtype)


def project_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    h: Tensor,  # (M, R), dtype of dy
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    more: Sequence[Any] = (),  # ``More``s of forgetless.ops.rows
    start: Tensor | None = None,  # (R, R)
) -> tuple[Tensor, Tensor]:  # (M, R), dtype of dy; (N, R), dtype given or that of dy
    """g = scale * (dy @ up + h @ (start + start.T)) and dup = dy.T @ h, and that over the rows of ``more``

    ``project`` and ``outer`` of one matrix, which a kernel then reads once.
    """
    g = project(dy, up.t(), scale, start=None if start is None else (h, start))
    return g, outer(h, dy, dtype=dtype, more=more).t()


def project_core(
    x: Tensor,  # (M, K)
    downs: Sequence[Tensor],  # (R_i, K)
    cores: Sequence[Tensor],  # (R_i, R_i)
    scale: float = 1.0,
    p: float = 0.0,
    seed: Tensor | None = None,  # (2,) int32
) -> tuple[Tensor, Tensor]:  # (M, sum of R_i) each, dtype of x
    """h = scale * drop(x) @ [down_1 .. down_n].T and [h_1 @ core_1.T .. h_n @ core_n.T], each rounded"""
    wide = _wide(x.dtype)
    h = project(x, torch.cat([down.to(x.dtype) for down in downs]), scale, p, seed)
    parts = zip(h.to(wide).split_with_sizes([len(core) for core in cores], 1), cores, strict=True)
    return h, torch.cat([part @ core.to(x.dtype).to(wide).T for part, core in parts], 1).to(x.dtype)


def project_core_outer(
    dy: Tensor,  # (M, N)
    up: Tensor,  # (N, R)
    core: Tensor,  # (R, R)
    h: Tensor | None,  # (M, R), dtype of dy; None if dcore is not needed
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # (M, R), dtype of dy; (R, R), dtype given or that of dy
    """g = scale * q @ core and dcore = q.T @ h, of q = dy @ up, rounded"""
    wide = _wide(dy.dtype)
    q = (dy.to(wide) @ up.to(dy.dtype).to(wide)).to(dy.dtype).to(wide)
    dcore = None if h is None else (q.T @ h.to(wide)).to(dtype or dy.dtype)
    return (scale * (q @ core.to(dy.dtype).to(wide))).to(dy.dtype), dcore


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
    """dx = sum_i dy_i @ weight_i + drop(g @ down) and ddown = g.T @ drop(x), as ``outer``, with one mask"""
    ddown = None if x is None else outer(g, x, p, seed, dtype, more)
    if not need_dx:
        return None, ddown
    wide = _wide(g.dtype)
    dx = _drop(g.to(wide) @ torch.cat([down.to(g.dtype).to(wide) for down in downs]), p, seed)
    for dy, weight in zip(dys, weights, strict=True):
        if dy is not None and weight is not None:
            dx = dx + dy.to(wide) @ weight.to(wide)
    return dx.to(g.dtype), ddown


def project_terms_of(project: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, list[Tensor]]]:
    """``project`` with the products that penalties want, from a backend's ``project``."""

    def project_terms(
        x: Tensor,  # (M, K)
        downs: Sequence[Tensor],  # (R_i, K)
        ups: Sequence[Tensor],  # (N_i, R_i)
        terms: Sequence[Any],  # ``Term``s of forgetless.ops.rows
        scale: float = 1.0,
        p: float = 0.0,
        seed: Tensor | None = None,  # (2,) int32
    ) -> tuple[Tensor, list[Tensor]]:  # (M, sum of R_i), dtype of x; (sum of k, R_i) each, at least float32
        """h = scale * drop(x) @ [down_1 .. down_n].T, and what the terms want: see ``Term``"""
        h = project(x, downs[0] if len(downs) == 1 else torch.cat(list(downs)), scale, p, seed)
        hs = h.split_with_sizes([down.shape[0] for down in downs], 1)
        return h, products(terms, hs, downs, ups)

    return project_terms


def linear_lowrank_of(project: Callable[..., Tensor], matmul_lowrank: Callable[..., Tensor]) -> Callable[..., Any]:
    """The forward pass from a backend's two products."""

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
        """h = scale * drop(x) @ down.T, y = x @ weight.T + bias + h @ up.T; drop_output drops h @ up.T in place of x

        ``project`` and ``matmul_lowrank``; ``plan`` says which way a kernel goes, see ``forgetless.ops.dispatch``.
        """
        h = project(x, down, scale, *((0.0, None) if drop_output else (p, seed)))
        return matmul_lowrank(x, weight, h, up, bias, *((p, seed) if drop_output else (0.0, None))), h

    return linear_lowrank


linear_lowrank = linear_lowrank_of(project, matmul_lowrank)
project_terms = project_terms_of(project)
grouped_rows, grouped_project, grouped_matmul_lowrank, grouped_outer, grouped_dx_and_ddown, grouped_sum = grouped_of(
    project, matmul_lowrank, outer, dx_and_ddown
)
