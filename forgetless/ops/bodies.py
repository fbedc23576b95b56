"""The op: n frozen linear layers of one x, each with a low-rank update, forward and backward.

    h   = scale * drop(x) @ [down_1 .. down_n].T                     one pass over x
    y_i = x @ weight_i.T + bias_i + h_i @ up_i.T
    g_i = scale * (dy_i @ up_i + dh_i),    dup_i = dy_i.T @ h_i
    dx  = sum_i dy_i @ weight_i + drop([g_1 .. g_n] @ [down_1 .. down_n])
    [ddown_1 .. ddown_n] = [g_1 .. g_n].T @ drop(x)                  one pass over x

The single layer is n = 1. With a core_i, up_i @ core_i stands for up_i and is never made: y_i has (h_i @ core_i.T) @
up_i.T, and dcore_i = (dy_i @ up_i).T @ h_i is in place of dup_i. In place of the weight a layer may give ``base``, what
it made of x itself; then y = base + bias + h @ up.T, and the layer's own part of dx is its own affair. Saved for
backward: x (only if ``down`` or ``weight`` is trained), h, and eight bytes of dropout seed. ``forward`` and
``gradients`` are the only bodies, for autograd (``forgetless.ops.autograd``) and for torch.compile
(``forgetless.ops.compiled``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch, reference
from .dispatch import LaunchError
from .plans import Route
from .rows import Extra, Term, Terms


@dataclass(frozen=True)
class Onto:
    """A layer that makes its product itself.

    Attributes:
        in_place: the memory of its result may be written.
        sum_h, sum_g: process groups to sum h and g over (tensor parallelism).
    """

    in_place: bool = False
    sum_h: Any = None
    sum_g: Any = None


@dataclass(frozen=True)
class Call:
    """One call of the op: all that is not a tensor.

    Attributes:
        count: layers.
        scale: factor of h, 1 / (1 - p) included.
        up_scale: factor of up. float16 has the whole scale here: scale * h may overflow where y does not.
        p: dropout, a multiple of 2**-15.
        return_h: also return h.
        onto: set where ``weights`` holds what the layer made of x itself.
        module: of the backend that was asked for, if any; the backward pass runs on it, too.
        terms: products that penalties want, too.
    """

    count: int = 1
    scale: float = 1.0
    up_scale: float = 1.0
    p: float = 0.0
    return_h: bool = False
    onto: Onto | None = None
    module: Any = None
    terms: Terms | None = None


class Operands(NamedTuple):
    """The tensors of the layers, a list each."""

    weights: Sequence[Tensor]  # (N_i, K); or with ``onto`` base (..., N_i)
    biases: Sequence[Tensor | None]  # (N_i,)
    downs: Sequence[Tensor]  # (R_i, K)
    ups: Sequence[Tensor]  # (N_i, R_i)
    cores: Sequence[Tensor] = ()  # (R_i, R_i), of all layers or of none


def quantized_rate(dropout: float) -> float:
    """The nearest rate that the generator can give, below 1."""
    return min(reference.drop_threshold(dropout), reference.LEVELS - 1) / reference.LEVELS


def draw_seed(device: torch.device) -> Tensor:  # (2,) int32
    """A dropout seed from torch's generator of that device: follows manual_seed, checkpointing and graph capture."""
    return torch.randint(-(1 << 31), (1 << 31) - 1, (2,), dtype=torch.int32, device=device)


def device_type(t: Tensor) -> str:
    """``t.device.type``, which takes microseconds on the usual way."""
    return "cpu" if t.is_cpu else t.device.type


def autocasts(device: str) -> bool:
    """Whether autocast is on for that type of device; torch raises if asked about meta."""
    return device != "meta" and torch.is_autocast_enabled(device)


def exact_products(device: str) -> AbstractContextManager[Any]:
    """Products in the dtype they are written in: the op has cast its arguments already."""
    return torch.autocast(device, enabled=False) if autocasts(device) else _AS_IT_IS


_AS_IT_IS = nullcontext()


