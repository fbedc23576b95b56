"""Decay: plain L2 on the adapter's parameters, the baseline every other penalty must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..adapter import Adapter, Site, whole, wide
from .base import Item, Penalty, PenaltyState, register
from .batched import buckets, closed_form, like, scatter


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
    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        total = sum(wide(whole(p)).square().sum() for p in adapter.parameters(recurse=False) if p.requires_grad)
        return 0.5 * self.spec.weight * total  # type: ignore[return-value]

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        weights: list[float] = []
        parameters: list[Tensor] = []
        for state, adapter, _ in items:
            mine = [whole(p) for p in adapter.parameters(recurse=False) if p.requires_grad]
            parameters += mine
            weights += [state.spec.weight] * len(mine)

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            grads: list[Tensor | None] = [None] * len(factors)
            value = wide(factors[0]).new_zeros(())
            for group in buckets([(weights[i], like(p)) for i, p in enumerate(factors)]):
                stack = wide(torch.stack([factors[i] for i in group]))
                flat = stack.flatten()
                value = value + 0.5 * weights[group[0]] * torch.dot(flat, flat)
                scatter(grads, group, stack.mul_(weights[group[0]]), needs, factors[group[0]])
            return value, grads

        return closed_form(compute, parameters)
