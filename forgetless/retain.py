"""After a task has been learnt: turn its update away from what kept text needs, in closed form and without training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .calibrate import LossFunction, measure_inputs
from .layers.experts import matrices
from .layers.linear import AdaptedLinear
from .model import _running
from .penalties.base import trains_factors
from .penalties.covariance import Covariance
from .penalties.deviation import SourceDeviation

#: Of the mean diagonal of both covariances: what keeps directions as they are that no text was seen in.
_RIDGE = 1e-4


@torch.no_grad()
def retain(
    model: nn.Module, batches: Iterable[Any], weight: float = 0.1, loss: LossFunction | None = None
) -> dict[str, float]:
    """Change each layer's update so that it acts less on inputs as kept text has them; call it when training ends.

    With S = E x x^T over the inputs x of a layer, on the task's text and on kept text, the update D = scale B A becomes

        argmin over D' of  E_task ||(D' - D) x||^2 + weight E_kept ||D' x||^2  =  D S_task (S_task + weight S_kept)^-1,

    which is A' = A S_task (S_task + weight S_kept)^-1 with the same B: the rank, the scale and the file format stay.
    It is the regression mean of the tuned and the base weights (Jin et al., arXiv 2212.09849, Eq. 3, with a weight);
    directions that neither text has keep the update. S_kept is that of the layer's ``SourceDeviation``, measured by
    ``fl.calibrate`` and ``fl.consolidate`` (with earlier tasks); give it a weight of 0 to measure without a penalty.

    Args:
        model: an adapted model whose method has a ``SourceDeviation`` with statistics; ``covariance="full"`` loses
            nothing.
        batches: of the task's text, as of ``fl.calibrate``; some dozens of sequences do. One forward pass over them.
        weight: > 0; larger keeps more. A tenth costs little of what was learnt on SmolLM2-135M, see the docs.
        loss: as of ``fl.calibrate``.

    Returns:
        Layer name -> ||D' - D|| / ||D|| in the inputs' norm of the kept text; 0 for an update of zero.

    Raises:
        ValueError: no adapters; ``weight`` is not a number above 0; a layer has no such statistics, or its adapter
            does not train its two factors (CURLoRA); no batch. Nothing is changed then.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise ValueError(f"weight is {weight!r}, wants a number above 0")
    layers = matrices(_running(model))
    kept = {name: _kept(name, layer) for name, layer in layers.items()}
    task = measure_inputs(model, batches, "full", loss)
    factors: dict[tuple[int, int], Tensor] = {}
    changes, moved = {}, {}
    for name, layer in layers.items():
        pair = id(kept[name]), id(task[name])
        if pair not in factors:
            factors[pair] = _filter(task[name], kept[name], weight)
        down = layer.adapter.factors()[0]
        changes[name] = (down.double() @ factors[pair].to(down.device)).to(down.dtype)
        moved[name] = _moved(layer.adapter, changes[name], kept[name])
    for name, layer in layers.items():
        layer.adapter.factors()[0].copy_(changes[name])
    return moved


def _kept(name: str, layer: AdaptedLinear) -> Covariance:
    if not trains_factors(layer.adapter):
        raise ValueError(f"{name}: {type(layer.adapter).__name__} does not train its two factors; retain wants LoRA's")
    for state in layer.adapter.penalty_states():
        if isinstance(state.spec, SourceDeviation) and state.calibrated:
            source: Covariance = state.shared()
            return source
    raise ValueError(
        f"{name} has no statistics of kept text: adapt with fl.LoRA(penalties=[fl.SourceDeviation(0.01, 'full')]) and "
        "call fl.calibrate before training"
    )


def _filter(task: Covariance, kept: Covariance, weight: float) -> Tensor:  # (K, K), float64
    """S_task (S_task + weight S_kept)^-1, with the ridge on S_task."""
    S, other = task.dense().double(), weight * kept.dense().double()
    ridge = _RIDGE * (S.diagonal().mean() + other.diagonal().mean())
    S.diagonal().add_(ridge.clamp(min=torch.finfo(torch.float64).tiny))
    factor = torch.linalg.cholesky(S + other)
    return torch.cholesky_solve(S, factor).T


def _moved(adapter: Adapter, down: Tensor, kept: Covariance) -> float:
    before, up = (t.double() for t in adapter.factors())
    S, outer = kept.dense().double(), up.T @ up

    def size(rows: Tensor) -> Tensor:
        return (outer * (rows @ S @ rows.T)).sum().clamp(min=0).sqrt()

    whole = size(before)
    return float(size(down.double() - before) / whole) if whole > 0 else 0.0
