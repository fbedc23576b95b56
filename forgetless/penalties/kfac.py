"""The Kronecker-factored forms of ``Laplace``: B-KFAC and B-Tri-KFAC of one adapter, without a large matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..adapter import Adapter, Site, wide
from .base import Item, PenaltyState
from .batched import applied, buckets, closed_form, like, one_storage, scatter
from .covariance import Covariance
from .laplace import Laplace, trains_factors


class Kron(PenaltyState):
    """State of ``Laplace(curvature="kfac" | "tri_kfac")`` on one layer; see ``Laplace`` for the formulas.

    Buffers: ``inputs`` S_x (K, K) and ``outputs`` G_y (N, N) as ``Covariance``, gram_x = S_t (R, R), gram_y = G_t
    (R, R), the centres, and ``samples``, the sequences seen.
    """

    statistics = "tokens"
    inputs: Covariance
    outputs: Covariance
    gram_x: Tensor
    gram_y: Tensor
    centre_down: Tensor
    centre_up: Tensor
    samples: Tensor

    def __init__(self, spec: Laplace, adapter: Adapter, site: Site):
        super().__init__(spec)
        if not trains_factors(adapter):
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
        self.kind: str | None = None

    def begin_statistics(self, adapter: Adapter) -> None:
        down, up = adapter.factors()
        self.kind = None
        self.inputs.reset()
        self.outputs.reset()
        for name in ("gram_x", "gram_y", "samples"):
            getattr(self, name).zero_()
        self.centre_down.copy_(down.detach())
        self.centre_up.copy_(up.detach())
        self.at_zero = not bool(up.any())

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
        if not self.at_zero or self._spec.at_zero == "balanced":  # else S_x meets G_t = 0
            self.inputs.add(x)
        else:
            self.inputs.tokens += x.shape[0]

    def end_statistics(self) -> None:
        self.kind = None
        samples, seen = self.samples.clamp(min=1), self.inputs.tokens.clamp(min=1)
        self.inputs.finish()
        self.outputs.finish(samples)
        self.gram_x /= seen
        self.gram_y /= samples
        if self.at_zero and self._spec.at_zero == "balanced":
            trace = self.outputs.diagonal().sum() * self.gram_x.diagonal().sum()
            spread = self.inputs.diagonal().sum() * self.gram_y.shape[0]
            self.gram_y.diagonal().copy_(trace / spread.clamp(min=torch.finfo(spread.dtype).tiny))

    def export_statistics(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.state_dict().items() if not k.startswith("centre_")}

    def add_statistics(self, held: dict[str, Tensor]) -> None:
        """Gradient factors add up, input factors are averaged: a task seen twice then counts twice, not four times."""
        self.kind = None
        before, now = held["inputs.tokens"].double(), self.inputs.tokens.double()
        whole = (before + now).clamp(min=1)
        self.gram_x.mul_(now / whole).add_(held["gram_x"] * (before / whole))
        self.gram_y += held["gram_y"]
        self.samples += held["samples"]
        for name, theirs, mine in (("inputs", before / whole, now / whole), ("outputs", 1.0, 1.0)):
            cov: Covariance = getattr(self, name)
            part = {k.removeprefix(f"{name}."): v for k, v in held.items() if k.startswith(f"{name}.")}
            for key in ("rest", "spectrum"):
                if key in part:
                    part[key] = part[key] * theirs
                    getattr(cov, key).mul_(mine)
            cov.merge(part)

    def reset_caches(self) -> None:
        super().reset_caches()
        self.kind = None

    @property
    def calibrated(self) -> bool:
        return bool(self.samples > 0)

    @property
    def _spec(self) -> Laplace:
        assert isinstance(self.spec, Laplace)
        return self.spec

    def form(self) -> str:
        """ "up" where nothing holds A, "both" for two separate terms, "tri" for the form of the first-order change."""
        if self.kind is None:  # asked once after each calibration or load
            self.kind = "up"
            if bool(self.gram_y.any()):
                self.kind = "both"
            if self._spec.curvature == "tri_kfac" and bool(self.centre_up.any()):
                self.kind = "tri"
        return self.kind

    def value(self, adapter: Adapter, hidden: Tensor | None) -> Tensor:
        down, up = (wide(t) for t in adapter.factors())
        A0, B0 = (t.to(down.dtype) for t in (self.centre_down, self.centre_up))
        moved_down, moved_up = down - A0, up - B0
        total = self._spec.prior_precision * (moved_down.square().sum() + moved_up.square().sum())
        if self.form() == "tri":
            rows, lift = torch.cat((A0, moved_down)), torch.cat((moved_up, B0), dim=1)
            seen = self.inputs.apply_to(rows) @ rows.T
            total = total + (seen * (self.outputs.apply_to(lift.T) @ lift)).sum()
        else:
            gram_x, gram_y = (g.to(down.dtype) for g in (self.gram_x, self.gram_y))
            total = total + (gram_x * (self.outputs.apply_to(moved_up.T) @ moved_up)).sum()
            total = total + (gram_y * (self.inputs.apply_to(moved_down) @ moved_down.T)).sum()
        return 0.5 * self._spec.weight * total

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        states = [state for state, _, _ in items]
        factors = [factor for _, adapter, _ in items for factor in adapter.factors()]

        def compute(factors: list[Tensor], needs: list[bool]) -> tuple[Tensor, list[Tensor | None]]:
            value = wide(factors[0]).new_zeros(())
            grads: list[Tensor | None] = [None] * len(factors)
            keys = [(s.form(), s.spec, like(factors[2 * i]), like(factors[2 * i + 1])) for i, s in enumerate(states)]
            for group in buckets(keys):
                spec = states[group[0]].spec
                rows = [2 * i for i in group], [2 * i + 1 for i in group]
                here = [states[i] for i in group]
                moved = [
                    wide(torch.stack([factors[i] for i in where])).sub_(one_storage(here, f"centre_{name}"))
                    for where, name in zip(rows, ("down", "up"), strict=True)
                ]
                inside, found = _forms[states[group[0]].form()](here, moved[0], moved[1])
                value = value + 0.5 * spec.weight * inside
                for where, grad, change in zip(rows, found, moved, strict=True):
                    if spec.prior_precision:
                        value = value + 0.5 * spec.weight * spec.prior_precision * change.square().sum()
                        change = change.mul_(spec.prior_precision)
                        grad = change if grad is None else grad.add_(change)
                    if grad is not None:
                        scatter(grads, where, grad.mul_(spec.weight), needs, factors[where[0]])
            return value, grads

        return closed_form(compute, factors)


Found = tuple[Tensor, list[Any]]  # the form (without the half and the weight), half its gradients in down and up


def _up(states: list[Any], down: Tensor, up: Tensor) -> Found:  # (L, R, K), (L, N, R)
    seen = applied([s.outputs for s in states], up.transpose(1, 2))  # (L, R, N)
    gram = one_storage(states, "gram_x").to(up.dtype)
    inside = (gram * (seen @ up)).sum()
    return inside, [None, seen.transpose(1, 2) @ gram]


def _both(states: list[Any], down: Tensor, up: Tensor) -> Found:
    inside, (_, dup) = _up(states, down, up)
    seen = applied([s.inputs for s in states], down)
    gram = one_storage(states, "gram_y").to(down.dtype)
    return inside + (gram * (seen @ down.transpose(1, 2))).sum(), [gram @ seen, dup]


def _tri(states: list[Any], down: Tensor, up: Tensor) -> Found:
    A0, B0 = (one_storage(states, name).to(down.dtype) for name in ("centre_down", "centre_up"))
    R = down.shape[1]
    rows = torch.cat((A0, down), dim=1)  # (L, 2 R, K)
    lift = torch.cat((up, B0), dim=2)  # (L, N, 2 R)
    seen = applied([s.inputs for s in states], rows)
    seen_out = applied([s.outputs for s in states], lift.transpose(1, 2))
    inner, outer = seen @ rows.transpose(1, 2), seen_out @ lift
    return (inner * outer).sum(), [outer[:, R:] @ seen, seen_out.transpose(1, 2) @ inner[:, :, :R]]


_forms = {"up": _up, "both": _both, "tri": _tri}
