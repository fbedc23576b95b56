"""The op on a stack of experts: each row runs through the frozen matrix of its expert and that expert's update.

    h_s   = scale * drop(x_s) @ down_e.T
    y_s   = x_s @ weight_e.T + bias_e + h_s @ up_e.T         e is the expert of row s
    out_t = sum over the rows s of token t of w_s * y_s      where the rows of a token are summed

Rows are sorted by expert. The kernels make each product of all experts in one launch, and the host never reads how many
rows an expert has; BLAS takes one expert after another. Nothing of the size of the stack is made. Saved for backward: x
and h, and w; no row of y, because dw_s = <dout_t, y_s> is taken from products that the backward pass makes anyway:
<dout_t @ weight_e, x_s> + <dout_t @ up_e, h_s> + <dout_t, bias_e>. Where x is made by a function of what another op
made (``inside``), that is saved in its place, and the backward pass calls the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from .autograd import refuse_second_derivative
from .bodies import autocasts, device_type, exact_products, quantized_rate
from .dispatch import LaunchError

#: Elements that are made in float32 at a time.
_CHUNK = 1 << 16


@dataclass(frozen=True)
class Rows:
    """The rows that a router made: one for each pair of a token and an expert of it, sorted by expert.

    Attributes:
        order: (S,) int64, the place of each row among all pairs, token by token.
        tokens: (S,) int64, the token of each row.
        ends: (E,) int32, where the rows of each expert end.
        size: tokens, T.
    """

    order: Tensor
    tokens: Tensor
    ends: Tensor
    size: int

    @cached_property
    def counts(self) -> list[int]:
        """Rows of each expert. The host waits for the device once."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]

    @cached_property
    def places(self) -> Tensor:  # (S,) int64
        """The row of each pair, token by token: the inverse of ``order``."""
        count = torch.arange(len(self.order), device=self.order.device)
        return torch.empty_like(self.order).scatter_(0, self.order, count)

    def experts(self) -> Tensor:  # (S,) int64
        """The expert of each row."""
        rows = torch.arange(len(self.order), device=self.order.device)
        return torch.searchsorted(self.ends, rows, right=True)

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
    """Rows in the order of their experts; those of one expert stay in the order of their tokens.

    Raises:
        ValueError: there is no such expert. On CUDA the device stops with an assertion, as for every index.
    """
    flat = index.reshape(-1).long()
    if flat.is_cpu and flat.numel():
        for chosen in torch.stack(flat.aminmax()).tolist():
            if not 0 <= chosen < experts:
                raise ValueError(f"the router chose expert {chosen}, there are {experts}")
    order = torch.argsort(flat, stable=True)
    counts = flat.new_zeros(experts).scatter_add_(0, flat, torch.ones_like(flat))
    tokens = order // max(index.shape[-1], 1)
    return Rows(order, tokens, counts.cumsum(0).to(torch.int32), index.shape[0])


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
    dtype: torch.dtype  # of the products
    autocast: torch.dtype | None  # of the forward pass
    inside: Callable[[Tensor], Tensor] | None
    module: Any

    def lift(self, up: Tensor) -> Tensor:
        """up, or in float32 with the scale in it"""
        return up if self.up_scale == 1.0 else self.up_scale * up.float()

    def x_of(self, given: Tensor) -> Tensor:
        """What the products take: what was given, or what ``inside`` makes of it, as in the forward pass"""
        if self.inside is None:
            return given
        device = device_type(given)
        again = nullcontext() if self.autocast is None else torch.autocast(device, dtype=self.autocast)
        with again:
            return self.inside(given).to(self.dtype)


