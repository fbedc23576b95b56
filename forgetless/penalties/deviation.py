"""Penalties on what the update does: to the weight, to the last batch's outputs, to the source domain's outputs.

All three use the same identity. With delta = scale * up @ down and any positive semidefinite S,
E ||delta x||^2 = scale^2 <up^T up, down S down^T> where S = E x x^T: only rank-by-rank matrices appear.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..adapter import Adapter, Site, wide
from ..ops.rows import Products, Rows
from .base import Item, Penalty, PenaltyState, nothing, register
from .batched import grouped, joined
from .covariance import Covariance, apply_stacked, largest, named_under


@register
@dataclass(frozen=True)
class WeightDeviation(Penalty):
    """weight * ||scale * up @ down||_F^2: the squared Frobenius norm of the change of the layer's weight.

    Taken as scale^2 <up^T up, down down^T>: no (N, K) matrix is made.

    Args:
        weight: factor of the term, >= 0.

    Raises:
        ValueError: weight is something else.
    """

    weight: float = 0.01

    name: ClassVar[str] = "weight-deviation"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _WeightDeviation(self)


#: Of one layer: S (K, K) and G (N, N), None for the identity.
Pairs = Sequence[tuple[Covariance | None, Covariance | None]]


class Gram(PenaltyState):
    """weight * factor * scale^2 * sum over ``moments`` of <up^T G up, down S down^T>."""

    factor: ClassVar[float] = 1.0

    def moments(self) -> Pairs:
        return [(None, None)]

    @classmethod
    def weights(cls, items: list[Item]) -> list[float]:
        return [cls.factor * state.spec.weight * adapter.scale**2 for state, adapter, _ in items]

    @classmethod
    def total(cls, items: list[Item]) -> Tensor:
        layers = [adapter.factors() for _, adapter, _ in items]
        return gram_form(layers, cls.weights(items), [state.moments() for state, _, _ in items])

    @classmethod
    def total_made(cls, items: list[Item], made: list[Products]) -> Tensor:
        sources = [state.moments()[0][0] for state, _, _ in items]
        return _gram_made(made, cls.weights(items), [s.spectrum if s and s.columns else None for s in sources])


class _WeightDeviation(Gram):
    def rows(self) -> tuple[Rows, ...]:
        return Rows("up"), Rows("down")


@register
@dataclass(frozen=True)
class OutputDeviation(Penalty):
    """weight * mean over the last pass's tokens of ||scale * up @ down @ drop(x)||^2.

    The square of the change of the layer's output, from h = scale * drop(x) @ down.T (M, R) alone:
    weight / M * <h^T h, up^T up>. Under dropout it is the dropped-out x that counts. Its gradient reaches x as well.
    A layer that the pass skips counts for nothing; one that it uses several times has the tokens of all its calls.
    ``fl.penalty(model, token_weights=attention_mask)`` leaves padding out: the mean is then the weighted one.
    This project's own; the square of CLoRA's drift (its Eq. 3) without the division by ||x||.

    Args:
        weight: factor of the term, >= 0.

    Raises:
        ValueError: weight is something else.
    """

    weight: float = 0.01

    name: ClassVar[str] = "output-deviation"

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _OutputDeviation(self)


class _OutputDeviation(PenaltyState):
    needs_hidden = True

    @classmethod
    def total(cls, items: list[Item], weights: Tensor | None = None) -> Tensor:
        layers: list[tuple[Tensor, Tensor]] = []
        shares: list[float] = []
        tokens: list[Pairs] = []
        by_size: dict[Any, tuple[Covariance | None, float]] = {}
        for state, adapter, hidden in items:
            if hidden is not None and hidden.shape[0]:
                down, up = adapter.factors()
                _check_graph(hidden, down)
                key = hidden.shape[0], wide(hidden).dtype, hidden.device
                if key not in by_size:
                    by_size[key] = _as_covariance(weights, hidden)
                cov, count = by_size[key]
                layers.append((hidden, up))
                shares.append(state.spec.weight / count)
                tokens.append([(cov, None)])
        return gram_form(layers, shares, tokens, tall=True) if layers else nothing(items[0].adapter)

    def rows(self) -> tuple[Rows, ...]:
        return Rows("up"), Rows("hidden")

    @classmethod
    def total_made(cls, items: list[Item], made: list[Products]) -> Tensor:
        tokens = [0 if hidden is None else hidden.shape[0] for _, _, hidden in items]
        weights = [state.spec.weight / max(M, 1) for (state, _, _), M in zip(items, tokens, strict=True)]
        return _gram_made(made, weights, [None] * len(items))


def _as_covariance(weights: Tensor | None, hidden: Tensor) -> tuple[Covariance | None, float]:
    """Token weights of sum 1 as the diagonal form of the sum over tokens, and the number to divide by."""
    M = hidden.shape[0]
    if weights is None:
        return None, float(M)
    if weights.numel() != M:
        raise ValueError(
            f"token_weights has {weights.numel()} entries {tuple(weights.shape)}, wants one for each of the "
            f"{M} tokens of the last forward pass"
        )
    w = weights.detach().reshape(-1).to(wide(hidden.detach()))
    cov = Covariance("diag", M, w)
    cov.rest = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    return cov, 1.0


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

    The covariance S = E x x^T of the layer's own input is measured by ``fl.calibrate``, in a forward-only pass, on text
    whose behaviour must be kept (this project's own; the same quadratic form as activation-weighted regularisers in the
    literature). Layers that are given the same x (q/k/v, gate/up) share one S: it is measured and held once.

    Args:
        weight: factor of the summed term.
        covariance: "diag" keeps E x_j^2 only (K numbers a layer); an integer q keeps the q strongest eigenvectors and
            the diagonal of the rest (K (q + 1) numbers; 0 is "diag"); "full" keeps the (K, K) matrix.

    Raises:
        ValueError: a field is of another type or out of range.
    """

    weight: float = 0.03
    covariance: str | int = "diag"

    name: ClassVar[str] = "source-deviation"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_form("SourceDeviation.covariance", self.covariance)

    def attach(self, adapter: Adapter, site: Site) -> PenaltyState:
        return _SourceDeviation(self, site)


