"""The fast path of the penalties: all layers at once, values and gradients in closed form, few and large products.

``PenaltyState.value`` is the formula for one layer in plain autograd; what is here sums the same over all layers once
per optimiser step. Like layers are stacked, so that a model costs a handful of batched products, and the gradient is
worked out beside the value: nothing is kept for a backward pass but the gradients themselves.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import wide
from .covariance import Covariance

#: (factors, which need a gradient) -> (value, gradient or None for each factor)
Compute = Callable[[list[Tensor], list[bool]], tuple[Tensor, list[Tensor | None]]]


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, *factors: Tensor) -> Tensor:
        ctx.compute, ctx.needs = compute, list(ctx.needs_input_grad[1:])
        ctx.save_for_backward(*factors)
        value, ctx.grads = compute(list(factors), ctx.needs)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # given away, so that they become .grad without a copy
        if grads is None:  # a second pass over a retained graph
            grads = ctx.compute(list(ctx.saved_tensors), ctx.needs)[1]
        if dvalue.device.type == "cpu" and dvalue.item() == 1.0:  # the usual case costs nothing where asking is free
            return (None, *grads)
        scaled = iter(torch._foreach_mul([grad for grad in grads if grad is not None], dvalue))
        return (None, *(None if grad is None else next(scaled).to(grad.dtype) for grad in grads))


def closed_form(compute: Compute, factors: Sequence[Tensor]) -> Tensor:
    """compute's value, differentiable in the factors by compute's own gradients."""
    return _ClosedForm.apply(compute, *factors)


def buckets(keys: Sequence[Any]) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance."""
    found: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        found.setdefault(key, []).append(index)
    return list(found.values())


def like(t: Tensor) -> tuple[Any, ...]:
    """What must agree for tensors to be stacked."""
    return t.shape, t.dtype, t.device


def one_storage(owners: Sequence[nn.Module], name: str) -> Tensor:
    """The owners' buffers of that name as one tensor (L, ..), without a copy per step: they become views of it."""
    held = _stacks.setdefault(owners[0], {}).get(name)
    if held is not None:
        stack, parts = held
        if len(parts) == len(owners) and all(o._buffers[name] is p for o, p in zip(owners, parts, strict=True)):
            return stack
    stack = torch.stack([owner._buffers[name] for owner in owners])  # type: ignore[misc]
    parts = stack.unbind()
    for owner, part in zip(owners, parts, strict=True):
        owner._buffers[name] = part
    _stacks[owners[0]][name] = stack, parts
    return stack


#: By the first owner: buffer name -> the stack and its parts, as the owners hold them if it still counts.
_stacks: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[Tensor, Sequence[Tensor]]]] = weakref.WeakKeyDictionary()


