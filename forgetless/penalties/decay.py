"""Decay: plain L2 on the adapter's parameters, the baseline every other penalty must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .base import Penalty, PenaltyState, register, wide

if TYPE_CHECKING:
    from ..methods.base import Adapter, Site


@register
@dataclass(frozen=True)
class Decay(Penalty):
    """weight / 2 * sum of squares of the trained adapter parameters, in the loss and so before clipping.

    Equals ``NullSpace`` with k >= both dimensions. Unlike AdamW's decoupled decay it passes through Adam's scaling.
    """

    weight: float = 0.03

    name: ClassVar[str] = "decay"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _Decay(self)


class _Decay(PenaltyState):
    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        total = sum(wide(p).square().sum() for p in adapter.parameters(recurse=False) if p.requires_grad)
        return 0.5 * self.spec.weight * total  # type: ignore[return-value]
