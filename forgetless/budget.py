"""How much of an update to keep so that the model forgets no more than it may."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .names import checked
from .samples import LossFunction, Window, loss_of
from .switch import disabled, evaluating, scaled

#: Factors are tried to 1 / 32.
_HALVINGS = 5


def fit_budget(
    model: nn.Module, batches: Iterable[Any], budget: float = 0.02, loss: LossFunction | None = None
) -> float:
    """The largest factor of the update with which the loss on kept text rises by at most ``budget``.

    The rise is measured against the same model with its adapters off, on the batches themselves: text to keep that
    was not trained on. Nothing is changed: ``fl.scaled(model, factor)`` or ``fl.consolidate(model, scale=factor)``
    applies it. The factor is searched by bisection, which takes that the loss rises with the factor.

    Args:
        model: an adapted model.
        batches: of kept text, as of ``fl.calibrate``, with labels; each counts by its labels.
        budget: nats per token, > 0.
        loss: (model, batch) -> scalar mean loss; the model's own ``.loss`` if not given.

    Returns:
        A factor in [0, 1], a multiple of 1/32; 1 where the whole update is within the budget.

    Raises:
        ValueError: no adapters, no batch, no loss, or a budget that is not a number above 0.
    """
    if isinstance(budget, bool) or not isinstance(budget, (int, float)) or not 0 < budget < float("inf"):
        raise ValueError(f"budget is {budget!r}, wants a number of nats per token above 0")
    kept = list(batches)
    if not kept:
        raise ValueError("batches is empty, wants at least one batch of text to keep")
    with evaluating(checked(model)), torch.no_grad():
        with disabled(model):
            most = _mean_loss(model, kept, loss) + budget
        low, high = 0.0, 1.0
        if _rises_to(model, kept, loss, 1.0) <= most:
            return 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            within = _rises_to(model, kept, loss, middle) <= most
            low, high = (middle, high) if within else (low, middle)
        return low


def _rises_to(model: nn.Module, batches: list[Any], loss: LossFunction | None, factor: float) -> float:
    with scaled(model, factor):
        return _mean_loss(model, batches, loss)


def _mean_loss(model: nn.Module, batches: list[Any], loss: LossFunction | None) -> float:
    """The mean over all labels of all batches."""
    total, count = 0.0, 0.0
    device = next(model.parameters()).device
    for batch in batches:
        window = Window(batch, device, model)
        labelled = 1.0 if window.labels is None else float(window.labels)
        total += float(loss_of(model, window.batch, loss)) * labelled
        count += labelled
    return total / max(count, 1.0)
