"""Adapted layers whose base runs itself, the low-rank product added onto what it returns.

For weights that cannot be read as a matrix here: packed ones (``forgetless.layers.quantized``), those cut over
processes (``forgetless.layers.tensor_parallel``), and layers with hooks or a forward of their own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import Adapter
from ..methods.base import Method
from .experts import AdaptedExperts
from .frozen import hooked, is_plain
from .linear import AdaptedLinear
from .quantized import Kind, kind_of, stand_in
from .stack import Stack
from .tensor_parallel import Cut, broadcast_parameters, cut_of, gathered_columns
from .trace import Trace


class AdaptedAround(AdaptedLinear):
    """An adapted layer that runs its base as it is: hooks and all."""

    around = True

    def runs_base(self) -> bool:
        return True


class AdaptedPacked(AdaptedAround):
    """``weight`` is a stand-in: its shape, dtype and device are true, the numbers are NaN."""

    def __init__(self, base: nn.Module, adapter: Adapter, method: Method, name: str, kind: Kind):
        super().__init__(base, adapter, method, name)
        self.kind = kind

    @property
    def reason(self) -> str:
        return f"{self.kind.title} makes x W^T itself"

    @property
    def frozen(self) -> Tensor:
        return stand_in(self.base, self.kind.dtype(self.base))


class AdaptedSharded(AdaptedAround):
    """Tensor parallel: ``weight`` is a DTensor, x or y this rank's columns."""

    cut: Cut
    lends_weight = False

    def __init__(self, base: nn.Module, adapter: Adapter, method: Method, name: str, cut: Cut):
        super().__init__(base, adapter, method, name)
        self.cut = cut
        broadcast_parameters(adapter, cut)

    @property
    def reason(self) -> str:
        return f"its weight is cut {'row' if self.cut.dim else 'column'}-wise over {self.cut.mesh.size()} processes"

    def drift(self) -> float | None:
        """As of AdaptedLinear; a collective call where the weight is cut row-wise."""
        trace = self.trace
        if trace is None or trace.x is None or self.cut.dim == 0:
            return super().drift()
        self.trace = Trace(gathered_columns(trace.x, self.cut, self.in_features), None)
        try:
            return super().drift()
        finally:
            self.trace = trace

    def _parts(self, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight: Any = self.weight
        return weight.to_local(), *self.cut.local(down, up)

    def _of_all(self, norms: Tensor) -> Tensor:
        squares = norms.square()
        torch.distributed.all_reduce(squares, group=self.cut.group)
        return squares.sqrt()


def wrap(base: nn.Module, adapter: Adapter, method: Method, name: str) -> AdaptedLinear:
    """The adapted layer that fits the base as it is now."""
    if isinstance(base, Stack):
        return AdaptedExperts(base, adapter, method, name)
    kind, cut = kind_of(base), cut_of(base)
    if kind is not None:
        return AdaptedPacked(base, adapter, method, name, kind)
    if cut is not None:
        return AdaptedSharded(base, adapter, method, name, cut)
    return (AdaptedAround if hooked(base) or not is_plain(base) else AdaptedLinear)(base, adapter, method, name)
