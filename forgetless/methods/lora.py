"""LoRA: delta = alpha / rank * B @ A, A random, B zero (Hu et al., arXiv 2106.09685)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..adapter import Adapter, Site, adapter_dtype, whole
from ..penalties import Penalty
from .base import Method, register


@dataclass(frozen=True)
class LowRank(Method):
    """A method whose adapter is LoRA's, and that differs in its penalties."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0

    reads_weight: ClassVar[bool] = False
    adapts_experts: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank

    def build(self, site: Site) -> Adapter:
        return LoRAAdapter(site, self.rank, self.scale, self.dropout)


@register
@dataclass(frozen=True)
class LoRA(LowRank):
    """delta = alpha / rank * B A, the plain low-rank adapter (Hu et al., arXiv 2106.09685, Eq. 3).

    A (R, K) starts as PEFT's (uniform), B (N, R) at zero; both in float32, or float64 in a float64 model.

    Args:
        rank: R, columns of the update; it may be larger than the layer's N or K, as of a router or a small head.
        alpha: the update is scaled by alpha / rank, or alpha / sqrt(rank) if ``rslora`` (arXiv 2312.03732).
        dropout: of the adapter's input, in [0, 1).
        rslora: rank-stabilised scaling.
        penalties: what to add to the loss so that the model does not forget.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    rslora: bool = False
    penalties: tuple[Penalty, ...] = ()

    name: ClassVar[str] = "lora"

    @property
    def scale(self) -> float:
        """alpha / rank, or alpha / sqrt(rank)"""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoRAAdapter(Adapter):
    """``down`` (R, K) is PEFT's lora_A, ``up`` (N, R) its lora_B. Initialised as PEFT does by default."""

    def __init__(self, site: Site, rank: int, scale: float, dropout: float):
        super().__init__()
        self.scale, self.dropout = scale, dropout
        N, K = site.weight.shape
        dtype, device = adapter_dtype(site.weight), site.weight.device
        self.down = nn.Parameter(torch.empty(rank, K, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.zeros(N, rank, dtype=dtype, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    @torch.no_grad()
    def restart(self, site: Site) -> None:
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))
        self.up.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        table = self._parameters  # a module's attribute costs a microsecond
        down, up = table.get("down"), table.get("up")
        if type(down) is nn.Parameter is type(up):
            return down, up
        return whole(self.down), whole(self.up)

    def pullback(self, ddown: Tensor, dup: Tensor) -> dict[str, Tensor]:
        return {"down": ddown, "up": dup}
