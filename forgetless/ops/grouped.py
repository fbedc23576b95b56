"""The op on a stack of experts: each row runs through the frozen matrix of its expert and that expert's update.

    h_s   = scale * drop(x_s) @ down_e.T
    y_s   = x_s @ weight_e.T + bias_e + h_s @ up_e.T         e is the expert of row s
    out_t = sum over the rows s of token t of w_s * y_s      where the rows of a token are summed

Rows are sorted by expert, and one expert after another runs the products of the backend. So nothing of the size of the
stack is made. Saved for backward: x and h, and w; no row of y, because dw_s = <dout_t, y_s> is taken from products
that the backward pass makes anyway: <dout_t @ weight_e, x_s> + <dout_t @ up_e, h_s> + <dout_t, bias_e>.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import blas, dispatch
from .autograd import refuse_second_derivative
from .bodies import autocasts, device_type, exact_products, quantized_rate


@dataclass(frozen=True)
class Rows:
    """The rows that a router made: one for each pair of a token and an expert of it, sorted by expert.

    Attributes:
        order: (S,) int64, the place of each row among all pairs, token by token.
        tokens: (S,) int64, the token of each row.
        counts: rows of each expert.
        size: tokens.
    """

    order: Tensor
    tokens: Tensor
    counts: list[int]
    size: int

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Expert and its rows, of each expert that has any."""
        start = 0
        for expert, count in enumerate(self.counts):
            if count:
                yield expert, slice(start, start + count)
            start += count


