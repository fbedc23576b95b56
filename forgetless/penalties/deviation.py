"""Penalties on what the update does: to the weight, to the last batch's outputs, to the source domain's outputs.

All three use the same identity. With delta = scale * up @ down and any positive semidefinite S,
E ||delta x||^2 = scale^2 <up^T up, down S down^T> where S = E x x^T: only rank-by-rank matrices appear.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Item, Penalty, PenaltyState, gram_product, register, wide
from .grouped import closed_form, gram_form

if TYPE_CHECKING:
    from ..methods.base import Adapter, Site


@register
@dataclass(frozen=True)
class WeightDeviation(Penalty):
    """weight * ||scale * up @ down||_F^2: the squared Frobenius norm of the change of the layer's weight."""

    weight: float = 0.01

    name: ClassVar[str] = "weight-deviation"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _WeightDeviation(self)


class _WeightDeviation(PenaltyState):
    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        down, up = adapter.factors()
        return self.spec.weight * gram_product(wide(down), wide(up), adapter.scale)

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        return _gram_total(items, [None] * len(items))


@register
@dataclass(frozen=True)
class OutputDeviation(Penalty):
    """weight * mean over the last batch's tokens of ||scale * up @ down @ drop(x)||^2.

    The square of the change of the layer's output, from h = scale * drop(x) @ down.T (M, R) alone:
    weight / M * <h^T h, up^T up>. Under dropout it is the dropped-out x that counts. Its gradient reaches x as well.
    """

    weight: float = 0.01

    name: ClassVar[str] = "output-deviation"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _OutputDeviation(self)


class _OutputDeviation(PenaltyState):
    needs_hidden = True

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        down, up = adapter.factors()
        up = wide(up)
        if hidden is None or hidden.shape[0] == 0:  # no forward pass yet: nothing has deviated
            return up.new_zeros(())
        _check_graph(hidden, down)
        h = wide(hidden)
        return self.spec.weight / h.shape[0] * ((h.T @ h) * (up.T @ up)).sum()

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        rows = []
        for state, adapter, hidden in items:
            if hidden is not None and hidden.shape[0]:
                down, up = adapter.factors()
                _check_graph(hidden, down)
                rows.append((state.spec.weight / hidden.shape[0], hidden, up))

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            value = wide(factors[0]).new_zeros(())
            grads: list[Tensor | None] = []
            for i, (weight, _, _) in enumerate(rows):
                hidden, up = factors[2 * i : 2 * i + 2]
                h, u = wide(hidden), wide(up)
                seen, out = h.T @ h, u.T @ u
                value = value + weight * (seen * out).sum()
                grads.append((2.0 * weight * (h @ out)).to(hidden.dtype) if needs[2 * i] else None)
                grads.append((2.0 * weight * (u @ seen)).to(up.dtype) if needs[2 * i + 1] else None)
            return value, grads

        if not rows:
            return torch.stack([state.value(adapter, None) for state, adapter, _ in items]).sum()
        return closed_form(compute, [t for _, hidden, up in rows for t in (hidden, up)])


def _check_graph(hidden: Tensor, down: Tensor) -> None:
    if torch.is_grad_enabled() and down.requires_grad and not hidden.requires_grad:
        raise ValueError(
            "OutputDeviation: the last forward pass kept no graph, so the gradient of down would be missing; run it "
            "with gradients, checkpoint with use_reentrant=False, or look at the value under torch.no_grad()"
        )


@register
@dataclass(frozen=True)
class SourceDeviation(Penalty):
    """weight * E_source ||scale * up @ down @ x||^2: the expected change of the output on source-domain inputs.

    The covariance S = E x x^T of the layer's own input is measured by ``fl.calibrate`` on text whose behaviour must
    be kept (this project's own; the same quadratic form as activation-weighted regularisers in the literature).

    Args:
        weight: factor of the summed term.
        covariance: "diag" keeps E x_j^2 only (K numbers a layer); "full" keeps the (K, K) matrix.
    """

    weight: float = 0.03
    covariance: str = "diag"

    name: ClassVar[str] = "source-deviation"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.covariance not in ("diag", "full"):
            raise ValueError(f"SourceDeviation.covariance is {self.covariance!r}, wants 'diag' or 'full'")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _SourceDeviation(self, site)


class _SourceDeviation(PenaltyState):
    statistics = "inputs"
    covariance: Tensor
    tokens: Tensor

    def __init__(self, spec: SourceDeviation, site: Site):
        super().__init__(spec)
        K = site.weight.shape[1]
        dtype = torch.promote_types(site.weight.dtype, torch.float32)
        shape = (K,) if spec.covariance == "diag" else (K, K)
        self.register_buffer("covariance", torch.zeros(shape, dtype=dtype, device=site.weight.device))
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64, device=site.weight.device))

    def begin_statistics(self, adapter: Adapter) -> None:
        self.covariance.zero_()
        self.tokens.zero_()

    def add_inputs(self, x: Tensor) -> None:
        x = x.to(self.covariance.dtype)
        if self.covariance.dim() == 1:
            self.covariance += x.square().sum(0)
        else:
            self.covariance.addmm_(x.T, x)
        self.tokens += x.shape[0]

    def end_statistics(self) -> None:
        self.covariance /= self.tokens.clamp(min=1)

    def export_statistics(self) -> dict[str, Tensor]:
        return {"covariance": self.covariance.clone(), "tokens": self.tokens.clone()}

    def add_statistics(self, held: dict[str, Tensor]) -> None:
        self.covariance += held["covariance"]
        self.tokens += held["tokens"]

    @property
    def calibrated(self) -> bool:
        return bool(self.tokens > 0)

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        down, up = (wide(t) for t in adapter.factors())
        S = self.covariance.to(down.dtype)
        weighted = down * S if S.dim() == 1 else down @ S
        return self.spec.weight * adapter.scale**2 * ((up.T @ up) * (weighted @ down.T)).sum()

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        return _gram_total(items, [item.state.covariance for item in items])


def _gram_total(items: list[Item], covariances: list[Tensor | None]) -> Tensor:
    weights = [state.spec.weight * adapter.scale**2 for state, adapter, _ in items]
    factors = [factor for _, adapter, _ in items for factor in adapter.factors()]
    return closed_form(lambda f, needs: gram_form(f, needs, weights, covariances), factors)
