"""The fast path of the penalties: all layers at once, values and gradients in closed form, few and large products.

``PenaltyState.value`` is the formula for one layer in plain autograd; what is here sums the same over all layers once
per optimiser step. Like layers are stacked, so that a model costs a handful of batched products, and the gradient is
worked out beside the value: nothing is kept for a backward pass but the gradients themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import wide

#: (factors, which need a gradient) -> (value, gradient or None for each factor)
Compute = Callable[[list[Tensor], list[bool]], tuple[Tensor, list[Tensor | None]]]


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, *factors: Tensor) -> Tensor:
        value, ctx.grads = compute(list(factors), list(ctx.needs_input_grad[1:]))
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        if dvalue.device.type == "cpu" and dvalue.item() == 1.0:  # the usual case costs nothing where asking is free
            return (None, *ctx.grads)
        return (None, *(None if grad is None else grad * dvalue.to(grad.dtype) for grad in ctx.grads))


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
    return tuple(t.shape), t.dtype, t.device


def gram_form(
    factors: list[Tensor],  # down_1, up_1, down_2, up_2, ..
    needs: list[bool],
    weights: list[float],  # of each layer, scale^2 included
    covariances: list[Tensor | None],  # None for the identity, (K,) or (K, K)
) -> tuple[Tensor, list[Tensor | None]]:
    """sum_i weight_i <up_i^T up_i, down_i S_i down_i^T> and its gradients 2 w up (A S A^T), 2 w (B^T B) A S."""
    grads: list[Tensor | None] = [None] * len(factors)
    total = wide(factors[0]).new_zeros(())
    layers = range(len(weights))
    keys = [
        (
            like(factors[2 * i]),
            like(factors[2 * i + 1]),
            None if covariances[i] is None else covariances[i].dim(),  # type: ignore[union-attr]
        )
        for i in layers
    ]
    for group in buckets(keys):
        down = wide(torch.stack([factors[2 * i] for i in group]))  # (L, R, K)
        up = wide(torch.stack([factors[2 * i + 1] for i in group]))  # (L, N, R)
        weight = torch.tensor([weights[i] for i in group], dtype=down.dtype, device=down.device)[:, None, None]
        seen = down
        if covariances[group[0]] is not None:
            S = torch.stack([covariances[i] for i in group]).to(down.dtype)  # type: ignore[misc]
            seen = down * S[:, None, :] if S.dim() == 2 else down @ S
        outside = up.transpose(1, 2) @ up  # (L, R, R)
        inside = seen @ down.transpose(1, 2)
        total = total + (weight * outside * inside).sum()
        if any(needs[2 * i] for i in group):
            for i, grad in zip(group, ((2.0 * weight * outside) @ seen).unbind(), strict=True):
                grads[2 * i] = grad.to(factors[2 * i].dtype) if needs[2 * i] else None
        if any(needs[2 * i + 1] for i in group):
            for i, grad in zip(group, (up @ (2.0 * weight * inside)).unbind(), strict=True):
                grads[2 * i + 1] = grad.to(factors[2 * i + 1].dtype) if needs[2 * i + 1] else None
    return total, grads
