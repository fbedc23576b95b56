"""The penalty in a training loop: once per optimiser step, before clipping, whatever the accumulation.

``PenaltyMixin`` goes before transformers' Trainer, or a trainer made from it::

    class MyTrainer(fl.training.PenaltyMixin, Trainer): ...

It imports nothing: which trainer it is mixed into is the user's choice. ``PenaltyCallback`` is for Lightning's Trainer,
which is imported when the class is asked for::

    Trainer(callbacks=[fl.training.PenaltyCallback()])
"""

from __future__ import annotations

import functools
import importlib
import math
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import versions
from .checkpoint.io import save
from .checkpoint.restore import OURS, resume
from .files import newest
from .model import adapters, drift, penalty, record_drift, running
from .switch import fuse_penalty

#: What is asked of a Trainer.
_ASKED = ("accelerator", "compute_loss_func", "current_gradient_accumulation_steps", "model_accepts_loss_kwargs")


#: What stands behind the mixin: the trainer that it goes before.
_Trainer: Any = object


class PenaltyMixin(_Trainer):
    """Adds ``fl.penalty`` to a Trainer's loss once per optimiser step, and reports it with the drift.

    The task loss of a step is divided over its micro-batches by the Trainer. The penalty must not be: it is added to
    the last micro-batch alone, undivided, and the clipping sees the sum. Where several processes average their
    gradients, each adds it, so it counts once there as well. Every log of a loss also has ``penalty`` and ``drift``
    (mean over layers, see ``fl.drift``); the logged loss is the task's alone only where ``task_loss`` is read.

    A checkpoint holds the adapters as ``fl.save`` writes them, with what is trained beside them, and not the base
    model; ``resume_from_checkpoint`` and ``load_best_model_at_end`` read them. DeepSpeed and FSDP resume from their own
    files. A model whose weights are quantised trains once it is adapted.

    ``OutputDeviation`` leaves out what the batch's attention mask does. A batch with padding whose mask has not one
    entry for each token of a layer (images beside the text, an encoder and a decoder) is refused with that penalty.
    A model that has no adapters, such as one that is fully fine-tuned, trains as without the mixin.
    """

    #: Of the optimiser step under way: the task's loss, summed over its micro-batches as they are weighted.
    task_loss: float = 0.0
    #: The penalty of the last optimiser step.
    penalty_value: float = 0.0

    def __init__(self, *given: Any, **named: Any):
        model: Any = named.get("model", given[0] if given else None)
        marked = isinstance(model, nn.Module) and getattr(model, "is_quantized", False) and bool(adapters(model))
        if marked:  # what transformers looks at: else it refuses to train quantised weights
            model._hf_peft_config_loaded = True
        try:
            super().__init__(*given, **named)
        finally:
            if marked:
                del model._hf_peft_config_loaded

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
        if model.training and not self._recorded:
            self._check_trainer()
            bare = self.accelerator.unwrap_model(model)
            self._recorded = not adapted(bare) or record_drift(bare) is bare
        if model.training and self.current_gradient_accumulation_steps > 1:
            asks_once(self.accelerator.unwrap_model(model), self.accelerator.sync_gradients)
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **others)
        loss, outputs = result if return_outputs else (result, None)
        if model.training:
            loss = self._with_penalty(model, loss, num_items_in_batch, attended(inputs))
        return (loss, outputs) if return_outputs else loss

    def _check_trainer(self) -> None:
        missing = next((name for name in _ASKED if not hasattr(self, name)), None)
        if missing is not None:
            raise versions.missing_error("transformers", "PenaltyMixin", f"Trainer.{missing}")

    def _with_penalty(
        self, model: nn.Module, loss: Tensor, num_items_in_batch: Tensor | int | None, weights: Tensor | None
    ) -> Tensor:
        divided = self.compute_loss_func is None and (num_items_in_batch is None or not self.model_accepts_loss_kwargs)
        parts = self.current_gradient_accumulation_steps if divided else 1
        if self._opens:
            self.task_loss, self._opens = 0.0, False
        self.task_loss += loss.detach().float().item() / parts
        if not self.accelerator.sync_gradients:
            return loss
        self._opens = True  # the last micro-batch of this optimiser step
        bare = self.accelerator.unwrap_model(model)
        value = penalty(bare, weights) if adapted(bare) else loss.new_zeros(())
        self.penalty_value = value.detach().float().item()
        return loss + parts * value.to(loss.device) if value.requires_grad else loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapters as ``fl.save`` does, and no base model; without adapters of ours, as the Trainer."""
        bare = self.accelerator.unwrap_model(self.model)
        if not adapters(bare) or self.is_deepspeed_enabled:
            super().save_model(output_dir, _internal_call)
            return
        if self.args.should_save or any(hasattr(p, "full_tensor") for p in bare.parameters()):  # sharded: all do
            save(bare, output_dir or self.args.output_dir)
        bare.save_pretrained = _write_nothing  # the Trainer's way of writing a model
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            del bare.save_pretrained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._resumed(resume_from_checkpoint, model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._resumed(self.state.best_model_checkpoint, None):
            super()._load_best_model()

    def _resumed(self, folder: str, model: nn.Module | None) -> bool:
        """Whether the folder has adapters that the model has, too; then they are read."""
        bare = self.accelerator.unwrap_model(model or self.model)
        ours = newest(Path(folder), OURS).exists() and adapters(bare) and not self.is_fsdp_enabled
        if ours:
            resume(bare, Path(folder))
        return bool(ours)

    _opens = True
    _recorded = False  # whether the model has been asked to record the drift

    def log(self, logs: dict[str, float], *others: Any, **named: Any) -> None:
        """Adds ``penalty`` and ``drift`` to what is logged beside a loss."""
        bare = self.accelerator.unwrap_model(self.model)
        if "loss" in logs and adapted(bare):
            logs["penalty"] = self.penalty_value
            seen = mean_drift(bare)
            if math.isfinite(seen):
                logs["drift"] = seen
        super().log(logs, *others, **named)


def _write_nothing(*given: Any, **named: Any) -> None: ...


def attended(batch: Any) -> Tensor | None:
    """The batch's attention mask (sequences, tokens), if it is a mapping with one that leaves any token out."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 and not mask.all() else None


