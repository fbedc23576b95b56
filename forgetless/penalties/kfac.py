"""The Kronecker-factored forms of ``Laplace``: B-KFAC and B-Tri-KFAC of one adapter, without a large matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Site, wide
from .base import Item, PenaltyState
from .batched import grouped
from .covariance import Covariance, apply_stacked, largest, named_under


class Kron(PenaltyState):
    """State of ``Laplace(curvature="kfac" | "tri_kfac")`` on one layer; see ``Laplace`` for the formulas.

    Buffers: ``inputs`` S_x (K, K) and ``outputs`` G_y (N, N) as ``Covariance``, gram_x = S_t (R, R), gram_y = G_t
    (R, R), the centres, and ``samples``, the sequences seen.
    """

    statistics = "tokens"
    counter = "samples"
    inputs: Covariance
    outputs: Covariance
    gram_x: Tensor
    gram_y: Tensor
    centre_down: Tensor
    centre_up: Tensor
    samples: Tensor

    def __init__(self, spec: Any, adapter: Adapter, site: Site):
        super().__init__(spec)
        if not adapter.trains_factors:
            raise ValueError(
                f"Laplace.curvature is {spec.curvature!r}, but {type(adapter).__name__} does not train down and up "
                "themselves; wants 'diag' there"
            )
        N, K = site.weight.shape
        down, up = (t.detach() for t in adapter.factors())
        R = down.shape[0]
        self.inputs, self.outputs = (Covariance(spec.columns, n, site.weight) for n in (K, N))
        for name in ("gram_x", "gram_y"):
            self.register_buffer(name, wide(down).new_zeros(R, R))
        self.register_buffer("centre_down", down.clone())
        self.register_buffer("centre_up", up.clone())
        self.register_buffer("samples", torch.zeros((), dtype=torch.int64, device=down.device))
        self.at_zero = False  # whether it is being calibrated at B = 0

    def begin_statistics(self, adapter: Adapter) -> None:
        super().begin_statistics(adapter)
        self.at_zero = not bool(self.centre_up.any())

    def add_tokens(self, tokens: Any) -> None:
        dy = tokens.scaled_dy().flatten(0, 1)
        x = tokens.real_x()
        t = wide(x.to(dy.dtype) @ self.centre_down.to(dy.dtype).T)
        self.gram_x.addmm_(t.T, t)
        self.outputs.add(dy)
        self.samples += tokens.count
        if not self.at_zero:
            dt = wide(dy @ self.centre_up.to(dy.dtype))
            self.gram_y.addmm_(dt.T, dt)
        if not self.at_zero or self.spec.at_zero == "balanced":  # else S_x meets G_t = 0
            self.inputs.add(x)
        else:
            self.inputs.tokens += x.shape[0]

    def end_statistics(self) -> None:
        samples, seen = self.samples.clamp(min=1), self.inputs.tokens.clamp(min=1)
        self.inputs.finish()
        self.outputs.finish(samples)
        self.gram_x /= seen
        self.gram_y /= samples
        if self.at_zero and self.spec.at_zero == "balanced":
            trace = self.outputs.diagonal().sum() * self.gram_x.diagonal().sum()
            spread = self.inputs.diagonal().sum() * self.gram_y.shape[0]
            self.gram_y.diagonal().copy_(trace / spread.clamp(min=torch.finfo(spread.dtype).tiny))

    def add_statistics(self, earlier: dict[str, Tensor]) -> None:
        """Gradient factors add up, input factors are averaged: a task seen twice then counts twice, not four times."""
        before, now = earlier["inputs.tokens"].double(), self.inputs.tokens.double()
        whole = (before + now).clamp(min=1)
        self.gram_x.mul_(now / whole).add_(earlier["gram_x"] * (before / whole))
        self.gram_y += earlier["gram_y"]
        self.samples += earlier["samples"]
        for name, theirs, mine in (("inputs", before / whole, now / whole), ("outputs", 1.0, 1.0)):
            cov: Covariance = getattr(self, name)
            part = named_under(f"{name}.", earlier)
            for key in ("rest", "spectrum"):
                if key in part:
                    part[key] = part[key] * theirs
                    getattr(cov, key).mul_(mine)
            cov.merge(part)

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        states = [state for state, _, _ in items]

        def form(group: list[int], down: Tensor, up: Tensor) -> Parts:
            alike = [states[i] for i in group]
            spec = alike[0].spec
            centres = [stacked(alike, name) for name in ("centre_down", "centre_up")]
            down, up = down.sub_(centres[0]), up.sub_(centres[1])
            inside, ddown, dup = (_tri if spec.curvature == "tri_kfac" else _separate)(alike, down, up, *centres)
            if spec.prior_precision:
                inside = inside + spec.prior_precision * (down.square().sum() + up.square().sum())
                ddown = ddown.add_(down, alpha=spec.prior_precision)
                dup = dup.add_(up, alpha=spec.prior_precision)
            return 0.5 * spec.weight * inside, ddown.mul_(spec.weight), dup.mul_(spec.weight)

        copied = [largest((s.inputs, s.outputs)) for s in states]
        return grouped([a.factors() for _, a, _ in items], [s.spec for s in states], form, copied)


def stacked(states: list[Kron], name: str) -> Tensor:
    """That buffer of all of them."""
    return torch.stack([getattr(state, name) for state in states])


#: The form without the half and the weight, and half its gradients in down and up.
Parts = tuple[Tensor, Tensor, Tensor]


def _separate(states: list[Kron], down: Tensor, up: Tensor, A0: Tensor, B0: Tensor) -> Parts:
    """<G_t, D_A S_x D_A^T> + <S_t, D_B^T G_y D_B> for the changes down (L, R, K), up (L, N, R)."""
    gram_x, gram_y = (stacked(states, name).to(down.dtype) for name in ("gram_x", "gram_y"))
    seen_out = apply_stacked([s.outputs for s in states], up.mT)  # (L, R, N)
    inside, dup = (gram_x * (seen_out @ up)).sum(), seen_out.mT @ gram_x
    # calibrated at B = 0 nothing holds A: 15 ms of a step on SmolLM2-135M, asked where asking is free
    if gram_y.device.type == "cpu" and type(gram_y) is Tensor and not gram_y.any():
        return inside, torch.zeros_like(down), dup
    seen = apply_stacked([s.inputs for s in states], down)  # (L, R, K)
    return inside + (gram_y * (seen @ down.mT)).sum(), gram_y @ seen, dup


def _tri(states: list[Kron], down: Tensor, up: Tensor, A0: Tensor, B0: Tensor) -> Parts:
    """<[A_0; D_A] S_x [A_0; D_A]^T, [D_B, B_0]^T G_y [D_B, B_0]>, which is ``_separate`` where B_0 = 0.

    There the first and the last block are those that were measured, S_t and G_t. A choice by values, on the device.
    """
    R = down.shape[1]
    A0, B0 = A0.to(down.dtype), B0.to(down.dtype)
    rows, lift = torch.cat((A0, down), dim=1), torch.cat((up, B0), dim=2)  # (L, 2 R, K), (L, N, 2 R)
    seen = apply_stacked([s.inputs for s in states], rows)
    seen_out = apply_stacked([s.outputs for s in states], lift.mT)
    inner, outer = seen @ rows.mT, seen_out @ lift  # (L, 2 R, 2 R)
    trained = B0.flatten(1).any(1)[:, None, None]
    gram_x, gram_y = (stacked(states, name).to(down.dtype) for name in ("gram_x", "gram_y"))
    inner[:, :R, :R] = torch.where(trained, inner[:, :R, :R], gram_x)
    outer[:, R:, R:] = torch.where(trained, outer[:, R:, R:], gram_y)
    return (inner * outer).sum(), outer[:, R:] @ seen, seen_out.mT @ inner[:, :, :R]
