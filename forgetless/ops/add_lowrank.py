"""A frozen layer by its own forward, and a low-rank update added to what it returns.

For layers whose weight cannot be read as a matrix: quantised ones, and whatever else computes x @ W.T in its own way.

    x -> _Project -> alias of x -> the layer's forward -> y -> _Add -> y + h @ up.T
              h = s * drop(alias) @ down.T ----------------^

Backward, the layer's own gradient of x arrives at ``_Project``, which adds mask * (g @ down) to it in one pass. Nothing
of the weight's size is made here. Memory is written in place only where the caller says that the base returns fresh
memory that nothing else holds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import compat
from . import autograd as ops
from . import blas


class Term(NamedTuple):
    """One low-rank update: scale * (drop(x) @ down.T) @ up.T + bias."""

    down: Tensor  # (R, K)
    up: Tensor  # (N, R)
    scale: float
    dropout: float = 0.0
    bias: Tensor | None = None  # (N,)


def add_terms(
    base: Callable[[Tensor], Tensor], x: Tensor, terms: list[Term], cut: Any = None, fresh: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """base(x) + sum over terms of scale * (drop(x) @ down.T) @ up.T + bias, differentiable in everything.

    Args:
        base: the frozen layer's forward, (..., K) -> (..., N), linear in the sense that it does not write to x.
        x: (..., K), floating point. Under autocast the low-rank products are taken in autocast's dtype, otherwise in
            that of ``x``; the result has the dtype of ``base(x)``.
        terms: each with a dropout mask of its own, as in ``ops.lowrank_linear``.
        cut: tensor parallelism: x or base(x) are this rank's columns, and so are the factors.
        fresh: base returns memory of its own that nothing else holds: it is then written in place. Autograd still
            refuses this where it saved that memory.

    Returns:
        y (..., N) and for each term h = scale * drop(x) @ down.T as (M, R), differentiable in x and down.

    Under torch.compile and torch.func transforms the formula itself is taken: they fuse and differentiate it.

    Raises:
        ValueError: base returned something that is not (..., N).
        RuntimeError: base returned something without a gradient for an x that wants one.
    """
    plainly = torch.compiler.is_compiling() or compat.transforms_active()
    device = x.device.type
    autocast = ops.autocasts(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    projected = []
    for term in terms:
        if plainly:
            dropped = x.to(dtype) if not term.dropout else torch.dropout(x.to(dtype), term.dropout, True)
            projected.append(ops.as_rows(dropped) @ term.down.to(dtype).T * term.scale)
            continue
        p, seed = ops.draw_mask(term.dropout, x.device)
        seed = seed if cut is None else cut.seed(seed)
        alias, h = _Project.apply(x, term.down, seed, term.scale / (1.0 - p), p, dtype)
        projected.append(h)
        x = alias if x.requires_grad else x
    y = base(x)
    N = terms[0].up.shape[0]
    if not isinstance(y, Tensor) or y.shape != (*x.shape[:-1], N):
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"the frozen layer returned {got}, its adapter wants {(*x.shape[:-1], N)}")
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled() and not plainly:
        raise RuntimeError(
            f"the frozen layer, a {type(base).__name__}, returned a result without a gradient for its input: what lies "
            "before it could not learn; train with more tokens in a call, or with another kind of quantisation"
        )
    hidden = []
    for term, h in zip(terms, projected, strict=True):
        h, seen = (h, h) if cut is None else cut.join(h)
        hidden.append(seen)
        if plainly:
            more = (h.to(y.dtype) @ term.up.to(y.dtype).T).view(y.shape)
            y = y + (more if term.bias is None else more + term.bias.to(y.dtype))
            continue
        y = _Add.apply(y, h, term.up, term.bias, fresh and y.is_contiguous() and not compat.is_view(y))
        fresh = True  # what _Add returns is its own
    return y, hidden


class _Project(torch.autograd.Function):
    """Hands x through, so that the layer's gradient of x and the low-rank one meet here."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, down: Tensor, seed: Tensor | None, s: float, p: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.run, ctx.rest, ctx.dtype, ctx.down_dtype = ops.module_for(x.device, dtype), (s, p), dtype, down.dtype
        ctx.shape = x.shape
        ctx.set_materialize_grads(False)
        small = blas.as_dtype(down, dtype)
        with ops.exact_products(x.device.type):
            h = ctx.run.project(blas.as_dtype(ops.as_rows(x), dtype), small, s, p, seed)
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, small, seed)
        return x, h

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, dh: Tensor | None) -> tuple[Any, ...]:
        ops.refuse_second_derivative()
        if dh is None:
            return dx, *(None,) * 5
        x, down, seed = ctx.saved_tensors
        s, p = ctx.rest
        with ops.exact_products(dh.device.type):
            g = dh * s
            bits = blas.keep_bits(seed, p, g.shape[0], down.shape[1]) if p > 0.0 else None
            if not ctx.needs_input_grad[0]:
                dx = None
            elif bits is not None:
                part = blas._drop_(g @ down, bits).view(ctx.shape)
                dx = part if dx is None else dx + part
            elif dx is None:
                dx = (g @ down).view(ctx.shape)
            else:
                g_wide, down_wide = blas.as_dtype(g, dx.dtype), blas.as_dtype(down, dx.dtype)
                dx = torch.addmm(ops.as_rows(dx), g_wide, down_wide).view(ctx.shape)
            ddown = None
            if x is not None:
                rows = blas.as_dtype(ops.as_rows(x), ctx.dtype)
                if bits is not None and ctx.run is blas:
                    rows, p, seed = blas._dropped(rows, bits), 0.0, None
                ddown = ctx.run.outer(g, rows, p, seed, ctx.down_dtype)
        return dx, ddown, None, None, None, None


class _Add(torch.autograd.Function):
    """y + h @ up.T + bias, in y's own memory if ``in_place``."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, in_place: bool) -> Tensor:
        ctx.run, ctx.up_dtype = ops.module_for(y.device, y.dtype), up.dtype
        h = blas.as_dtype(h, y.dtype)
        small = blas.as_dtype(up, y.dtype)
        if in_place:
            ctx.mark_dirty(y)
            out = y
            ops.as_rows(out).addmm_(h, small.T)  # contiguous: a view
        else:
            out = torch.addmm(ops.as_rows(y), h, small.T).view(y.shape)
        if bias is not None:
            out.add_(bias)
        ctx.save_for_backward(h if ctx.needs_input_grad[2] else None, small)
        return out

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        ops.refuse_second_derivative()
        h, up = ctx.saved_tensors
        _, need_h, need_up, need_bias = ctx.needs_input_grad[:4]
        rows = ops.as_rows(dy)
        dh = dup = None
        with ops.exact_products(dy.device.type):
            if need_up:
                dh, out = ctx.run.project_outer(rows, up.T, h, 1.0, ctx.up_dtype)
                dup = out.T
            elif need_h:
                dh = ctx.run.project(rows, up.T)
            dbias = rows.sum(0) if need_bias else None
        return dy, dh, dup, dbias, None