def asks_once(model: nn.Module, last: bool) -> None:
    """Of the micro-batches of a step, only the last one's pass makes what the penalty needs."""
    if adapted(model):
        fuse_penalty(model, last)


def adapted(model: nn.Module) -> bool:
    """Whether any layer of the model runs on an adapter of ours, swapped-in PEFT layers included."""
    return bool(running(model))


@torch.no_grad()
def mean_drift(model: nn.Module) -> float:
    """The drift of the last forward, averaged over layers; NaN where nothing has been seen or nothing is adapted."""
    values = list(drift(model).values()) if adapted(model) else []
    return statistics.fmean(values) if values else math.nan


# -------------------------------------------------------------------------------------- Lightning


class _LightningPenalty:
    """Adds ``fl.penalty`` to what ``training_step`` returns, once per optimiser step, and logs it with the drift.

    Lightning divides the loss of every micro-batch; the penalty is added to the last one of a step, undivided, so that
    clipping sees the sum. ``penalty`` is logged at every step, ``drift`` (mean over layers) every
    ``log_every_n_steps``. The module is as it was after fitting. Only with automatic optimisation; in a step of your
    own add ``fl.penalty``.

    Raises:
        ValueError: when fitting begins: the module has no adapters, or optimises by hand.
    """

    _value: Tensor | None = None  # of the step under way

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if not adapted(pl_module):
            raise ValueError("the module has no adapters; call fl.adapt(model, method) on its model first")
        if not pl_module.automatic_optimization:
            raise ValueError(
                "the module optimises by hand: add fl.penalty(model) to its loss there, without this callback"
            )
        self._restore(pl_module)  # an earlier fit may have been killed
        record_drift(pl_module)
        own = pl_module.training_step
        current = pl_module.__dict__.get("training_step")

        @functools.wraps(own)
        def training_step(*args: Any, **named: Any) -> Any:
            self._value = None
            if trainer.accumulate_grad_batches > 1:
                asks_once(pl_module, self._steps)
            output = own(*args, **named)
            loss = output["loss"] if isinstance(output, dict) else output
            if loss is None or not self._steps:
                return output
            value = penalty(pl_module, attended(args[0] if args else next(iter(named.values()), None)))
            self._value = value.detach()
            total = loss + trainer.accumulate_grad_batches * value.to(loss.device)
            return {**output, "loss": total} if isinstance(output, dict) else total

        vars(training_step)["original"] = current
        pl_module.training_step = training_step

    _steps = True  # this micro-batch is the last one of an optimiser step

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        last = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
        self._steps = last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._value is None:
            return
        pl_module.log("penalty", self._value)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            seen = mean_drift(pl_module)
            if math.isfinite(seen):
                pl_module.log("drift", seen)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._restore(pl_module)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._restore(pl_module)

    def _restore(self, pl_module: Any) -> None:
        step = pl_module.__dict__.get("training_step")
        if hasattr(step, "original"):
            record_drift(pl_module, False)
            del pl_module.training_step
            if step.original is not None:
                pl_module.training_step = step.original


@functools.cache
def _callback(base: type) -> type:
    made = type("PenaltyCallback", (_LightningPenalty, base), {"__doc__": _LightningPenalty.__doc__})
    made.__module__ = __name__
    return made


def __getattr__(name: str) -> Any:
    if name != "PenaltyCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    known = ("lightning.pytorch", "pytorch_lightning")
    for module in (*(result for result in known if result in sys.modules), *known):  # the one that is in use already
        try:
            return _callback(importlib.import_module(module).Callback)
        except ImportError as error:
            if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
                raise
    raise ImportError("fl.training.PenaltyCallback needs Lightning: pip install 'forgetless[lightning]'")
