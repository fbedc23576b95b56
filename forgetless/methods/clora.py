"""CLoRA: LoRA whose factors are kept out of a frozen random subspace (Lu et al., arXiv 2410.16801)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..penalties import NullSpace, Penalty
from .base import register
from .lora import LowRank


@register
@dataclass(frozen=True)
class CLoRA(LowRank):
    """LoRA + ``NullSpace``: loss + weight / 2 * sum over layers of ||A P||^2 + ||B^T Q||^2.

    Lu et al., ACL 2025, arXiv 2410.16801, with the conventions of the authors' code.

    Args:
        rank: as of ``LoRA``.
        alpha: as of ``LoRA``.
        dropout: as of ``LoRA``.
        k: width of the protected subspace, the paper's main knob (128 to 2048 there).
        weight: factor of the penalty, 1 in the paper.
        basis: "orthogonal" (the paper's), "shared" (one per width) or "hadamard" (no storage); see ``NullSpace``.
        seed: of the bases.
        penalties: more of them.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    k: int = 256
    weight: float = 1.0
    basis: str = "orthogonal"
    seed: int = 0
    penalties: tuple[Penalty, ...] = ()

    name: ClassVar[str] = "clora"

    def all_penalties(self) -> tuple[Penalty, ...]:
        return (NullSpace(self.weight, self.k, self.basis, self.seed), *self.penalties)
