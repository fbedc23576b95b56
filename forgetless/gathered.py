"""CURLoRA on BLAS: both skinny products are columns of products that the frozen layer makes anyway.

C and R are columns and rows of the weight itself, so x @ R.T = (x @ W.T)[:, rows] before the bias, and
dy @ C = (dy @ W)[:, columns] of this layer's own input gradient. With C (N, R), U (R, R), R (R, K):

    y0 = x @ W.T                 dx0 = dy @ W
    h  = scale * y0[:, rows]     q   = dx0[:, columns]
    y  = y0 + b + h @ U.T @ C.T  dU  = q.T @ h,   dx = dx0 + scale * (q @ U + dh) @ R

Saved for backward: h alone; x is not read again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .ops import refuse_second_derivative


def gathered_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K)
    core: Tensor,  # U (R, R)
    lift: Tensor,  # C = weight[:, columns] (N, R)
    down: Tensor,  # R = weight[rows] (R, K)
    rows: Tensor,  # (R,) int64
    columns: Tensor,  # (R,) int64
    bias: Tensor | None,  # (N,)
    scale: float,
) -> tuple[Tensor, Tensor]:  # y (..., N), h (..., R)
    """y = x @ weight.T + bias + scale * x @ (C U R).T and h = scale * x @ R.T, differentiable in x, core and bias."""
    lead = x.shape[:-1]
    flat = x.reshape(math.prod(lead), x.shape[-1])
    y, h = _Gathered.apply(flat, weight, core, lift, down, rows, columns, bias, scale)
    return y.view(*lead, y.shape[-1]), h.view(*lead, h.shape[-1])


def _gather(t: Tensor, columns: Tensor) -> Tensor:  # (M, n), (R,) -> (M, R)
    """t[:, columns], by the quickest of the ways on a CPU: gather, and of half precision as plain words."""
    words = t.view(torch.int16) if t.element_size() == 2 else t
    return words.gather(1, columns.expand(t.shape[0], -1)).view(t.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        core: Tensor,
        lift: Tensor,
        down: Tensor,
        rows: Tensor,
        columns: Tensor,
        bias: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        y = linear(x, weight)
        h = _gather(y, rows)
        if scale != 1.0:
            h.mul_(scale)
        small = core.to(x.dtype)
        y.addmm_(torch.mm(h, small.t()), lift.t())
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, weight, small, lift, down, columns)
        ctx.scale, ctx.core_dtype = scale, core.dtype
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        h, weight, small, lift, down, columns = ctx.saved_tensors
        need_x, _, need_core = ctx.needs_input_grad[:3]
        need_bias = ctx.needs_input_grad[7]
        dx = dcore = dbias = g = None
        if dy is not None:
            dx = dy @ weight if need_x else None
            q = dy @ lift if dx is None else _gather(dx, columns)
            g = q @ small if need_x else None
            if need_core:
                dcore = (q.to(ctx.core_dtype).T @ h.to(ctx.core_dtype)).to(ctx.core_dtype)
            dbias = dy.sum(0) if need_bias else None
        if need_x:
            g = dh if g is None else g if dh is None else g.add_(dh)
            if g is not None and dx is not None:
                dx = dx.addmm_(g, down, alpha=ctx.scale)
            elif g is not None:
                dx = torch.mm(g, down).mul_(ctx.scale)
        return dx, None, dcore, None, None, None, None, dbias, None
