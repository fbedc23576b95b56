"""Layers fed by the same x (q/k/v, gate/up) run together: one pass over x forward, one backward, one dropout mask.

The first sibling called with an x computes for all of them; the others, called with the very same tensor, pick up
their y. Nothing is assumed: a sibling that is given another x computes on its own and leaves the group. Results are
those of the single layers up to the order of summation, except under dropout: x is dropped once for all siblings.

    forward   [h_1 .. h_n] = scale * drop(x) @ [down_1 .. down_n].T       one pass over x instead of n
              y_i = x @ weight_i.T + bias_i + h_i @ up_i.T
    backward  g_i = scale * dy_i @ up_i,  dup_i = dy_i.T @ h_i
              dx = sum_i dy_i @ weight_i + drop([g_1 .. g_n] @ [down_1 .. down_n]), accumulated in place (BLAS),
                   or sum_i (dy_i @ weight_i + drop(g_i @ down_i)), each in one accumulator (kernels)
              [ddown_1 .. ddown_n] = [g_1 .. g_n].T @ drop(x)             one pass over x instead of n
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ops import blas, recompute
from ..ops.autograd import applied, as_rows, autocasts, exact_products, gives_way, refuse_second_derivative, shaped

#: y (..., N) of one sibling, and h (M, R) if it is wanted
Result = tuple[Tensor, Tensor | None]

#: A group that so often in a row computed for siblings that never came is split.
MISSES = 8

#: Names under one parent that are called with one x in the models of the field.
KNOWN = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("q_lin", "k_lin", "v_lin"),
)


def families(names: list[str]) -> list[list[str]]:
    """Groups of two or more of ``names`` that share a parent and stand together in ``KNOWN``."""
    known = set(names)
    found = []
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
        prefix = f"{parent}." if parent else ""
        for row in KNOWN:
            group = [prefix + last for last in row if prefix + last in known]
            if len(group) > 1:
                found.append(group)
    return found


class Group:
    """The siblings that still go together, and the results that wait to be picked up.

    Waiting results are per thread: two threads may run the model at once.
    """

    def __init__(self, members: list[Any]):
        self.members = list(members)  # the adapted layers
        self.misses = 0
        self._local = threading.local()

    def take(self, member: Any, x: Tensor, dropout: float) -> tuple[bool, Result | None]:
        """Whether something was made for this member, and what: None if it is not for this x as it is now."""
        waiting: _Waiting | None = self._local.__dict__.get("waiting")
        if waiting is None or id(member) not in waiting.results:
            return False, None
        result, state = waiting.results.pop(id(member))
        if not waiting.results:
            self._local.waiting = None
        held = waiting.x()
        if held is x and waiting.call == _call(x, dropout) and state == _state(member):
            self.misses = 0
            return True, result
        if held is not None and held is not x:
            # Computed along for nothing. From now on it goes its own way, with those that wait like it.
            self._local.waiting = None
            self._leave([other for other in self.members if other is member or id(other) in waiting.results])
            return False, None
        return True, None

    def share(self, first: Any, x: Tensor, dropout: float, results: list[Result]) -> Result:
        """The result of ``first``, one of the members; those of the others, in the members' order, are left here."""
        late: _Waiting | None = self._local.__dict__.get("waiting")
        members = self.members
        if late is not None:
            self.misses += 1
            if self.misses > MISSES:
                self._leave([other for other in members if id(other) in late.results])
        held = {}
        for member, result in zip(members, results):  # noqa: B905 - strict costs time
            if member is first:
                mine = result
            elif member.group is self:
                held[id(member)] = result, _state(member)
        self._local.waiting = _Waiting(x, _call(x, dropout), held) if held else None
        return mine

    def _leave(self, left: list[Any]) -> None:
        self.members = [other for other in self.members if all(other is not gone for gone in left)]
        group = Group(left)
        for other in left:
            other.group = group

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def _call(x: Tensor, dropout: float) -> Any:
    """What must be the same of the call when a result is picked up as when it was made."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if autocasts(device) else None
    return x._version, torch.is_grad_enabled(), autocast, dropout


def _state(member: Any) -> list[Any]:
    """What must be the same of the member."""
    adapter = member.adapter
    table = adapter._parameters
    weight = member.held()[0]
    seen: list[Any] = [id(weight), weight._version, weight.requires_grad]
    if "down" not in table:
        seen.append(id(adapter.down))
    for t in table.values():
        if t is not None:
            seen += id(t), t._version, t.requires_grad
    return seen


class _Waiting:
    def __init__(self, x: Tensor, call: Any, results: dict[int, tuple[Result, Any]]):
        self.x = weakref.ref(x)
        self.call = call
        self.results = results


def lowrank_linears(
    x: Tensor,  # (..., K)
    weights: Sequence[Tensor],  # (N_i, K) each, dtype of x, frozen
    downs: Sequence[Tensor],  # (R_i, K)
    ups: Sequence[Tensor],  # (N_i, R_i)
    biases: Sequence[Tensor | None],  # (N_i,), frozen
    scale: float,
    p: float,
    seed: Tensor | None,  # (2,) int32
    return_h: bool,
    run: ModuleType,
) -> list[Result]:
    """y_i = x @ weight_i.T + bias_i + h_i @ up_i.T and h_i = scale / (1 - p) * drop(x) @ down_i.T, for all i at once.

    Differentiable in x, downs and ups. ``run`` is the backend; ``p`` as quantised by ``lowrank_linear``. One pass
    over x forward and one backward: what ``AdaptedLinear`` calls for q/k/v and gate/up. It checks nothing.

    Returns:
        (y_i, h_i) for each i: (..., N_i) and (M, R_i), dtype of x; h_i is None unless ``return_h``.

    Raises:
        RuntimeError: a second derivative is asked for.
    """
    # what has no gradient goes in one argument: autograd looks at every one
    ys = _siblings((weights, biases, scale / (1.0 - p), p, seed, return_h, run), x, *downs, *ups)
    if not return_h:
        return [(y, None) for y in ys]
    *ys, h = ys
    return list(zip(ys, h.split([down.shape[0] for down in downs], dim=1), strict=True))


class _Siblings(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, given: tuple[Any, ...], x: Tensor, *factors: Tensor) -> tuple[Tensor, ...]:
        weights, biases, s, p, seed, return_h, run = given
        n = len(weights)
        downs, ups = factors[:n], factors[n:]
        need = ctx.needs_input_grad
        ctx.need_x, ctx.need_downs, ctx.need_ups = need[1], need[2 : 2 + n], need[2 + n :]
        ctx.ranks = [down.shape[0] for down in downs]
        ctx.rest = s, p, run, return_h, x.shape
        ctx.dtypes = downs[0].dtype, [up.dtype for up in ups]
        ctx.set_materialize_grads(False)
        rows = as_rows(x)
        down = blas.as_dtype(torch.cat(downs), x.dtype)
        if run is blas:  # which wants one dtype: cast once for both passes
            ups = tuple(blas.as_dtype(up, x.dtype) for up in ups)
        h = run.project(rows, down, s, p, seed)
        parts = h.split_with_sizes(ctx.ranks, 1)
        ys = [shaped(run.matmul_lowrank(rows, weights[i], parts[i], ups[i], biases[i]), x.shape) for i in range(n)]
        kept = None
        if any(ctx.need_downs) and recompute.hold(ctx, x) is not None:
            kept = rows
        ctx.save_for_backward(kept, h if any(ctx.need_ups) else None, seed, down, *weights, *ups)
        return (*ys, h) if return_h else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        s, p, run, return_h, shape = ctx.rest
        x, h, seed, down, *rest = ctx.saved_tensors
        x = recompute.held(ctx, x)
        if x is not None:
            x = as_rows(x)
        n = len(rest) // 2
        weights, ups = rest[:n], rest[n:]
        dys = [None if dy is None else as_rows(dy) for dy in grads[:n]]
        dh = grads[n] if return_h else None
        down_dtype, up_dtypes = ctx.dtypes
        if all(dy is None for dy in dys):
            if dh is None:
                return (None,) * (2 + 2 * n)
            dys[0] = dh.new_zeros(dh.shape[0], weights[0].shape[0])
        wanted = (ctx.need_x, any(ctx.need_downs), ctx.need_ups, down_dtype, up_dtypes)
        gradients = blas.gradients if run is blas else functools.partial(_or_blas, run)
        arguments = (dys, dh, x, weights, down, ups, h, seed, s, p, *wanted)
        with exact_products(down.device.type):
            dx, ddown, dups = gradients(*arguments)
        ddowns = [None] * n if ddown is None else ddown.split_with_sizes(ctx.ranks)
        ddowns = [ddowns[i] if ctx.need_downs[i] else None for i in range(n)]
        return (None, None if dx is None else dx.view(shape), *ddowns, *dups)


_siblings = applied(_Siblings)


def _or_blas(run: Any, dys: Sequence[Tensor | None], dh: Any, x: Any, weights: Any, down: Tensor, *rest: Any) -> Any:
    """``_composed``; by BLAS where the kernels fail."""
    try:
        return _composed(run, dys, dh, x, weights, down, *rest)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
        like = next(t for t in dys if t is not None)
        ups, *others = rest
        if not gives_way(run, "backward", like, weights[0], down[: ups[0].shape[1]], error):
            raise
        return blas.gradients(dys, dh, x, weights, down, [blas.as_dtype(up, down.dtype) for up in ups], *others)


def _composed(
    run: Any,
    dys: Sequence[Tensor | None],
    dh: Tensor | None,
    x: Tensor | None,
    weights: Sequence[Tensor],
    down: Tensor,
    ups: Sequence[Tensor],
    h: Tensor | None,
    seed: Tensor | None,
    s: float,
    p: float,
    need_x: bool,
    need_down: bool,
    need_ups: Sequence[bool],
    down_dtype: torch.dtype,
    up_dtypes: Sequence[torch.dtype],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """``blas.gradients`` out of a backend's functions: dy_i is read for g_i and dup_i at once, then for dx."""
    ranks = [up.shape[1] for up in ups]
    downs, dhs = down.split(ranks), () if dh is None else dh.split(ranks, dim=1)
    parts = h.split(ranks, dim=1) if h is not None else [None] * len(ranks)
    like = next(t for t in dys if t is not None)
    dx: Tensor | None = None
    dups: list[Tensor | None] = []
    gs = []
    for i, dy in enumerate(dys):
        dup = None
        if dy is None:
            g = like.new_zeros(like.shape[0], ranks[i])
        elif need_ups[i]:
            g, out = run.project_outer(dy, ups[i].T, parts[i], s, up_dtypes[i])
            dup = out.T
        else:
            g = run.project(dy, ups[i].T, s)
        if dh is not None:
            g = g.add_(dhs[i], alpha=s)
        if need_x:
            if dy is None:
                dy = like.new_zeros(like.shape[0], weights[i].shape[0])
            term = run.matmul_lowrank(dy, weights[i].T, g, downs[i].T, None, p, seed)
            dx = term if dx is None else dx.add_(term)
        gs.append(g)
        dups.append(dup)
    ddown = run.outer(torch.cat(gs, 1), x, p, seed, down_dtype) if need_down else None
    return dx, ddown, dups
