"""CURLoRA on BLAS: both skinny products are columns of products that the frozen layer makes anyway.

C and R are columns and rows of the weight itself, so x @ R.T = (x @ W.T)[:, rows] before the bias, and
dy @ C = (dy @ W)[:, columns] of this layer's own input gradient. With C (N, R), U (R, R), R (R, K):

    y0 = x @ W.T                 dx0 = dy @ W
    h  = scale * y0[:, rows]     q   = dx0[:, columns]
    y  = y0 + b + h @ U.T @ C.T  dU  = q.T @ h,   dx = dx0 + scale * (q @ U + dh) @ R

Saved for backward: h alone; x is not read again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .autograd import applied, as_rows, refuse_second_derivative, shaped


def gathered_linear(
    x: Tensor,  # (..., K)
    weight: Tensor,  # (N, K), frozen
    core: Tensor,  # U (R, R)
    lift: Tensor,  # C = weight[:, columns] (N, R)
    down: Tensor,  # R = weight[rows] (R, K)
    rows: Tensor,  # (R,) int64
    columns: Tensor,  # (R,) int64
    bias: Tensor | None,  # (N,)
    scale: float,
    return_h: bool,
) -> tuple[Tensor, Tensor | None]:  # y (..., N), h (..., R)
    """y = x @ weight.T + bias + scale * x @ (C U R).T and h = scale * x @ R.T, differentiable in x, core and bias.

    h is None unless ``return_h``.
    """
    found = _gathered((weight, lift, down, rows, columns, scale, return_h), x, core, bias)
    return found if return_h else (found, None)


def _gather(t: Tensor, columns: Tensor) -> Tensor:  # (M, n), (R,) -> (M, R)
    """t[:, columns], by the quickest of the ways on a CPU: gather, and of half precision as plain words."""
    words = t.view(torch.int16) if t.element_size() == 2 else t
    return words.gather(1, columns.expand(t.shape[0], -1)).view(t.dtype)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: tuple[Any, ...], x: Tensor, core: Tensor, bias: Tensor | None) -> Any:
        weight, lift, down, rows, columns, scale, return_h = given
        shape = x.shape
        y = linear(as_rows(x), weight)
        h = _gather(y, rows)
        if scale != 1.0:
            h.mul_(scale)
        small = core.to(x.dtype)
        y.addmm_(linear(h, small), lift.t())
        if bias is not None:
            y.add_(bias)
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, weight, small, lift, down, columns)
        ctx.rest = scale, core.dtype, shape
        ctx.set_materialize_grads(False)
        y = shaped(y, shape)
        return (y, shaped(h, shape)) if return_h else y

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None = None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        h, weight, small, lift, down, columns = ctx.saved_tensors
        scale, core_dtype, shape = ctx.rest
        _, need_x, need_core, need_bias = ctx.needs_input_grad
        dx = dcore = dbias = g = None
        if dh is not None:
            dh = as_rows(dh)
        if dy is not None:
            dy = as_rows(dy)
            dx = dy @ weight if need_x else None
            q = dy @ lift if dx is None else _gather(dx, columns)
            g = q @ small if need_x else None
            if need_core:
                dcore = q.to(core_dtype).t() @ h.to(core_dtype)
            dbias = dy.sum(0) if need_bias else None
        if need_x:
            g = dh if g is None else g if dh is None else g.add_(dh)
            if g is not None and dx is not None:
                dx = dx.addmm_(g, down, alpha=scale)
            elif g is not None:
                dx = torch.mm(g, down).mul_(scale)
        return None, None if dx is None else dx.view(shape), dcore, dbias


_gathered = applied(_Gathered)
