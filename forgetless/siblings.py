"""Layers fed by the same x (q/k/v, gate/up) share one projection forward and one pass over x backward.

The first sibling called with an x projects it for all of them, onto their stacked ``down`` factors; the others, called
with the very same tensor, pick up their part. Nothing is assumed: a sibling that is given another x computes on its
own and leaves the group. Results are those of the single layers up to the order of summation.

    forward   [h_1 .. h_n] = scale * x @ [down_1 .. down_n].T        one pass over x instead of n
              y_i = x @ weight_i.T + bias_i + h_i @ up_i.T
    backward  g_i = scale * dy_i @ up_i,  dup_i = dy_i.T @ h_i
              dx = sum_i dy_i @ weight_i + [g_1 .. g_n] @ [down_1 .. down_n], accumulated in place (BLAS),
                   or sum_i (dy_i @ weight_i + g_i @ down_i), each in one accumulator (kernels)
              [ddown_1 .. ddown_n] = [g_1 .. g_n].T @ x                one pass over x instead of n
"""

from __future__ import annotations

import threading
import weakref
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import blas, reference
from .ops import refuse_second_derivative

#: h (M, R) of one sibling, scale * down (R, K) in the dtype of x, and the backend
Part = tuple[Tensor, Tensor, ModuleType]

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
    """The siblings that still go together, and the projections that wait to be picked up.

    Waiting projections are per thread: two threads may run the model at once.
    """

    def __init__(self, members: list[Any]):
        self.members = list(members)  # the adapted layers
        self._local = threading.local()

    def take(self, member: Any, x: Tensor) -> tuple[Tensor, Part] | None:
        """What ``offer`` left for this member and this very x: the x to use, and its part. None if there is nothing."""
        waiting: _Waiting | None = self._local.__dict__.get("waiting")
        if waiting is None or id(member) not in waiting.parts:
            return None
        part, state = waiting.parts.pop(id(member))
        if not waiting.parts:
            self._local.waiting = None
        held = waiting.x()
        if held is x and state == _state(x, member.adapter.down):
            return waiting.alias, part
        if held is not None and held is not x:
            # Projected along for nothing. From now on it goes its own way, with those that wait like it.
            left = [other for other in self.members if other is member or id(other) in waiting.parts]
            self.members = [other for other in self.members if all(other is not gone for gone in left)]
            self._local.waiting = None
            group = Group(left)
            for other in left:
                other.group = group
        return None

    def offer(self, x: Tensor, alias: Tensor, parts: dict[Any, Part]) -> None:
        """Leave projections of x for the other members."""
        held = {id(member): (part, _state(x, member.adapter.down)) for member, part in parts.items()}
        self._local.waiting = _Waiting(x, alias, held) if held else None

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


def _state(x: Tensor, down: Tensor) -> Any:
    """What must be the same when a projection is picked up as when it was made."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return x._version, id(down), down._version, torch.is_grad_enabled(), autocast


class _Waiting:
    def __init__(self, x: Tensor, alias: Tensor, parts: dict[int, tuple[Part, Any]]):
        self.x = weakref.ref(x)
        self.alias = alias
        self.parts = parts


def project_stacked(x: Tensor, downs: list[Tensor], scale: float, run: ModuleType) -> tuple[Tensor, list[Part]]:
    """h_i = scale * x @ down_i.T for all i, in one pass over x.

    Args:
        x: (M, K).
        downs: (R_i, K) each.
        scale: of all of them.
        run: the backend.

    Returns:
        The x to hand to ``add_lowrank``, and for each i its h (M, R_i) and scale * down_i in the dtype of x.
    """
    with torch.no_grad():
        stacked = (torch.cat(downs) * scale).to(x.dtype)
    alias, *parts = _ProjectStacked.apply(x, stacked, scale, run, *downs)
    rows = stacked.split([down.shape[0] for down in downs])
    return (alias if x.requires_grad else x), [(h, row, run) for h, row in zip(parts, rows, strict=True)]


def add_lowrank(x: Tensor, weight: Tensor, part: Part, up: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias + h @ up.T, with x and the part from ``project_stacked``."""
    h, down, run = part
    return _AddLowrank.apply(x, weight, h, up, bias, down, run)


def _fuses(run: ModuleType) -> bool:
    """Whether dx takes its low-rank term inside each sibling's kernel; else once, in place, for all of them."""
    return run is not blas and run is not reference


class _ProjectStacked(torch.autograd.Function):
    """Hands x through, so that the gradients of all uses meet here and can take the low-rank term in place."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, stacked: Tensor, scale: float, run: ModuleType, *downs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.ranks = [down.shape[0] for down in downs]
        ctx.scale, ctx.down_dtype = scale, downs[0].dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[4:]) else None, stacked)
        ctx.set_materialize_grads(False)
        ctx.run = run
        return (x, *run.project(x, stacked).split(ctx.ranks, dim=1))

    @staticmethod
    def backward(ctx: Any, dx: Tensor | None, *dhs: Tensor | None) -> tuple[Any, ...]:
        refuse_second_derivative()
        x, stacked = ctx.saved_tensors
        like = next((t for t in (*dhs, dx) if t is not None), None)
        if like is None:
            return (None,) * (4 + len(dhs))
        run = ctx.run
        rows = like.shape[0]
        g = torch.cat(
            [like.new_zeros(rows, r) if dh is None else dh for r, dh in zip(ctx.ranks, dhs, strict=True)], dim=1
        )
        ddowns: list[Tensor | None] = [None] * len(dhs)
        if x is not None:
            wanted = ctx.needs_input_grad[4:]
            parts = run.outer(g, x, 0.0, None, ctx.down_dtype).mul_(ctx.scale).split(ctx.ranks)
            ddowns = [part if want else None for part, want in zip(parts, wanted, strict=True)]
        if not ctx.needs_input_grad[0]:
            dx = None
        elif dx is None:
            dx = g @ stacked
        elif not _fuses(run):
            # Ours alone: the sum of what the _AddLowrank calls returned, seen by nobody else.
            dx = dx.addmm_(g, stacked)
        return (dx, None, None, None, *ddowns)


class _AddLowrank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, h: Tensor, up: Tensor, bias: Tensor | None, down: Tensor, run: ModuleType
    ) -> Tensor:
        need_weight, need_up = ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        ctx.up_dtype, ctx.run = up.dtype, run
        if not _fuses(run):  # BLAS wants one dtype: cast once for both passes
            up = up.to(x.dtype)
        ctx.save_for_backward(x if need_weight else None, weight, h if need_up else None, up, down)
        return run.matmul_lowrank(x, weight, h, up, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x, weight, h, up, down = ctx.saved_tensors
        need_x, need_weight, need_h, need_up, need_bias = ctx.needs_input_grad[:5]
        run = ctx.run
        dx = dh = dup = None
        if need_up:
            dh, out = run.project_outer(dy, up.T, h, 1.0, ctx.up_dtype)
            dup = out.T
        elif need_h or need_x:
            dh = run.project(dy, up.T)
        if need_x:
            dx = run.matmul_lowrank(dy, weight.T, dh, down.T) if _fuses(run) else dy @ weight
        return dx, dy.T @ x if need_weight else None, dh, dup, dy.sum(0) if need_bias else None, None, None