def grouped_lowrank(
    x: Tensor,  # (T, K), or (S, K) with ``by_token`` False
    weight: Tensor,  # (E, N, K), any strides
    bias: Tensor | None,  # (E, N)
    factors: Factors,
    rows: Rows,
    sums: Tensor | None = None,  # (S,), any floating dtype
    by_token: bool = True,
    inside: Callable[[Tensor], Tensor] | None = None,
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
        inside: a function that makes x of what is given here, row by row. It is called in the backward pass, too, so
            its result is not saved. It has no other differentiable inputs, and draws no random numbers.

    Returns:
        y (S, N) or, with ``sums``, (T, N) in the dtype of the products; and h (S, R), scale included.

    Raises:
        ValueError: a shape does not fit.
    """
    device, E = device_type(x), weight.shape[0]
    autocast = torch.get_autocast_dtype(device) if autocasts(device) else None
    dtype = autocast if autocast is not None and x.dtype != torch.float64 else weight.dtype
    down, up, scale, dropout = factors
    N, K = weight.shape[1:]
    length = rows.size if by_token else rows.tokens.shape[0]
    for name, t, shape in (
        ("x", x, (length, K if inside is None else x.shape[1])),
        ("down", down, (E, down.shape[1], K)),
        ("up", up, (E, N, down.shape[1])),
    ):
        if tuple(t.shape) != shape:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, the stack {tuple(weight.shape)} wants {shape}")
    p = quantized_rate(dropout)
    s = scale / (1.0 - p)
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (E, 2), dtype=torch.int32, device=x.device) if p else None
    scales = (1.0, s) if dtype == torch.float16 else (s, 1.0)
    call = _Call(rows, by_token, *scales, p, seeds, dtype, autocast, inside, dispatch.asked_module())
    y, h = _Grouped.apply(call, x if inside else x.to(dtype), sums, weight, bias, down, up)
    return y, h if call.up_scale == 1.0 else h * call.up_scale


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, given: Tensor, sums: Tensor | None, *stack: Any) -> tuple[Tensor, Tensor]:
        weight, bias, down, up = stack
        x = call.x_of(given)
        if x.shape != (len(given), weight.shape[2]):
            raise ValueError(f"inside makes {tuple(x.shape)}, the stack {tuple(weight.shape)} wants {weight.shape[2]}")

        def run(backend: Any) -> list[Tensor]:
            own, by_token = backend.grouped_rows(x, call.rows, call.by_token)
            h = backend.grouped_project(own, down, call.rows, call.scale, call.p, call.seeds, by_token)
            lift = call.lift(up)
            y = backend.grouped_matmul_lowrank(own, weight, h, lift, call.rows, bias, by_token=by_token)
            return [y if sums is None else backend.grouped_sum(y, call.rows, sums), h]

        y, h = _routed(call, "forward", x, down, up, run)
        ctx.call = call
        ctx.save_for_backward(given, h, sums, *stack)
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        given, h, sums, *stack = ctx.saved_tensors
        call: _Call = ctx.call
        if dy is None:
            if dh is None:
                return (None,) * 7
            dy = h.new_zeros(call.rows.size if sums is not None else h.shape[0], stack[0].shape[1])
        with torch.set_grad_enabled(call.inside is not None and ctx.needs_input_grad[1]):
            leaf = given.detach().requires_grad_() if torch.is_grad_enabled() else given
            x = call.x_of(leaf)
        saved = _Saved(x.detach(), h, sums, *stack)
        dx, *others = _routed(
            call, "backward", dy, saved.down, saved.up,
            lambda backend: _gradients(call, backend, saved, dy, dh, ctx.needs_input_grad[1:]),
        )  # fmt: skip
        if leaf is not given:
            (dx,) = torch.autograd.grad(x, leaf, dx)
        return (None, dx, *others)


class _Saved(NamedTuple):
    """What the backward pass reads"""

    x: Tensor
    h: Tensor  # (S, R)
    sums: Tensor | None
    weight: Tensor
    bias: Tensor | None
    down: Tensor
    up: Tensor


def _routed(call: _Call, sweep: str, like: Tensor, down: Tensor, up: Tensor, run: Callable[[Any], list[Any]]) -> list:
    """``run`` of the backend that dispatch chooses, or of BLAS where a kernel fails"""

    def attempt(route: Any) -> list[Any]:
        try:
            return run(route.module)
        except LaunchError as error:
            return attempt(dispatch.failed(route, error))

    with exact_products(device_type(like)):
        name, dropout = experts_sweep(sweep, len(up)), call.p > 0.0
        route = dispatch.choose_route(name, like, [up[0]], down[0], dropout, call.module)
        if route.unchecked:
            route = dispatch.measured_route(
                route, lambda r: [t for t in attempt(r) if t is not None], like.device, others=()
            )
        return attempt(route)


def experts_sweep(sweep: str, experts: int) -> str:
    """The name of a pass over a stack, for ``forgetless.ops.dispatch``."""
    return f"{sweep} of {experts} experts"


def _gradients(
    call: _Call, run: Any, saved: _Saved, dout: Tensor, dh: Tensor | None, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Of x, sums, weight, bias, down, up: g = scale * (w dy @ up + dh), dup = dy.T @ (w h), and so on."""
    given, h, sums, weight, bias, down, up = saved
    need_x, need_sums, need_weight, need_bias, need_down, need_up = needed
    rows, drop = call.rows, (call.p, call.seeds)
    w = None if sums is None else sums[:, None].to(_wide(call.dtype))
    x, by_x = run.grouped_rows(given, rows, call.by_token)
    dy, by_dy = run.grouped_rows(dout, rows, w is not None)
    dx = dsums = dweight = dbias = ddown = dup = None

    def weighed(t: Tensor) -> Tensor:
        return t if w is None else (t * w).to(t.dtype)

    lift = call.lift(up)
    q = run.grouped_project(dy, lift.mT, rows, by_token=by_dy)
    if need_up:
        dup = run.grouped_outer(weighed(h), dy, rows, dtype=up.dtype, by_token=by_dy).mT
        dup = dup if call.up_scale == 1.0 else call.up_scale * dup
    if need_x or need_down:
        g = weighed(q) if dh is None else weighed(q) + dh
        g = g if call.scale == 1.0 else call.scale * g
        more = {"need_dx": need_x, "dtype": down.dtype, "by_token": by_x}
        frozen, own = dy if w is None else None, x if need_down else None
        dx, ddown = run.grouped_dx_and_ddown(frozen, weight, g, down, own, rows, *drop, **more)
    if w is not None and (need_x or need_sums):  # the frozen product apart: dx and dsums are made of it
        none = h[:, :0], weight[:, :0].mT  # (S, 0), (E, K, 0)
        v = run.grouped_matmul_lowrank(dy, weight.mT, *none, rows, by_token=by_dy)
        own = None if not need_sums else x[rows.tokens] if by_x else x
        dx, dsums = _weighed(v, w, dx, own)
        if dsums is not None and sums is not None:
            dsums = dsums + _dots(q, h)
            if bias is not None:
                dsums += (dout.to(w.dtype) @ bias.to(w.dtype).T)[rows.tokens, rows.experts()]
            dsums = dsums.to(sums.dtype)
    if dx is not None and call.by_token:
        dx = run.grouped_sum(dx, rows)
    if need_weight or need_bias:
        own = weighed(dy[rows.tokens] if by_dy else dy)
        if need_weight:
            dweight = run.grouped_outer(own, x, rows, dtype=weight.dtype, by_token=by_x)
        if need_bias:
            dbias = run.grouped_outer(own, own.new_ones(len(own), 1), rows, dtype=weight.dtype)[..., 0]
    return [dx, dsums, dweight, dbias, ddown, dup]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _dots(a: Tensor, b: Tensor) -> Tensor:  # (n, F), (n, F) -> (n,)
    return (a.to(_wide(a.dtype)) * b.to(_wide(b.dtype))).sum(1)


def _weighed(
    v: Tensor,  # (S, K)
    w: Tensor,  # (S, 1), at least float32
    dx: Tensor | None,  # (S, K), added to in place
    x: Tensor | None,  # (S, K)
) -> tuple[Tensor | None, Tensor | None]:  # (S, K), and (S,) in the dtype of w
    """dx + w * v, and <v, x> of each row. A CPU takes some rows at a time: its cache holds what is made in float32."""
    step = max(1, _CHUNK // max(1, v.shape[1])) if v.is_cpu else max(1, len(v))
    dots = []
    for start in range(0, len(v), step):
        part = slice(start, start + step)
        if x is not None:
            dots.append(_dots(v[part], x[part]))
        if dx is not None:
            dx[part].addcmul_(v[part], w[part])
    return dx, None if x is None else torch.cat(dots) if dots else w.new_zeros(0)
