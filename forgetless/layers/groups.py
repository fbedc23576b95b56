"""Layers fed by the same x (q/k/v, gate/up) run together: one pass over x forward, one backward, one dropout mask.

This happens inside one call of their parent's forward and nowhere else. The first sibling called with an x computes for
all of them; the others, called in the same forward with the very same tensor, pick up their y. A sibling whose scale,
dropout, dtype or device differs runs alone, and so does one that has changed since, or that is given another x. Results
are those of the single layers up to the order of summation, except under dropout: x is dropped once for all siblings.

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
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import blas
from ..ops.autograd import (
    applied,
    as_rows,
    autocasts,
    draw_seed,
    exact_products,
    gives_way,
    refuse_second_derivative,
    shaped,
)

#: y (..., N) of one sibling, and h (M, R) if it is wanted
Result = tuple[Tensor, Tensor | None]

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


class Scope:
    """What siblings share during one call of their parent's forward; it dies with that call."""

    def __init__(self) -> None:
        self.results: dict[Any, tuple[Result, State]] = {}  # by layer
        self.x: Tensor | None = None  # that the results were computed from
        self.call: Any = None
        self.seed: Tensor | None = None
        self.seed_x: Tensor | None = None  # that the seed was drawn for
        self.seed_version = 0


class Group:
    """Siblings under one parent, and the scope that the parent's forward opens and closes.

    Outside of a scope each layer runs alone. Scopes are per thread: two threads may run the model at once.

    Args:
        parent: the module whose forward calls the siblings.
        members: the adapted layers.
    """

    def __init__(self, parent: nn.Module, members: list[Any]):
        self.members = list(members)
        self.sets = [list(members)]  # those that are given one x; a sibling that is given another x leaves its set
        self._local = threading.local()
        self.handles = [
            parent.register_forward_pre_hook(self.open),
            parent.register_forward_hook(self.close, always_call=True),  # also when the forward raises
        ]

    def detach(self) -> None:
        """Take the hooks off the parent: from now on each layer runs alone."""
        for handle in self.handles:
            handle.remove()
        for member in self.members:
            if member.group is self:
                member.group = None

    def open(self, module: nn.Module, args: Any) -> None:
        """Begin a scope; what a call left behind that was interrupted is dropped."""
        if not torch.compiler.is_compiling():
            self._local.scope = Scope()

    def close(self, module: nn.Module, args: Any, output: Any) -> None:
        """End the scope: results that nobody asked for are dropped."""
        if not torch.compiler.is_compiling():
            self._local.scope = None

    @property
    def scope(self) -> Scope | None:
        """The scope of this thread; None outside of the parent's forward."""
        return getattr(self._local, "scope", None)

    def partners(self, member: Any) -> list[Any]:
        """The siblings that run with ``member``, itself included, in their order."""
        return next((together for together in self.sets if member in together), [member])

    def take(self, member: Any, x: Tensor, dropout: float) -> tuple[bool, Result | None]:
        """Whether something was computed for this member, and what; None if it is not for this x as it is now."""
        scope = self.scope
        if scope is None or member not in scope.results:
            return False, None
        result, state = scope.results.pop(member)
        if scope.x is not x:
            # Computed for nothing. From now on it goes its own way, with those that wait like it.
            left = [other for other in self.partners(member) if other is member or other in scope.results]
            self.sets = [[m for m in together if m not in left] for together in self.sets] + [left]
            scope.results.clear()
            return False, None
        same = scope.call == _call(x, dropout) and state.same(State(member))
        return True, result if same else None

    def share(self, first: Any, x: Tensor, dropout: float, results: list[Result]) -> Result:
        """The result of ``first``; those of its partners, in their order, wait in the scope."""
        scope, partners = self.scope, self.partners(first)
        assert scope is not None
        pairs = dict(zip(partners, results, strict=True))
        scope.x, scope.call = x, _call(x, dropout)
        scope.results = {member: (result, State(member)) for member, result in pairs.items() if member is not first}
        return pairs[first]

    def seed(self, x: Tensor) -> Tensor:  # (2,) int32
        """One dropout seed for all siblings that are given x in this scope, whether they run together or alone.

        So masks do not depend on what was shared: recomputing a pass finds them again.
        """
        scope = self.scope
        assert scope is not None
        version = 0 if x.is_inference() else x._version
        if scope.seed is None or scope.seed_x is not x or scope.seed_version != version:
            scope.seed, scope.seed_x, scope.seed_version = draw_seed(x.device), x, version
        return scope.seed

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_local"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _local=threading.local())


