"""AdaptedLinear: a frozen layer and its adapter, run as one op."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .methods.base import Adapter, Method, Site
from .ops import lowrank_linear

#: ``fl.drift`` looks at this many evenly spaced tokens of the last forward pass at most.
DRIFT_TOKENS = 128


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): weight (in_features, out_features). Told by its type, never by its shape."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def site_of(name: str, base: nn.Module) -> Site:
    """The layer as a method sees it."""
    transposed = is_conv1d(base)
    weight: Tensor = base.weight  # type: ignore[assignment]
    return Site(name, weight.detach().T if transposed else weight.detach(), transposed)


@dataclass
class Trace:
    """What the last forward pass left behind."""

    x: Tensor  # (tokens <= DRIFT_TOKENS, K), detached
    h: Tensor  # (the same tokens, R), detached
    hidden: Tensor | None  # (M, R) with its graph, only if a penalty needs it


class AdaptedLinear(nn.Module):
    """y = base(x) + scale * (drop(x) @ down.T) @ up.T, as one op.

    ``weight`` and ``bias`` are the base layer's, for code that looks at them; the base is not changed until merged.
    """

    def __init__(self, base: nn.Module, adapter: Adapter, method: Method, name: str):
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.method = method
        self.name = name
        self.transposed = is_conv1d(base)
        self.trace: Trace | None = None
        self.needs_hidden = any(state.needs_hidden for state in adapter.penalty_states())

    @property
    def weight(self) -> Tensor:
        return self.base.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias  # type: ignore[return-value]

    @property
    def in_features(self) -> int:
        return self.weight.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[1 if self.transposed else 0]

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        weight = self.weight.T if self.transposed else self.weight
        down, up = self.adapter.factors()
        dropout = self.adapter.dropout if self.training else 0.0
        y, h = lowrank_linear(x, weight, down, up, self.bias, self.adapter.scale, dropout, return_h=True)
        self.trace = self._trace(x, h)
        return y

    def _trace(self, x: Tensor, h: Tensor) -> Trace:
        hidden = h.flatten(0, -2) if self.needs_hidden else None
        x, h = x.detach().reshape(-1, x.shape[-1]) if x.numel() else x.detach().new_empty(0, x.shape[-1]), h.detach()
        h = h.reshape(-1, h.shape[-1]) if h.numel() else h.new_empty(0, h.shape[-1])
        step = -(-x.shape[0] // DRIFT_TOKENS) or 1
        return Trace(x[::step].clone(), h[::step].clone(), hidden)

    def drift(self) -> float | None:
        """Mean over tokens of ||delta x|| / ||x|| in the last forward pass, CLoRA's F (Eq. 3); None before one."""
        if self.trace is None or self.trace.x.shape[0] == 0:
            return None
        with torch.no_grad():
            x, h = self.trace.x.float(), self.trace.h.float()
            up = self.adapter.factors()[1].float()
            moved = ((h @ (up.T @ up)) * h).sum(1).clamp(min=0).sqrt()
            return (moved / x.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).mean().item()

    def delta(self) -> Tensor:  # (N, K) float32, or float64
        """scale * up @ down in at least float32, as ``fl.merge`` adds it."""
        down, up = (t.detach().to(torch.promote_types(t.dtype, torch.float32)) for t in self.adapter.factors())
        return self.adapter.scale * (up @ down)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "trace": None}  # a graph can be neither copied nor pickled

    def extra_repr(self) -> str:
        return f"method={self.method}"
