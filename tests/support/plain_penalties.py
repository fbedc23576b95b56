"""The value of each penalty of one layer by its formula, in plain autograd: what the closed forms must equal."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from forgetless.adapter import whole, wide


def plain_value(state: Any, adapter: Any, hidden: Tensor | None) -> Tensor:
    """What ``state.value(adapter, hidden)`` is."""
    down, up = (wide(t) for t in adapter.factors())
    formula = FORMULAS.get(state.spec.name)
    if formula is None:
        return state.value(adapter, hidden)
    return state.spec.weight * formula(state, adapter, down, up, hidden)


def decay(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    squares = [wide(whole(p)).square().sum() for p in adapter.parameters(recurse=False) if p.requires_grad]
    return 0.5 * torch.stack(squares).sum() if squares else up.new_zeros(())


def null_space(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    pairs = (state.input, down), (state.output, up.T)
    return 0.5 * sum(basis.stacked([basis], rows[None])[0] for basis, rows in pairs)


def weight_deviation(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    return adapter.scale**2 * ((up.T @ up) * (down @ down.T)).sum()


def output_deviation(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    if hidden is None or hidden.shape[0] == 0:
        return up.new_zeros(())
    h = wide(hidden)
    return ((h.T @ h) * (up.T @ up)).sum() / h.shape[0]


def source_deviation(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    return adapter.scale**2 * ((up.T @ up) * (times(down, state.source) @ down.T)).sum()


def loss_deviation(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    rises = [((times(up.T, p.outputs) @ up) * (times(down, p.inputs) @ down.T)).sum() for p in state.pairs]
    return 0.5 * adapter.scale**2 * torch.stack(rises).sum()


def laplace(state: Any, adapter: Any, down: Tensor, up: Tensor, hidden: Tensor | None) -> Tensor:
    return 0.5 * (diagonal(state, adapter) if state.spec.curvature == "diag" else kronecker(state, down, up))


def diagonal(state: Any, adapter: Any) -> Tensor:
    terms = []
    for name in state.names:
        moved = wide(whole(getattr(adapter, name))) - wide(getattr(state, f"centre_{name}"))
        precision = getattr(state, f"fisher_{name}").to(moved.dtype) + state.spec.prior_precision
        terms.append((precision * moved.square()).sum())
    return torch.stack(terms).sum()


def kronecker(state: Any, down: Tensor, up: Tensor) -> Tensor:
    A0, B0 = (t.to(down.dtype) for t in (state.centre_down, state.centre_up))
    moved_down, moved_up = down - A0, up - B0
    gram_x, gram_y = (g.to(down.dtype) for g in (state.gram_x, state.gram_y))
    total = (gram_x * (times(moved_up.T, state.outputs) @ moved_up)).sum()
    total = total + (gram_y * (times(moved_down, state.inputs) @ moved_down.T)).sum()
    if state.spec.curvature == "tri_kfac":
        rows, lift = torch.cat((A0, moved_down)), torch.cat((moved_up, B0), dim=1)
        inner = times(rows, state.inputs) @ rows.T
        total = torch.where(B0.any(), (inner * (times(lift.T, state.outputs) @ lift)).sum(), total)
    return total + state.spec.prior_precision * (moved_down.square().sum() + moved_up.square().sum())


def times(rows: Tensor, covariance: Any) -> Tensor:  # (R, K) -> (R, K)
    """rows @ S in the dtype of ``rows``, differentiable in them."""
    if covariance.full:
        return rows @ covariance.matrix.to(rows.dtype)
    result = rows * covariance.rest.to(rows.dtype)
    if covariance.columns:
        basis = covariance.basis.to(rows.dtype)
        result = result + ((rows @ basis) * covariance.spectrum.to(rows.dtype)) @ basis.T
    return result


FORMULAS = {
    "decay": decay,
    "laplace": laplace,
    "loss-deviation": loss_deviation,
    "null-space": null_space,
    "output-deviation": output_deviation,
    "source-deviation": source_deviation,
    "weight-deviation": weight_deviation,
}
