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
from .model import running_layers
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
    It is the regression mean of Jin et al. (RegMean, arXiv 2212.09849), weighted, of the tuned and the base weights.
    Directions that neither text has keep the update. S_kept is that of the layer's ``SourceDeviation``, measured by
    ``fl.calibrate`` and ``fl.consolidate`` (with earlier tasks); give it a weight of 0 to measure without a penalty.

    Args:
        model: an adapted model whose method has a ``SourceDeviation`` with statistics. Both covariances have its form:
            "full" loses nothing and holds (K, K) numbers a layer for each of them; with the others less is told apart.
        batches: a list, of the task's text, as of ``fl.calibrate``; some dozens of sequences do. One forward pass.
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
    layers = matrices(running_layers(model))
    states = {name: _state(name, layer) for name, layer in layers.items()}
    forms = {state.spec.covariance for state in states.values()}
    batches = list(batches) if len(forms) > 1 else batches
    task = {form: measure_inputs(model, batches, form, loss) for form in forms}
    alike: dict[tuple[Covariance, Covariance], list[str]] = {}
    for name, state in states.items():
        alike.setdefault((task[state.spec.covariance][name], state.source), []).append(name)
    changes = {}
    for (own, kept), names in alike.items():
        solver = _Solver(own, kept, weight)
        changes.update({name: solver.change(layers[name].adapter) for name in names})
    for name, layer in layers.items():
        layer.adapter.factors()[0].copy_(changes[name][0])
    return {name: moved for name, (_, moved) in changes.items()}


def _state(name: str, layer: AdaptedLinear) -> Any:
    if not layer.adapter.trains_factors:
        raise ValueError(f"{name}: {type(layer.adapter).__name__} does not train its two factors; retain wants LoRA's")
    for state in layer.adapter.penalty_states():
        if isinstance(state.spec, SourceDeviation) and state.calibrated:
            return state
    raise ValueError(
        f"{name} has no statistics of kept text: adapt with fl.LoRA(penalties=[fl.SourceDeviation(0.01, 'full')]) and "
        "call fl.calibrate before training"
    )


class _Solver:
    """Of layers with the same inputs: S_task with the ridge, S_kept, the Cholesky factor of their weighted sum."""

    def __init__(self, task: Covariance, kept: Covariance, weight: float):
        self.task, self.kept = task.dense().double().clone(), kept.dense().double()
        ridge = _RIDGE * (self.task.diagonal().mean() + weight * self.kept.diagonal().mean())
        self.task.diagonal().add_(ridge.clamp(min=torch.finfo(torch.float64).tiny))
        self.factor = torch.linalg.cholesky(self.task + weight * self.kept)

    def change(self, adapter: Adapter) -> tuple[Tensor, float]:
        """The new A (R, K), and how far the update moves in the inputs' norm of the kept text."""
        down, up = (t.double() for t in adapter.factors())
        new = torch.cholesky_solve(self.task @ down.T, self.factor).T
        outer = up.T @ up

        def size(rows: Tensor) -> Tensor:
            return (outer * (rows @ self.kept @ rows.T)).sum().clamp(min=0).sqrt()

        whole = size(down)
        return new.to(adapter.factors()[0].dtype), float(size(new - down) / whole) if whole > 0 else 0.0
