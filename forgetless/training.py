"""The penalty in a training loop: once per optimiser step, before clipping, whatever the accumulation.

``PenaltyMixin`` goes before transformers' Trainer, or a trainer made from it::

    class MyTrainer(fl.training.PenaltyMixin, Trainer): ...

It imports nothing: which trainer it is mixed into is the user's choice.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from .model import drift, penalty, running


class PenaltyMixin:
    """Adds ``fl.penalty`` to a Trainer's loss once per optimiser step, and reports it with the drift.

    The task loss of a step is divided over its micro-batches by the Trainer. The penalty must not be: it is added to
    the last micro-batch alone, undivided, and the clipping sees the sum. Where several processes average their
    gradients, each adds it, so it counts once there as well. Every log of a loss also has ``penalty`` and ``drift``
    (mean over layers, see ``fl.drift``); the logged loss is the task's alone only where ``task_loss`` is read.

    A model that has no adapters, such as one that is fully fine-tuned, trains as without the mixin.
    """

    #: Of the optimiser step under way: the task's loss, summed over its micro-batches as they are weighted.
    task_loss: float = 0.0
    #: The penalty of the last optimiser step.
    penalty_value: float = 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> Any:
        """The trainer's own loss, with the penalty on the last micro-batch of a step; as transformers.Trainer's.

        Returns:
            A scalar in the loss's dtype, or (it, the model's outputs) with ``return_outputs``.

        Raises:
            ValueError: as of ``fl.penalty``.
        """
        found = super().compute_loss(model, inputs, True, num_items_in_batch, **others)  # type: ignore[misc]
        loss, outputs = found
        if model.training:
            loss = self._with_penalty(model, loss, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _with_penalty(self, model: nn.Module, loss: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        trainer: Any = self
        divided = trainer.compute_loss_func is None and (
            num_items_in_batch is None or not trainer.model_accepts_loss_kwargs
        )
        parts = trainer.current_gradient_accumulation_steps if divided else 1
        if self._opens:
            self.task_loss, self._opens = 0.0, False
        self.task_loss += loss.detach().float().item() / parts
        if not trainer.accelerator.sync_gradients:
            return loss
        self._opens = True  # the last micro-batch of this optimiser step
        bare = trainer.accelerator.unwrap_model(model)
        value = penalty(bare) if adapted(bare) else loss.new_zeros(())
        self.penalty_value = value.detach().float().item()
        return loss + parts * value.to(loss.device) if value.requires_grad else loss

    _opens = True

    def log(self, logs: dict[str, float], *others: Any, **named: Any) -> None:
        """Adds ``penalty`` and ``drift`` to what is logged beside a loss."""
        bare = self.accelerator.unwrap_model(self.model)  # type: ignore[attr-defined]
        if "loss" in logs and adapted(bare):
            logs["penalty"] = self.penalty_value
            seen = mean_drift(bare)
            if math.isfinite(seen):
                logs["drift"] = seen
        super().log(logs, *others, **named)  # type: ignore[misc]


def adapted(model: nn.Module) -> bool:
    """Whether any layer of the model runs on an adapter of ours, swapped-in PEFT layers included."""
    return bool(running(model))


@torch.no_grad()
def mean_drift(model: nn.Module) -> float:
    """The drift of the last forward, averaged over layers; NaN where nothing has been seen or nothing is adapted."""
    values = list(drift(model).values()) if adapted(model) else []
    return statistics.fmean(values) if values else math.nan