def as_rows(x: Tensor) -> Tensor:  # (..., K) -> (M, K)
    return x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def forward(
    call: Call,
    x: Tensor,  # (M, K)
    seed: Tensor | None,  # (2,) int32
    layers: Operands,
    route: Route | None = None,
    terms: Sequence[Term] = (),
) -> tuple[list[Tensor], Tensor, list[Tensor]]:  # y_i (M, N_i), h (M, sum of R_i), the products of each term
    """y of each layer and h of all, by the backend and plan that dispatch chooses, or by BLAS where a kernel fails."""
    downs, ups, cores = layers.downs, layers.ups, layers.cores
    if route is None:
        route = dispatch.choose_route("forward", x, ups, downs[0], call.p > 0.0, call.module)
        if route.module is dispatch.blas and not (call.terms and call.terms.anywhere):  # ``fl.penalty`` makes them
            terms = ()
        if route.unchecked and not call.onto:  # which may write in place and wait for other processes
            route = dispatch.measured_route(route, lambda r: flat(forward(call, x, seed, layers, r, terms)), x.device)
    ups, cores = _scaled(call, ups, cores)
    run, s, p = route.module, call.scale, call.p
    try:
        with dispatch.tiles_of(route, x.device):
            if route.whole and call.count == 1 and not call.onto and not terms and not cores:
                y, h = run.linear_lowrank(
                    x, layers.weights[0], downs[0], ups[0], layers.biases[0], s, p, seed, plan=route.plan
                )
                return [y], h, []
            zs: list[Tensor] = []
            if cores:
                h, t = run.project_core(x, downs, cores, s, p, seed)
            elif terms:
                h, zs = run.project_terms(x, downs, ups, terms, s, p, seed)
            else:
                h = run.project(x, downs[0] if call.count == 1 else torch.cat(list(downs)), s, p, seed)
            t = t if cores else h
            if call.onto:
                return [_add(call.onto, layers.weights[0], t, ups[0], layers.biases[0])], h, zs
            if call.count == 1:
                return [run.matmul_lowrank(x, layers.weights[0], t, ups[0], layers.biases[0])], h, zs
            parts = t.split_with_sizes([up.shape[1] for up in ups], 1)
            each = zip(layers.weights, parts, ups, layers.biases, strict=True)
            return [run.matmul_lowrank(x, *layer) for layer in each], h, zs
    except LaunchError as error:
        return forward(call, x, seed, layers, dispatch.failed(route, error), terms)


def _scaled(call: Call, ups: Any, cores: Any) -> tuple[Any, Any]:
    """``ups``, or the cores where there are any, times the factor of the call."""
    if call.up_scale != 1.0:
        some = [call.up_scale * t.float() for t in cores or ups]
        ups, cores = (ups, some) if cores else (some, cores)
    return ups, cores