def _call(x: Tensor, dropout: float) -> Any:
    """What must be the same of the call when a result is picked up as when it was computed."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if autocasts(device) else None
    stream = (torch.cuda.current_stream(x.device), torch.cuda.is_current_stream_capturing()) if x.is_cuda else None
    now = x._version, x.data_ptr(), x.shape, x.stride(), x.requires_grad
    return now, torch.is_grad_enabled(), autocast, dropout, stream


class State:
    """What must be the same of the layer: its tensors and numbers, as they are now."""

    def __init__(self, member: Any):
        adapter = member.adapter
        self.tensors = [*member.stored(), *adapter.factors()]
        self.numbers = [
            adapter.scale,
            *((t._version, t.data_ptr(), t.shape, t.requires_grad) for t in self.tensors if t is not None),
        ]

    def same(self, other: State) -> bool:
        return self.numbers == other.numbers and all(a is b for a, b in zip(self.tensors, other.tensors, strict=True))


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
        ctx.pending, ctx.kept = set(range(n)), None
        ctx.rest = s, p, run, return_h, x.shape
        ctx.dtypes = downs[0].dtype, [up.dtype for up in ups]
        ctx.set_materialize_grads(False)
        rows = as_rows(x)
        down = blas.as_dtype(torch.cat(downs), x.dtype)
        if run is blas:  # which wants one dtype: cast once for both passes
            ups = tuple(blas.as_dtype(up, x.dtype) for up in ups)
        try:
            h, ys = _products(run, rows, weights, down, ups, biases, (s, p, seed))
        except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
            if not gives_way(run, "forward", rows, weights[0], downs[0], error):
                raise
            run, ups = blas, tuple(blas.as_dtype(up, x.dtype) for up in ups)
            ctx.rest = s, p, run, return_h, x.shape
            h, ys = _products(run, rows, weights, down, ups, biases, (s, p, seed))
        ys = [shaped(y, x.shape) for y in ys]
        kept = rows if any(ctx.need_downs) else None, h if any(ctx.need_ups) else None
        ctx.save_for_backward(*kept, seed, down, *weights, *ups)
        return (*ys, h) if return_h else tuple(ys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        s, p, run, return_h, shape = ctx.rest
        x, h, seed, down, *rest = _saved(ctx, grads)
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


def _saved(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Any]:
    """The saved tensors; kept here while siblings have had no gradient, so that each may run backward by itself.

    Autograd frees what was saved after the first pass, and looks at changes in place only then: so does this.
    """
    if ctx.kept is None:
        saved = ctx.saved_tensors
        versions = [None if t is None else t._version for t in saved]
    else:
        saved, versions = ctx.kept
        if versions != [None if t is None else t._version for t in saved]:
            raise RuntimeError(
                "a variable needed for gradient computation was modified by an in-place operation after a sibling of "
                "the layer ran backward"
            )
    ctx.pending -= {i for i, grad in enumerate(grads) if grad is not None}
    ctx.kept = (saved, versions) if ctx.pending else None
    return saved


def _products(run: Any, x: Tensor, weights: Any, down: Tensor, ups: Any, biases: Any, rest: Any) -> Any:
    """h (M, sum of R_i) and y_i (M, N_i): launches and nothing else."""
    h = run.project(x, down, *rest)
    parts = h.split_with_sizes([up.shape[1] for up in ups], 1)
    return h, [run.matmul_lowrank(x, *layer) for layer in zip(weights, parts, ups, biases, strict=True)]


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
