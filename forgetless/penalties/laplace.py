"""Laplace: LaLoRA's penalty, a curvature-weighted distance from the point where the curvature was measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter import Adapter, Site, whole, wide
from .base import Item, Penalty, PenaltyState, check_choice, register
from .batched import grouped
from .kfac import Kron

CURVATURES = ("diag", "kfac", "tri_kfac")
FISHERS = ("empirical", "true", "batch")
AT_ZERO = ("literal", "balanced")


@register
@dataclass(frozen=True)
class Laplace(Penalty):
    """weight / 2 * (theta - theta_0)^T (F + prior_precision) (theta - theta_0), F the Fisher information.

    "Mitigating Forgetting in Low Rank Adaptation", Sliwa et al., arXiv 2512.17720 (LaLoRA), Eq. 5: F is that of the
    adapter's own parameters on source-domain data, fitted by ``fl.calibrate``, which also sets the centre theta_0.
    The paper's weights and sample counts are not public: no parity with its numbers is claimed. With D_A, D_B the
    changes of A = down (R, K) and B = up (N, R), and F a mean over sequences:

        diag      sum f_A D_A^2 + sum f_B D_B^2
        kfac      tr(D_A^T G_t D_A S_x) + tr(D_B^T G_y D_B S_t)
        tri_kfac  the same + 2 tr(D_A^T G_c D_B S_c^T), the block between A and B; with t = A_0 x, dt = B_0^T dy this is
                  tr(D^T G_y D S_x) of the first-order change D = D_B A_0 + B_0 D_A, never negative, and computed so

    where S_x = E x x^T, S_t = E t t^T (R, R), S_c = E x t^T are means over tokens, and G_y = E dy dy^T,
    G_t = E dt dt^T (R, R), G_c = E dt dy^T sums over a sequence's tokens, meaned over sequences (the "expand" setting);
    dy is the gradient at the output of B, scale included. S_x and G_y are kept as ``columns`` eigenvectors beside a
    diagonal rest: nothing of size N x N, K x K or N x K is made, and no per-sample backward pass is run.

    **The start.** LoRA starts at B = 0, where no gradient reaches A: f_A, G_t and G_c are exactly zero, for every
    sample. Calibrated there, the published method holds B alone, A moves freely, and tri_kfac equals kfac. What to do
    is ``at_zero``'s to say; ``prior_precision``, or calibrating again after some training, holds A as well.

    Args:
        weight: factor; the Fisher entries are small (squared gradients of mean losses), so it is large.
        fisher: "empirical" takes each sequence's gradient of its mean token loss, with its own labels; "true" with
            labels drawn from the model's own prediction, one draw per token; "batch" takes the gradient of each batch's
            mean loss as one sample (the first author's published curvature code).
        prior_precision: added to every diagonal entry of F.
        curvature: "diag", "kfac" or "tri_kfac"; the latter two for adapters that train ``down`` and ``up`` themselves.
        columns: eigenvectors of S_x and G_y that are kept.
        at_zero: a layer calibrated at B = 0: "literal" leaves A free, as published; "balanced" gives A the curvature
            that it has on average over random isotropic B, scaled so that A and B have the same trace.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 1e4
    fisher: str = "empirical"
    prior_precision: float = 0.0
    curvature: str = "diag"
    columns: int = 64
    at_zero: str = "literal"

    name: ClassVar[str] = "laplace"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("fisher", FISHERS), ("curvature", CURVATURES), ("at_zero", AT_ZERO)):
            check_choice(f"Laplace.{name}", getattr(self, name), known)
        if isinstance(self.columns, bool) or not isinstance(self.columns, int) or self.columns < 0:
            raise ValueError(f"Laplace.columns is {self.columns!r}, wants an integer >= 0")
        if not 0.0 <= self.prior_precision < float("inf"):
            raise ValueError(f"Laplace.prior_precision is {self.prior_precision!r}, wants a number >= 0")

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _Diagonal(self, adapter, site) if self.curvature == "diag" else Kron(self, adapter, site)


class _Diagonal(PenaltyState):
    statistics = "gradients"
    counter = "samples"
    samples: Tensor
    fisher_down: Tensor
    fisher_up: Tensor

    def __init__(self, spec: Laplace, adapter: Adapter, site: Site):
        super().__init__(spec)
        own = dict(adapter.named_parameters(recurse=False))
        # where none is trained now, all are later: PEFT freezes adapters that are not active
        self.names = [name for name, p in own.items() if p.requires_grad] or list(own)
        self.balances = spec.at_zero == "balanced" and adapter.trains_factors
        self.at_zero = False
        self.spread: Tensor | None = None  # (K,) what at_zero="balanced" gives A, up to a factor
        for name in self.names:
            p = getattr(adapter, name).detach()
            self.register_buffer(f"fisher_{name}", torch.zeros_like(wide(p)))
            self.register_buffer(f"centre_{name}", p.clone())
        device = getattr(adapter, self.names[0]).device
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=device))

    def begin_statistics(self, adapter: Adapter) -> None:
        super().begin_statistics(adapter)
        self.spread = None
        self.at_zero = self.balances and not bool(adapter.factors()[1].any())

    def add_tokens(self, tokens: Any) -> None:
        """With at_zero="balanced", the spread, too: over B with independent entries of variance v, the mean square of
        sum_t (dy_t B)_r x_tk is v ||sum_t dy_t x_tk||^2 = v x_k^T (dY dY^T) x_k, which needs no (N, K) product."""
        for name in self.names:
            if name in tokens.gradients:
                fisher = getattr(self, f"fisher_{name}")
                squares = tokens.gradients[name].to(fisher.dtype).square()
                fisher += squares.sum(0)  # linalg.vector_norm takes fifty times as long
        self.samples += tokens.count
        if self.at_zero:
            x, dy = wide(tokens.x), wide(tokens.scaled_dy())
            seen = (((dy @ dy.transpose(1, 2)) @ x) * x).sum((0, 1))
            self.spread = seen if self.spread is None else self.spread + seen

    def end_statistics(self) -> None:
        for name in self.names:
            getattr(self, f"fisher_{name}").div_(self.samples.clamp(min=1))
        if self.spread is not None:
            trace = self.fisher_up.sum()
            share = self.spread.clamp(min=0) / self.spread.sum().clamp(min=torch.finfo(self.spread.dtype).tiny)
            self.fisher_down.copy_((trace / self.fisher_down.shape[0] * share).expand_as(self.fisher_down))
            self.spread = None

    def add_statistics(self, earlier: dict[str, Tensor]) -> None:
        for name, tensor in earlier.items():
            getattr(self, name).add_(tensor)

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        rows = [(state, adapter, name) for state, adapter, _ in items for name in state.names]

        def form(group: list[int], stack: Tensor) -> tuple[Tensor, Tensor]:
            spec, name = rows[group[0]][0].spec, rows[group[0]][2]
            centre, fisher = (
                torch.stack([getattr(rows[i][0], f"{kind}_{name}") for i in group]) for kind in ("centre", "fisher")
            )
            moved = stack.sub_(centre)
            grad = fisher.to(moved.dtype).mul_(moved)
            if spec.prior_precision:
                grad.add_(moved, alpha=spec.prior_precision)
            return 0.5 * spec.weight * torch.dot(moved.flatten(), grad.flatten()), grad.mul_(spec.weight)

        factors = [(whole(getattr(adapter, name)),) for _, adapter, name in rows]
        return grouped(factors, [(state.spec, name) for state, _, name in rows], form)
