"""Laplace: LaLoRA's penalty, a curvature-weighted distance from the point where the curvature was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from .base import Item, Penalty, PenaltyState, register, wide
from .grouped import closed_form

if TYPE_CHECKING:
    from ..methods.base import Adapter, Site


@register
@dataclass(frozen=True)
class Laplace(Penalty):
    """weight / 2 * sum over parameters of (fisher + prior_precision) * (theta - theta_0)^2.

    "Mitigating Forgetting in Low Rank Adaptation", Sliwa et al., arXiv 2512.17720 (LaLoRA), diagonal form: the Fisher
    information of the adapter's own parameters on source-domain data, fitted by ``fl.calibrate``, which also sets the
    centre theta_0. The paper's weights and sample counts are not public: no parity with its numbers is claimed.

    At the usual LoRA start up = 0, so the gradient of ``down`` is zero for every sample and so is its Fisher
    information: calibrated there, the penalty holds ``up`` alone, element by element. That is the literal method. To
    hold ``down`` too, give ``prior_precision``, or calibrate again after some training.

    Args:
        weight: factor; the Fisher entries are small (squared gradients of mean losses), so it is large.
        fisher: "empirical" squares each sequence's gradient of its mean token loss and averages over sequences;
            "batch" squares the gradient of each batch's mean loss and averages over batches (the first author's
            published curvature code).
        prior_precision: added to every Fisher entry.
    """

    weight: float = 1e4
    fisher: str = "empirical"
    prior_precision: float = 0.0

    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher not in ("empirical", "batch"):
            raise ValueError(f"Laplace.fisher is {self.fisher!r}, wants 'empirical' or 'batch'")
        if not 0.0 <= self.prior_precision < float("inf"):
            raise ValueError(f"Laplace.prior_precision is {self.prior_precision!r}, wants a number >= 0")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _Laplace(self, adapter)


class _Laplace(PenaltyState):
    statistics = "gradients"
    samples: Tensor

    def __init__(self, spec: Laplace, adapter: Adapter):
        super().__init__(spec)
        self.nonzero: list[str] | None = None
        self.names = [name for name, p in adapter.named_parameters(recurse=False) if p.requires_grad]
        for name in self.names:
            p = getattr(adapter, name).detach()
            self.register_buffer(f"fisher_{name}", torch.zeros_like(wide(p)))
            self.register_buffer(f"centre_{name}", p.clone())
        device = getattr(adapter, self.names[0]).device
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))

    def begin_statistics(self, adapter: Adapter) -> None:
        self.nonzero = None
        for name in self.names:
            getattr(self, f"fisher_{name}").zero_()
            getattr(self, f"centre_{name}").copy_(getattr(adapter, name).detach())
        self.samples.zero_()

    def add_gradients(self, grads: dict[str, Tensor], share: Tensor) -> None:
        assert isinstance(self.spec, Laplace)
        if self.spec.fisher == "batch":
            for name in self.names:
                getattr(self, f"fisher_{name}").add_(grads[name].sum(0).square())
            self.samples += 1
            return
        # contribution to the batch's mean -> gradient of the sequence's own mean; one without labels has none
        factor = torch.where(share > 0, 1.0 / share, 0.0).square()
        for name in self.names:
            getattr(self, f"fisher_{name}").add_(torch.einsum("s...,s->...", grads[name].square(), factor))
        self.samples += (share > 0).sum()

    def end_statistics(self) -> None:
        self.nonzero = None
        for name in self.names:
            getattr(self, f"fisher_{name}").div_(self.samples.clamp(min=1))

    def export_statistics(self) -> dict[str, Tensor]:
        names = [f"fisher_{name}" for name in self.names]
        return {name: getattr(self, name).clone() for name in [*names, "samples"]}

    def add_statistics(self, held: dict[str, Tensor]) -> None:
        self.nonzero = None
        for name, tensor in held.items():
            getattr(self, name).add_(tensor)

    def reset_caches(self) -> None:
        super().reset_caches()
        self.nonzero = None

    @property
    def calibrated(self) -> bool:
        return bool(self.samples > 0)

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        spec = self.spec
        assert isinstance(spec, Laplace)
        total: Tensor | float = 0.0
        for name in self.names:
            moved = wide(getattr(adapter, name)) - wide(getattr(self, f"centre_{name}"))
            precision = getattr(self, f"fisher_{name}").to(moved.dtype) + spec.prior_precision
            total = total + (precision * moved.square()).sum()
        return 0.5 * spec.weight * total  # type: ignore[return-value]

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        rows = [
            (state, getattr(adapter, name), getattr(state, f"fisher_{name}"), getattr(state, f"centre_{name}"))
            for state, adapter, _ in items
            for name in state.active_names()
        ]

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            value = wide(rows[0][1]).new_zeros(())
            grads: list[Tensor | None] = []
            for (state, _, fisher, centre), theta, need in zip(rows, factors, needs, strict=True):
                moved = wide(theta) - wide(centre)
                grad = moved * fisher.to(moved.dtype)
                if state.spec.prior_precision:
                    grad.add_(moved, alpha=state.spec.prior_precision)
                grad.mul_(state.spec.weight)
                value = value + 0.5 * torch.vdot(moved.flatten(), grad.flatten())
                grads.append(grad.to(theta.dtype) if need else None)
            return value, grads

        if not rows:
            return torch.stack([wide(next(adapter.parameters())).new_zeros(()) for _, adapter, _ in items]).sum()
        return closed_form(compute, [row[1] for row in rows])

    def active_names(self) -> list[str]:
        """Parameters that the penalty can move: all but those whose precision is identically zero."""
        spec = self.spec
        assert isinstance(spec, Laplace)
        if spec.prior_precision:
            return self.names
        if self.nonzero is None:  # asked once after each calibration or load
            self.nonzero = [name for name in self.names if bool(getattr(self, f"fisher_{name}").any())]
        return self.nonzero