def check_form(title: str, form: object) -> None:
    """ValueError unless ``form`` is one that ``Covariance`` takes."""
    count = isinstance(form, int) and not isinstance(form, bool) and form >= 0
    if form not in ("diag", "full") and not count:
        raise ValueError(f"{title} is {form!r}, wants 'diag', 'full' or an integer >= 0, the columns of its eigenbasis")


class _SourceDeviation(Gram):
    statistics = "inputs"
    counter = "source.tokens"
    source: Covariance

    def __init__(self, spec: SourceDeviation, site: Site):
        super().__init__(spec)
        self.source = Covariance(spec.covariance, site.weight.shape[1], site.weight)

    @property
    def covariance(self) -> Tensor:
        """(K, K) for "full", else the (K,) that "diag" keeps, or the rest beside the eigenbasis."""
        return self.source.matrix if self.source.full else self.source.rest

    @property
    def tokens(self) -> Tensor:
        return self.source.tokens

    def add_inputs(self, x: Tensor) -> None:
        self.source.add(x)

    def end_statistics(self) -> None:
        self.source.finish()

    def add_statistics(self, earlier: dict[str, Tensor]) -> None:
        self.source.merge(named_under("source.", earlier))

    def shareable(self) -> Any:
        return self.spec.covariance, self.source.length(), self.tokens.device

    def shared(self) -> Covariance:
        return self.source

    def share(self, other: Any) -> None:
        self.source = other.source

    def separate(self) -> None:
        self.source = copy.deepcopy(self.source)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.separate()  # what comes may not be the siblings' as well
        super()._load_from_state_dict(*args)

    def moments(self) -> Pairs:
        return [(self.source, None)]

    def rows(self) -> tuple[Rows, ...]:
        if self.source.full or not self._known_calibrated or not self.spec.weight:
            return ()  # a matrix of K rows is no skinny product
        own = Rows("up"), Rows("down", None, self.source.rest)
        return (*own, Rows("down", self.source.basis)) if self.source.columns else own


def _gram_made(
    made: list[Products],  # of each layer (2 R + q, R): of up, of the inner rows, and V^T down^T of an eigenbasis
    weights: list[float],
    spectra: list[Tensor | None],  # (q,)
) -> Tensor:
    """sum_i w_i <S_up, S_in + T^T diag(l) T>, with its gradients w (S_in + T^T diag(l) T), w S_up, 2 w l T S_up."""

    def form(group: Sequence[int], z: Tensor) -> tuple[Tensor, Tensor]:
        R, weight = z.shape[2], weights[group[0]]
        outer, inner = z[:, :R], z[:, R : 2 * R]
        grads = [inner, outer]
        if z.shape[1] > 2 * R:
            T = z[:, 2 * R :]
            strong = torch.stack([wide(spectra[i]) for i in group])[:, :, None].to(z.dtype) * T  # type: ignore[arg-type]
            grads[0] = torch.baddbmm(inner, T.mT, strong)
            grads.append(torch.baddbmm(T, strong, outer, beta=0, alpha=2))
        grad = torch.cat(grads, 1).mul_(weight)
        return (outer * grad[:, :R]).sum(), grad

    keys = [(w, None if l is None else l.shape) for w, l in zip(weights, spectra, strict=True)]
    return joined(made, keys, form)


def gram_form(
    layers: list[tuple[Tensor, Tensor]],  # down (R, K), up (N, R)
    weights: list[float],  # of each layer, scale^2 included
    pairs: Sequence[Pairs],  # of each layer
    tall: bool = False,  # whether down is given as its transpose (K, R)
) -> Tensor:
    """sum_i w_i sum over i's pairs of <up_i^T G up_i, down_i S down_i^T>, and its gradients, with the sum over pairs:

    2 w (up^T G up) down S and 2 w G up (down S down^T).
    """

    def form(group: list[int], down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight = weights[group[0]]
        down = down.mT if tall else down
        value = ddown = dup = None
        for alike in zip(*(pairs[i] for i in group), strict=True):
            sources, targets = zip(*alike, strict=True)
            seen, lifted = apply_stacked(sources, down), apply_stacked(targets, up.mT)  # (L, R, K), (L, R, N)
            outer, inner = lifted @ up, seen @ down.mT  # (L, R, R)
            own = weight * (outer * inner).sum()
            value = own if value is None else value + own
            outer, inner = outer.mul_(2 * weight), inner.mul_(2 * weight)
            ddown = outer @ seen if ddown is None else ddown.baddbmm_(outer, seen)
            dup = lifted.mT @ inner if dup is None else dup.baddbmm_(lifted.mT, inner)
        assert value is not None and ddown is not None and dup is not None  # every layer has a pair
        return value, ddown.mT if tall else ddown, dup

    keys = [(w, *(cov and cov.form() for pair in own for cov in pair)) for w, own in zip(weights, pairs, strict=True)]
    return grouped(layers, keys, form, [largest(own[0]) for own in pairs])