def _add(onto: Onto, base: Tensor, h: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """base + h @ up.T + bias, in the memory of base where that is allowed"""
    if onto.sum_h is not None:
        torch.distributed.all_reduce(h, group=onto.sum_h)
    y = base if onto.in_place else base.clone(memory_format=torch.contiguous_format)
    rows = y.view(h.shape[0], y.shape[-1])
    torch.addmm(rows, h.to(y.dtype), up.to(y.dtype).t(), out=rows)
    return y if bias is None else y.add_(bias)


class Saved(NamedTuple):
    """What the backward pass reads."""

    x: Tensor | None  # (M, K), only for ddown and dweight
    h: Tensor | None  # (M, sum of R_i), only for dup or dcore
    seed: Tensor | None
    weights: Sequence[Tensor | None]  # (N_i, K); None with ``onto``
    downs: Sequence[Tensor]  # (R_i, K)
    ups: Sequence[Tensor]  # (N_i, R_i)
    dtypes: Sequence[torch.dtype]  # of the gradients of downs, then of ups, then of cores
    cores: Sequence[Tensor] = ()  # (R_i, R_i)


def gradients(
    call: Call,
    saved: Saved,
    need: Sequence[bool],  # of x, then of all weights, biases, downs, ups, cores
    dys: Sequence[Tensor | None],  # (M, N_i) each, at least one
    dh: Tensor | None,  # (M, sum of R_i)
    route: Route | None = None,
    extra: Extra | None = None,
) -> list[Tensor | None]:  # as ``need``
    """The gradients that are needed: each dy_i is read for g_i and dup_i at once, then for dx; x for ddown."""
    n, s, p = call.count, call.scale, call.p
    x, h, seed, weights, downs, ups, dtypes, cores = saved
    like: Any = dys[0] if n == 1 else next(dy for dy in dys if dy is not None)
    if route is None:
        route = dispatch.choose_route("backward", like, ups, downs[0], p > 0.0, call.module)
        if route.unchecked and not call.onto:
            route = dispatch.measured_route(
                route, lambda r: given(gradients(call, saved, need, dys, dh, r, extra)), like.device
            )
    ups, cores = _scaled(call, ups, cores)
    run, ranks = route.module, [up.shape[1] for up in ups]
    need_x, need_downs, need_ups = need[0], need[1 + 2 * n : 1 + 3 * n], need[1 + 3 * n : 1 + 4 * n]
    need_down = any(need_downs)
    need_g = need_x or need_down
    hs: Any = [h] if n == 1 or h is None else h.split_with_sizes(ranks, 1)
    more_ups, more_downs, starts = extra or Extra([[]] * n, [], [None] * n)
    dx = ddown = None
    gs: list[Tensor] = []
    dups: list[Tensor | None] = [None] * n
    dcores: list[Tensor | None] = [None] * len(cores)
    try:
        with dispatch.tiles_of(route, like.device):
            if route.whole and n == 1 and need_x and dh is starts[0] is None and not call.onto and not cores:
                frozen: Any = weights[0]  # g inside the kernel that makes dx
                options = {"drop_output": True, "plan": route.plan}
                dx, g = run.linear_lowrank(like, frozen.T, ups[0].T, downs[0].T, None, s, p, seed, **options)
                gs, need_g = [g], False
            for i, dy in enumerate(dys):
                if dy is None:
                    gs.append(like.new_zeros(like.shape[0], ranks[i]))
                elif cores:
                    g, dcores[i] = run.project_core_outer(dy, ups[i], cores[i], hs[i], s, dtypes[2 * n + i])
                    gs.append(g)
                elif need_g and need_ups[i]:
                    g, dups[i] = run.project_outer(dy, ups[i], hs[i], s, dtypes[n + i], more_ups[i], starts[i])
                    gs.append(g)
                elif need_ups[i]:
                    dups[i] = run.outer(hs[i], dy, 0.0, None, dtypes[n + i], more_ups[i]).t()
                elif need_g:
                    start = None if starts[i] is None else (hs[i], starts[i])
                    gs.append(run.project(dy, ups[i].t(), s, start=start))
            if need_x or need_down:
                g = gs[0] if len(gs) == 1 else torch.cat(gs, 1)
                if call.onto and call.onto.sum_g is not None:
                    torch.distributed.all_reduce(g, group=call.onto.sum_g)
                if dh is not None:
                    g.add_(dh, alpha=s)
                options = {"need_dx": need_x and dx is None, "dtype": dtypes[0], "more": more_downs}
                results = run.dx_and_ddown(
                    [None] if call.onto else dys, weights, g, downs, x if need_down else None, p, seed, **options
                )
                dx, ddown = results[0] if dx is None else dx, results[1]
    except LaunchError as error:
        return gradients(call, saved, need, dys, dh, dispatch.failed(route, error), extra)
    if call.up_scale != 1.0:
        dups, dcores = ([None if t is None else t.mul_(call.up_scale) for t in some] for some in (dups, dcores))
    ddowns: Any = [ddown] if n == 1 or ddown is None else ddown.split_with_sizes(ranks)
    others: list[Tensor | None] = [None] * (2 * n)
    for i, dy in enumerate(dys):
        if need[1 + i] and dy is not None and x is not None:
            others[i] = dy.t() @ x
        if need[1 + n + i] and dy is not None:
            others[n + i] = dy.sum(0)
    if n > 1:
        ddowns = [ddowns[i] if need_down and need_downs[i] else None for i in range(n)]
    return [dx, *others, *ddowns, *dups, *dcores]


def flat(result: tuple[list[Tensor], Tensor, list[Tensor]]) -> list[Tensor]:
    """What ``forward`` gives, as one list."""
    return [*result[0], result[1], *result[2]]


def given(grads: list[Tensor | None]) -> list[Tensor]:
    """The gradients that were needed."""
    return [grad for grad in grads if grad is not None]
