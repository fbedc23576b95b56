"""Decay: plain L2 on the adapter's parameters, the baseline every other penalty must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import Adapter, Site, whole
from .base import Item, Penalty, PenaltyState, nothing, register
from .batched import grouped


@register
@dataclass(frozen=True)
class Decay(Penalty):
    """weight / 2 * sum of squares of the trained adapter parameters, in the loss and so before clipping.

    Equals ``NullSpace`` with k >= both dimensions. Unlike AdamW's decoupled decay it passes through Adam's scaling.

    Args:
        weight: factor of the term, >= 0.

    Raises:
        ValueError: weight is something else.
    """

    weight: float = 0.03

    name: ClassVar[str] = "decay"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _Decay(self)


class _Decay(PenaltyState):
    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        rows = [
            (state.spec.weight, whole(p))
            for state, adapter, _ in items
            for p in adapter.parameters(recurse=False)
            if p.requires_grad
        ]
        if not rows:
            return nothing(items[0].adapter)
        weights = [weight for weight, _ in rows]

        def form(group: list[int], stack: Tensor) -> tuple[Tensor, Tensor]:
            weight = weights[group[0]]
            return 0.5 * weight * torch.dot(stack.flatten(), stack.flatten()), stack.mul_(weight)

        return grouped([(p,) for _, p in rows], weights, form)