class Scratch:
    """Memory for passing results of a model's penalties, kept from step to step: fresh pages cost a CPU more than the
    arithmetic. One part for all groups of layers in turn. On other devices the allocator does this already."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, torch.dtype], Tensor] = {}

    @staticmethod
    def of(owner: nn.Module) -> Scratch:
        """That of the model which ``owner`` stands for, and of this thread."""
        held = _scratch.__dict__.setdefault("of", weakref.WeakKeyDictionary())
        found = held.get(owner)
        if found is None:
            found = held[owner] = Scratch()
        return found

    def like(self, t: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        """Contiguous, values undefined; taking a name again overwrites what was there."""
        dtype = dtype or t.dtype
        if t.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=t.device)
        size = math.prod(shape)
        part = self._parts.get((name, dtype))
        if part is None or part.numel() < size:
            part = self._parts[name, dtype] = torch.empty(size, dtype=dtype)
        return part[:size].view(shape)


_scratch = threading.local()


def scatter(grads: list[Tensor | None], indices: Sequence[int], stack: Tensor, needs: list[bool], like: Tensor) -> None:
    """Put the rows of ``stack`` where ``indices`` says, in the dtype of ``like``."""
    stack = stack.to(like.dtype)  # once for all layers
    for i, part in zip(indices, stack.unbind(), strict=True):
        grads[i] = part if needs[i] else None


class Side:
    """One side of a stack of quadratic forms: rows F_i and covariances S_i, i.e. F_i S_i and F_i S_i F_i^T.

    Args:
        factors: (R, dim) each, or (dim, R) if ``tall``; of any dims, one R.
        covariances: S_i (dim, dim), None for the identity. Layers that share one are done in one product.
    """

    def __init__(self, factors: Sequence[Tensor], covariances: Sequence[Covariance | None], tall: bool):
        self.factors, self.tall = factors, tall
        users: dict[int, list[int]] = {}  # layers in order, those of one covariance together
        for i, cov in enumerate(covariances):
            users.setdefault(i if cov is None else -1 - id(cov), []).append(i)
        owners = list(users.values())
        first = [group[0] for group in owners]
        keys = [(like(factors[i]), len(group), _form(covariances[i])) for i, group in zip(first, owners, strict=True)]
        self.groups = [[i for g in bucket for i in owners[g]] for bucket in buckets(keys)]
        self.seen = []
        inner = []
        for group in self.groups:
            rows = wide(torch.stack([factors[i] for i in group]))
            rows = rows.transpose(1, 2) if tall else rows  # (L, R, dim)
            shared = list({id(covariances[i]): covariances[i] for i in group}.values())
            seen = rows if shared[0] is None else applied(shared, rows)  # type: ignore[arg-type]
            self.seen.append(seen)
            inner.append(seen @ rows.transpose(1, 2))
        order = [i for group in self.groups for i in group]
        self.place = {i: at for at, i in enumerate(order)}
        self.order = order
        self.inner = torch.cat(inner) if len(inner) > 1 else inner[0]  # (L, R, R), grouped: see ``order``

    def in_order(self, other: Side) -> Tensor:
        """Our inner products in the other side's order."""
        if self.order == other.order:
            return self.inner
        index = torch.tensor([self.place[i] for i in other.order])
        return self.inner[index.to(self.inner.device)]

    def gradients(self, outer: Tensor, grads: list[Tensor | None], at: list[int], needs: list[bool]) -> None:
        """outer_i F_i S_i, with ``outer`` (L, R, R) symmetric and in our order, written to grads[at[i]]."""
        start = 0
        for group, seen in zip(self.groups, self.seen, strict=True):
            part = outer[start : start + len(group)]
            start += len(group)
            where = [at[i] for i in group]
            if any(needs[i] for i in where):
                grad = seen.transpose(1, 2) @ part if self.tall else part @ seen
                scatter(grads, where, grad, needs, self.factors[group[0]])


def _form(covariance: Covariance | None) -> Any:
    return None if covariance is None else (covariance.full, covariance.columns)


def applied(covariances: list[Covariance], rows: Tensor) -> Tensor:
    """rows S for rows (L, R, dim), L a multiple of the number of covariances, those of one S together."""
    L, R, dim = rows.shape
    U = len(covariances)
    if L > U:
        rows = rows.reshape(U, -1, dim)

    def stacked(name: str) -> Tensor:
        return one_storage(covariances, name).to(rows.dtype)

    if covariances[0].full:
        seen = rows @ stacked("matrix")
    else:
        seen = rows * stacked("rest")[:, None]
        if covariances[0].columns:
            basis = stacked("basis")
            seen.baddbmm_((rows @ basis).mul_(stacked("spectrum")[:, None]), basis.transpose(1, 2))
    return seen.view(L, R, dim) if L > U else seen


def gram_form(
    factors: list[Tensor],  # down_1, up_1, down_2, up_2, ..
    needs: list[bool],
    weights: list[float],  # of each layer, scale^2 included
    inputs: Sequence[Covariance | None],  # S_i (K, K), None for the identity
    outputs: Sequence[Covariance | None] | None = None,  # G_i (N, N)
    tall: bool = False,  # whether down_i is given as its transpose (K, R)
) -> tuple[Tensor, list[Tensor | None]]:
    """sum_i weight_i <up_i^T G_i up_i, down_i S_i down_i^T> and its gradients 2 w G up (A S A^T), 2 w (B^T G B) A S."""
    grads: list[Tensor | None] = [None] * len(factors)
    total = wide(factors[0]).new_zeros(())
    outputs = [None] * len(weights) if outputs is None else outputs
    for group in buckets([(factors[2 * i + 1].shape[1], factors[2 * i + 1].device) for i in range(len(weights))]):
        down = Side([factors[2 * i] for i in group], [inputs[i] for i in group], tall)
        up = Side([factors[2 * i + 1] for i in group], [outputs[i] for i in group], True)
        weight = torch.tensor([weights[i] for i in group], dtype=down.inner.dtype).to(down.inner.device)[:, None, None]
        outside = up.in_order(down) * weight[down.order]
        total = total + (outside * down.inner).sum()
        down.gradients(outside.mul_(2.0), grads, [2 * i for i in group], needs)
        if any(needs[2 * i + 1] for i in group):
            inside = down.in_order(up) * (2.0 * weight[up.order])
            up.gradients(inside, grads, [2 * i + 1 for i in group], needs)
    return total, grads