def sort_rows(
    index: Tensor,  # (T, k) int, the experts of each token
    experts: int,
) -> Rows:
    """Rows in the order of their experts; those of one expert stay in the order of their tokens."""
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts: list[int] = torch.bincount(flat, minlength=experts).tolist()
    if len(counts) > experts:
        raise ValueError(f"the router chose expert {len(counts) - 1}, there are {experts}")
    return Rows(order, order // max(index.shape[-1], 1), counts, index.shape[0])


class Factors(NamedTuple):
    """The update of a stack."""

    down: Tensor  # (E, R, K)
    up: Tensor  # (E, N, R)
    scale: float = 1.0
    dropout: float = 0.0


@dataclass(frozen=True)
class _Call:
    """All that is not differentiated. ``scale``, ``up_scale`` and ``p`` are as of ``forgetless.ops.bodies.Call``."""

    rows: Rows
    by_token: bool  # x has one row for each token
    scale: float
    up_scale: float
    p: float
    seeds: Tensor | None  # (E, 2) int32
    module: Any

    def expert(self, e: int) -> dict[str, Any]:
        """The dropout of one expert."""
        return {"p": self.p, "seed": None if self.seeds is None else self.seeds[e]}

    def lift(self, up: Tensor, dtype: torch.dtype) -> Tensor:
        """up in the dtype of the products, or float32 with the scale in it."""
        return up.to(dtype) if self.up_scale == 1.0 else self.up_scale * up.float()


def grouped_lowrank(
    x: Tensor,  # (T, K), or (S, K) with ``by_token`` False
    weight: Tensor,  # (E, N, K), any strides
    bias: Tensor | None,  # (E, N)
    factors: Factors,
    rows: Rows,
    sums: Tensor | None = None,  # (S,), any floating dtype
    by_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """y and h of all rows, differentiable in every tensor.

    Args:
        x: floating point; products are taken in the dtype of ``weight``, or in autocast's.
        weight: of all experts; each is read in place.
        bias: of all experts.
        factors: of any floating dtype; each expert has a dropout mask of its own.
        rows: of ``sort_rows``.
        sums: what to weigh the rows with before those of a token are summed, in at least float32.
        by_token: x has one row for each token, else one for each row of ``rows``.

    Returns:
        y (S, N) or, with ``sums``, (T, N) in the dtype of the products; and h (S, R), scale included.

    Raises:
        ValueError: a shape does not fit.
    """
    device, E = device_type(x), weight.shape[0]
    dtype = torch.get_autocast_dtype(device) if autocasts(device) and x.dtype != torch.float64 else weight.dtype
    down, up, scale, dropout = factors
    N, K = weight.shape[1:]
    for name, t, shape in (
        ("x", x, (rows.size if by_token else rows.tokens.shape[0], K)),
        ("down", down, (E, down.shape[1], K)),
        ("up", up, (E, N, down.shape[1])),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, the stack {tuple(weight.shape)} wants {shape}")
    p = quantized_rate(dropout)
    s = scale / (1.0 - p)
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (E, 2), dtype=torch.int32, device=x.device) if p else None
    module = dispatch.module_for(False, dtype, dispatch.asked_module()) if down.shape[1] else blas
    call = _Call(rows, by_token, *((1.0, s) if dtype == torch.float16 else (s, 1.0)), p, seeds, module)
    y, h = _Grouped.apply(call, x.to(dtype), sums, weight, bias, down, up)
    return y, h if call.up_scale == 1.0 else h * call.up_scale


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, x: Tensor, sums: Tensor | None, *stack: Any) -> tuple[Tensor, Tensor]:
        weight, bias, down, up = stack
        rows, run, dtype = call.rows, call.module, x.dtype
        h = x.new_zeros(rows.tokens.shape[0], down.shape[1])
        if sums is None:
            y = x.new_empty(rows.tokens.shape[0], weight.shape[1])
        else:
            y = x.new_zeros(rows.size, weight.shape[1], dtype=torch.promote_types(dtype, torch.float32))
        with exact_products(device_type(x)):
            for e, part in rows.slices():
                tokens = rows.tokens[part]
                more = None if bias is None else bias[e].to(dtype)
                own = x[tokens] if call.by_token else x[part]
                h[part] = run.project(own, down[e], call.scale, **call.expert(e))
                y_e = run.matmul_lowrank(own, weight[e].to(dtype), h[part], call.lift(up[e], dtype), more)
                if sums is None:
                    y[part] = y_e
                else:
                    y.index_add_(0, tokens, y_e.to(y.dtype) * sums[part, None].to(y.dtype))
        ctx.call = call
        ctx.save_for_backward(x, h, sums, *stack)
        ctx.set_materialize_grads(False)
        return y.to(dtype), h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, h, sums, weight, bias, down, up = ctx.saved_tensors
        call: _Call = ctx.call
        if dy is None:
            if dh is None:
                return (None,) * 7
            dy = x.new_zeros(call.rows.size if sums is not None else h.shape[0], weight.shape[1])
        _, *needed = ctx.needs_input_grad
        like = (x, sums, weight, bias, down, up)
        grads: list[Any] = [torch.zeros_like(t) if n else None for t, n in zip(like, needed, strict=True)]
        if needed[0] and call.by_token:  # a token's rows are summed
            grads[0] = grads[0].to(torch.promote_types(x.dtype, torch.float32))
        with exact_products(device_type(x)):
            for e, part in call.rows.slices():
                _expert_gradients(call, e, part, (x, h, *like[1:]), (dy, dh), grads)
        if needed[0]:
            grads[0] = grads[0].to(x.dtype)
        return (None, *grads)


def _expert_gradients(
    call: _Call,
    e: int,
    part: slice,
    saved: tuple[Any, ...],  # x, h, sums, weight, bias, down, up
    incoming: tuple[Tensor, Tensor | None],  # dy, dh
    grads: list[Any],  # of x, sums, weight, bias, down, up; None where none is needed
) -> None:
    """Add what the rows of one expert give: g = scale * (w dy @ up + dh), dup = dy.T @ (w h), and so on."""
    x, h, sums, weight, bias, down, up = saved
    dx, dsums, dweight, dbias, ddown, dup = grads
    dy, dh = incoming
    run, dtype, tokens = call.module, x.dtype, call.rows.tokens[part]
    own = x[tokens] if call.by_token else x[part]
    dy = dy[part] if sums is None else dy[tokens]
    w = None if sums is None else sums[part, None].to(torch.promote_types(dtype, torch.float32))
    frozen, lift = weight[e].to(dtype), call.lift(up[e], dtype)

    def weighed(t: Tensor) -> Tensor:
        return t if w is None else (t * w).to(t.dtype)

    q, more = run.project_outer(dy, lift, weighed(h[part]), 1.0, up.dtype)
    if dup is not None:
        dup[e] = more if call.up_scale == 1.0 else call.up_scale * more
    g = weighed(q)
    g = call.scale * (g if dh is None else g + dh[part])
    products = ([dy], [frozen]) if w is None else ([None], [None])
    need = {"need_dx": dx is not None, "dtype": down.dtype, **call.expert(e)}
    low, more = run.dx_and_ddown(*products, g, [down[e]], own if ddown is not None else None, **need)
    if ddown is not None:
        ddown[e] = more
    if w is not None and (dx is not None or dsums is not None):
        v = dy @ frozen
        if dx is not None:
            low = low + weighed(v)
        if dsums is not None:
            value = _dots(v, own) + _dots(q, h[part])
            dsums[part] = value if bias is None else value + _dots(dy, bias[e].expand_as(dy))
    if dx is not None:
        if call.by_token:
            dx.index_add_(0, tokens, low.to(dx.dtype))
        else:
            dx[part] = low
    if dweight is not None:
        dweight[e] = weighed(dy).t() @ own
    if dbias is not None:
        dbias[e] = weighed(dy).sum(0)


def _dots(a: Tensor, b: Tensor) -> Tensor:  # (n, F), (n, F) -> (n,)
    wide = torch.promote_types(a.dtype, torch.float32)
    return (a.to(wide) * b.to(wide)).sum(1)
