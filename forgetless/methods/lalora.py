"""LaLoRA: LoRA with a penalty weighted by the curvature of the loss on source text (arXiv 2512.17720)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..penalties import Laplace, Penalty
from .base import register
from .lora import LowRank


@register
@dataclass(frozen=True)
class LaLoRA(LowRank):
    """LoRA + ``Laplace``: call ``fl.calibrate(model, batches)`` with source-domain batches before training.

    Sliwa et al., arXiv 2512.17720, the penalty of its Eq. 5.

    Args:
        rank: as of ``LoRA``.
        alpha: as of ``LoRA``.
        dropout: as of ``LoRA``.
        weight: factor of the penalty.
        curvature: "diag", "kfac" or "tri_kfac".
        fisher: as of ``Laplace``.
        prior_precision: as of ``Laplace``.
        columns: as of ``Laplace``.
        at_zero: as of ``Laplace``, which also says what happens to A when B starts at zero.
        penalties: more of them.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 1e4
    curvature: str = "diag"
    fisher: str = "empirical"
    prior_precision: float = 0.0
    columns: int = 64
    at_zero: str = "literal"
    penalties: tuple[Penalty, ...] = ()

    name: ClassVar[str] = "lalora"

    def all_penalties(self) -> tuple[Penalty, ...]:
        own = Laplace(self.weight, self.fisher, self.prior_precision, self.curvature, self.columns, self.at_zero)
        return (own, *self.penalties)
