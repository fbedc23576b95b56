"""Layers fed by the same x (q/k/v, gate/up) share one projection forward and one pass over x backward.

The first sibling called with an x projects it for all of them, onto their stacked ``down`` factors; the others, called
with the very same tensor, pick up their part. Nothing is assumed: a sibling that is given another x computes on its
own and leaves the group. Results are those of the single layers up to the order of summation.

    forward   [h_1 .. h_n] = scale * x @ [down_1 .. down_n].T        one pass over x instead of n
              y_i = x @ weight_i.T + bias_i + h_i @ up_i.T
    backward  g_i = scale * dy_i @ up_i,  dup_i = dy_i.T @ h_i
              dx = sum_i dy_i @ weight_i + [g_1 .. g_n] @ [down_1 .. down_n], accumulated in place
              [ddown_1 .. ddown_n] = [g_1 .. g_n].T @ x                one pass over x instead of n
"""

from __future__ import annotations

import threading
import weakref
from typing import Any

import torch
from torch import Tensor

from .ops import plan_for

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

    def take(self, member: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """What ``offer`` left for this member and this very x: the x to use, and h. None if there is nothing."""
        waiting: _Waiting | None = self._local.__dict__.get("waiting")
        if waiting is None or id(member) not in waiting.parts:
            return None
        h = waiting.parts.pop(id(member))
        alias = waiting.alias
        if not waiting.parts:
            self._local.waiting = None
        held = waiting.x()
        if held is x and waiting.version == x._version and waiting.grad == torch.is_grad_enabled():
            return alias, h
        if held is not None and held is not x:  # projected along for nothing: from now on it goes its own way
            self.members = [other for other in self.members if other is not member]
        return None

    def offer(self, x: Tensor, alias: Tensor, parts: dict[int, Tensor]) -> None:
        """Leave projections of x for the other members, by their ids."""
        self._local.waiting = _Waiting(x, alias, parts) if parts else None

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["members"])  # type: ignore[misc]


class _Waiting:
    def __init__(self, x: Tensor, alias: Tensor, parts: dict[int, Tensor]):
        self.x = weakref.ref(x)
        self.version = x._version
        self.grad = torch.is_grad_enabled()
        self.alias = alias
        self.parts = parts


def project_stacked(x: Tensor, downs: list[Tensor], scale: float) -> tuple[Tensor, list[Tensor]]:
    """h_i = scale * x @ down_i.T for all i, in one pass over x.

    Args:
        x: (M, K).
        downs: (R_i, K) each.
        scale: of all of them.

    Returns:
        The x to hand to ``add_lowrank``, and the h_i (M, R_i), columns of one matrix.
    """
    alias, *parts = _ProjectStacked.apply(x, scale, *downs)
    return (alias if x.requires_grad else x), parts


def add_lowrank(x: Tensor, weight: Tensor, h: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
    """y = x @ weight.T + bias + h @ up.T, with x and h from ``project_stacked``."""
    return _AddLowrank.apply(x, weight, h, up, bias)


class _ProjectStacked(torch.autograd.Function):
    """Hands x through, so that the gradients of all uses meet here and take the low-rank term in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *downs: Tensor) -> tuple[Tensor, ...]:
        run = plan_for(x.device, x.dtype)[0]
        stacked = torch.cat(downs).to(x.dtype)
        ctx.ranks = [down.shape[0] for down in downs]
        ctx.scale = scale
        ctx.save_for_backward(x if any(ctx.needs_input_grad[2:]) else None, stacked)
        ctx.down_dtype = downs[0].dtype
        ctx.set_materialize_grads(False)
        h = run.project(x, stacked, scale)
        return (x, *h.split(ctx.ranks, dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dx: Tensor | None, *dhs: Tensor | None) -> tuple[Any, ...]:
        x, stacked = ctx.saved_tensors
        like = next((t for t in (*dhs, dx) if t is not None), None)
        if like is None:
            return (None,) * (2 + len(dhs))
        run = plan_for(like.device, like.dtype)[0]
        rows = like.shape[0]
        g = torch.cat(
            [like.new_zeros(rows, r) if dh is None else dh for r, dh in zip(ctx.ranks, dhs, strict=True)], dim=1
        ).mul_(ctx.scale)
        ddowns: list[Tensor | None] = [None] * len(dhs)
        if x is not None:
            wanted = ctx.needs_input_grad[2:]
            parts = run.outer(g, x, 0.0, None, ctx.down_dtype).split(ctx.ranks)
            ddowns = [part if want else None for part, want in zip(parts, wanted, strict=True)]
        if not ctx.needs_input_grad[0]:
            dx = None
        elif dx is None:
            dx = g @ stacked
        else:
            # Ours alone: the sum of what the _AddLowrank calls returned, seen by nobody else.
            dx = dx.addmm_(g, stacked)
        return (dx, None, *ddowns)


class _AddLowrank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, h: Tensor, up: Tensor, bias: Tensor | None) -> Tensor:
        run = plan_for(x.device, x.dtype)[0]
        _, need_weight, _, need_up, _ = ctx.needs_input_grad
        ctx.up_dtype = up.dtype
        if x.device.type == "cpu":  # BLAS wants one dtype: cast once for both passes
            up = up.to(x.dtype)
        ctx.save_for_backward(x if need_weight else None, weight, h if need_up else None, up)
        return run.matmul_lowrank(x, weight, h, up, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, up = ctx.saved_tensors
        need_x, need_weight, need_h, need_up, need_bias = ctx.needs_input_grad
        run = plan_for(dy.device, dy.dtype)[0]
        return (
            dy @ weight if need_x else None,
            dy.T @ x if need_weight else None,
            run.project(dy, up.T) if need_h else None,
            run.outer(dy, h, 0.0, None, ctx.up_dtype) if need_up else None,
            dy.sum(0) if need_bias else None,
        )
