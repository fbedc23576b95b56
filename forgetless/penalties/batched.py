"""All layers at once: like layers are stacked, values and gradients are in closed form.

``PenaltyState.value`` is the formula for one layer in plain autograd. ``PenaltyState.total`` sums the same over all
layers, once per optimiser step, in a few batched products. Stacks are made in each call and dropped with it: a stack
that is kept would have to follow every way in which a user can change a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adapter import wide
from ..ops.rows import Products

#: Bytes of one stack, at most. On a CPU it should stay in the cache and in memory that malloc has at hand (SmolLM2,
#: NullSpace: 72 ms, 150 ms in one stack each); elsewhere the bound keeps large bases from taking twice their memory.
STACK_BYTES_CPU = 4 << 20
STACK_BYTES = 64 << 20

#: (indices of the layers, their factors stacked (L, ..) and at least float32) -> (value, the gradient of each stack)
Form = Callable[..., tuple[Tensor, ...]]


class _ClosedForm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, list[Tensor]]], places: Any, *factors: Tensor) -> Tensor:
        value, grads = compute(factors)
        ctx.save_for_backward(*grads)  # each of the factors at its ``places``, which its cut gives apart
        ctx.places, ctx.count = places, len(factors)
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dvalue: Tensor) -> tuple[Tensor | None, ...]:
        stacks = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * ctx.count
        for scaled, stack, (places, cut) in zip(torch._foreach_mul(stacks, dvalue), stacks, ctx.places, strict=True):
            for place, grad in zip(places, cut(scaled.to(stack.dtype)), strict=True):
                grads[place] = grad
        return (None, None, *grads)


def grouped(
    layers: Sequence[tuple[Tensor, ...]],
    keys: Sequence[Hashable],
    form: Form,
    copied: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """The sum of ``form`` over groups of like layers, differentiable once in the factors, by form's own gradients.

    Args:
        layers: the factors of each layer, as many for each.
        keys: of each layer; a group has one key, and factors of the same shapes, dtypes and devices.
        form: value and gradients of one group.
        copied: of each layer, the largest tensor that ``form`` stacks beside the factors, or None.

    Returns:
        A scalar, at least float32.
    """
    width = len(layers[0])
    others = [None] * len(layers) if copied is None else copied
    nbytes = [max(t.nbytes for t in (*row, t) if t is not None) for row, t in zip(layers, others, strict=True)]
    limit = STACK_BYTES_CPU if layers[0][0].device.type == "cpu" else STACK_BYTES
    groups = buckets([(key, *map(_like, row)) for key, row in zip(keys, layers, strict=True)], nbytes, limit)

    places = [([width * i + j for i in group], Tensor.unbind) for group in groups for j in range(width)]

    def compute(factors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        grads: list[Tensor] = []
        values: list[Tensor] = []
        for group in groups:
            stacks = [wide(torch.stack([factors[width * i + j] for i in group])) for j in range(width)]
            value, *parts = form(group, *stacks)
            values.append(value)
            grads += [part.to(factors[width * group[0] + j].dtype).contiguous() for j, part in enumerate(parts)]
        return values[0] if len(values) == 1 else torch.stack(values).sum(), grads

    total: Tensor = _ClosedForm.apply(compute, places, *(factor for row in layers for factor in row))
    return total


def joined(made: Sequence[Products], keys: Sequence[Hashable], form: Form) -> Tensor:
    """``grouped`` over layers whose one factor each is their products, as the passes made them.

    Args:
        made: the products of one or more layers each.
        keys: of each layer; those of one key have as many rows.
        form: as of ``grouped``; it may write to the stack.
    """
    zs = [z for _, z in made]
    if keys.count(keys[0]) < len(keys):
        lengths = [sum([one.length(z.shape[1]) for one in rows]) for of_layers, z in made for rows in of_layers]
        return grouped([(part,) for part in torch.cat(zs).split_with_sizes(lengths)], keys, form)
    rows = [z.shape[0] for z in zs]

    def compute(zs: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
        z = wide(torch.cat(zs))
        value, grad = form(range(len(keys)), z.view(len(keys), -1, z.shape[1]))
        return value, [grad.reshape(z.shape)]

    places = [(range(len(zs)), lambda grad: grad.split_with_sizes(rows))]
    total: Tensor = _ClosedForm.apply(compute, places, *zs)
    return total


def buckets(keys: Sequence[Hashable], nbytes: Sequence[int], limit: int) -> list[list[int]]:
    """Indices of equal keys together, in order of first appearance; ``limit`` bytes a group, or one index alone."""
    groups: dict[Hashable, list[list[int]]] = {}
    for index, (key, size) in enumerate(zip(keys, nbytes, strict=True)):
        parts = groups.setdefault(key, [[]])
        if parts[-1] and (len(parts[-1]) + 1) * size > limit:  # those of one key are of one size
            parts.append([])
        parts[-1].append(index)
    return [part for parts in groups.values() for part in parts]


def _like(t: Tensor) -> tuple[Hashable, ...]:
    """What must agree for tensors to be stacked."""
    return t.shape, t.dtype, t.device
