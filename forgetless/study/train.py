"""Training on transformers' Trainer: the penalty once per optimizer step, before clipping, and nothing lost on a stop.

How the penalty gets into the loss is ``forgetless.training``'s.
"""

from __future__ import annotations

import inspect
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from ..training import PenaltyMixin, mean_drift
from . import processes
from .data import Collator, in_batches
from .encoding import MESSAGES, Encoded, encode_for_training
from .machine import Peak
from .options import CompareOptions, FinetuneOptions
from .texts import Example

FINISHED, DIVERGED, INTERRUPTED = "finished", "diverged", "interrupted"


@dataclass(frozen=True)
class TrainConfig:
    """How one task is learnt."""

    steps: int = 30
    batch_size: int = 12  # of all processes together
    accumulate: int = 1  # micro-batches per optimizer step, each of batch_size examples
    lr: float = 2e-3
    warmup: float = 0.1  # share of the steps, linear from zero
    schedule: str = "linear"
    clip: float = 1.0
    max_length: int = 96
    seed: int = 0
    snapshot_every: int = 5
    template: str = MESSAGES  # what goes through the chat template, see encoding
    pool: int = 8  # batches sorted by length together, see in_batches; a fifth less padding in the default compare

    @classmethod
    def of(cls, options: CompareOptions | FinetuneOptions, steps: int, lr: float, seed: int) -> TrainConfig:
        """The sizes that were asked for on the command line."""
        return cls(steps, options.batch_size, options.accumulate, lr, max_length=options.max_length, seed=seed)


@dataclass(frozen=True)
class Step:
    """What one optimizer step reports."""

    number: int
    loss: float
    penalty: float
    grad_norm: float
    seconds: float
    drift: float | None
    tokens: int  # of this process, padding included


@dataclass
class TrainResult:
    """Curves and costs of one task."""

    loss: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    drift: dict[int, float] = field(default_factory=dict)
    seconds_per_step: float = math.nan
    peak_mib: float = math.nan
    stopped: str = FINISHED
    note: str = ""


class NonFinite(ArithmeticError):
    """The loss, the penalty or a gradient is NaN or infinite."""


class Snapshot:
    """The adapter as it was when its loss and gradients were last seen to be finite."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.values = [p.detach().clone() for p in self.parameters]
        self.step = 0

    @torch.no_grad()
    def take(self, step: int) -> None:
        """Remember the parameters as they are before update ``step + 1``."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            value.copy_(parameter)
        self.step = step

    @torch.no_grad()
    def restore(self) -> None:
        """Put the remembered values back."""
        for value, parameter in zip(self.values, self.parameters, strict=True):
            parameter.copy_(value)


class PenaltyTrainer(PenaltyMixin, Trainer):
    """A Trainer with the penalty that runs the head only where it must, and stops at what is not finite."""

    emit: Callable[[float], None] | None = None
    stop = processes.Stop()
    tokens = 0  # since the last step that was reported

    @cached_property
    def trims(self) -> bool:
        """Whether the model can leave out logits and takes labels that are shifted already."""
        model = self.accelerator.unwrap_model(self.model)
        takes = "logits_to_keep" in inspect.signature(model.forward).parameters
        return takes and getattr(model, "loss_function", None) is ForCausalLMLoss

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
        self.tokens += inputs["input_ids"].numel()
        results = super().compute_loss(model, self._trim(inputs), *others, **named)
        if model.training and self.accelerator.sync_gradients:
            self._agree()
        return results

    def _agree(self) -> None:
        """All processes have the whole batch's numbers, and stop together: one alone would leave others waiting."""
        values = processes.mean([self.task_loss, self.penalty_value, float(self.stop.asked)])
        self.task_loss, self.penalty_value, asked = values
        if not math.isfinite(self.task_loss + self.penalty_value):
            raise NonFinite(f"loss {self.task_loss}, penalty {self.penalty_value}")
        if asked:
            raise KeyboardInterrupt

    def _trim(self, inputs: dict[str, Tensor | Any]) -> dict[str, Tensor | Any]:
        """Have the head run only where some row of the batch has a label: a third of a small model's step."""
        if not self.trims or "labels" not in inputs:
            return inputs
        labels = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:]  # position t predicts t + 1
        where = (labels != -100).any(dim=0).nonzero().squeeze(1)
        return {**inputs, "logits_to_keep": where, "shift_labels": labels[:, where].contiguous()}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        Trainer.log(self, logs, *args, **kwargs)  # the study measures drift when it is due, not at every step
        if self.emit is not None and "grad_norm" in logs:
            self.emit(logs["grad_norm"])


class MasterAdamW(torch.optim.AdamW):
    """AdamW on float32 copies of half-precision parameters, rounded back after each step: small steps are not lost."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self.rounded = list(parameters)
        super().__init__([p.detach().float().clone() for p in parameters], lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of the copies with the gradients of the parameters themselves."""
        copies = self.param_groups[0]["params"]
        for copy, parameter in zip(copies, self.rounded, strict=True):
            copy.grad = None if parameter.grad is None else parameter.grad.float()
        results = super().step(closure)
        for copy, parameter in zip(copies, self.rounded, strict=True):
            parameter.copy_(copy)
            copy.grad = None
        return results


class Watch(TrainerCallback):
    """Times the steps, refuses broken gradients, keeps the snapshot."""

    def __init__(self, snapshot: Snapshot, every: int) -> None:
        self.snapshot, self.every = snapshot, every
        self.seconds: list[float] = []
        self.updating = False
        self._start = self._aside = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start, self._aside = time.perf_counter(), 0.0

    def on_pre_optimizer_step(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        began = time.perf_counter()
        gradients = [p.grad for p in self.snapshot.parameters if p.grad is not None]
        if gradients and not torch.nn.utils.get_total_norm(gradients).isfinite():
            raise NonFinite("a gradient is not finite")
        if state.global_step % self.every == 0:
            self.snapshot.take(state.global_step)
        self._aside = time.perf_counter() - began
        self.updating = True

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.updating = False

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start - self._aside)


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that learn."""
    return [p for p in model.parameters() if p.requires_grad]


def _arguments(config: TrainConfig, device: torch.device, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        warmup_steps=math.ceil(config.warmup * config.steps),
        lr_scheduler_type=config.schedule,
        weight_decay=0.0,
        max_grad_norm=config.clip,
        optim="adamw_torch",
        seed=config.seed,
        train_sampling_strategy="sequential",  # in_batches has made the order
        use_cpu=device.type == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        accelerator_config={"split_batches": True},  # a batch is that of all processes together
        ddp_find_unused_parameters=False,
    )


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    config: TrainConfig,
    on_step: Callable[[Step], None] | None = None,
    stop: processes.Stop | None = None,
) -> TrainResult:
    """Train what is trainable in ``model``. A NaN or Ctrl-C ends it early with the last good state in place.

    Parameters in half precision (full fine-tuning) are updated through float32 copies. Several processes (torchrun)
    divide each batch; they end early together, also when one of them finds that ``stop`` has been asked for.
    """
    encoded = encode_for_training(examples, tokenizer, config.max_length, config.template)
    result, watch = TrainResult(), Watch(Snapshot(trainable(model)), config.snapshot_every)
    use_cache = getattr(model.config, "use_cache", None)
    peak = Peak(model.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, encoded, config, watch, folder)
        trainer.stop = stop or trainer.stop
        trainer.emit = partial(_record, trainer, result, config, watch, on_step)
        _run(trainer, watch, result, config)
    for parameter in watch.snapshot.parameters:
        parameter.grad = None
    if use_cache is not None:
        model.config.use_cache = use_cache
    model.eval()
    result.peak_mib = peak.mib()
    timed = watch.seconds[1:] or watch.seconds  # the first step also allocates and warms up
    result.seconds_per_step = statistics.median(timed) if timed else math.nan
    return result


def _trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    config: TrainConfig,
    watch: Watch,
    folder: str,
) -> PenaltyTrainer:
    parameters = watch.snapshot.parameters
    narrow = any(p.dtype.itemsize < 4 for p in parameters)
    trainer = PenaltyTrainer(
        model=model,
        args=_arguments(config, model.device, folder),
        train_dataset=in_batches(
            encoded, config.batch_size, config.steps * config.accumulate, config.seed, config.pool
        ),
        data_collator=Collator(tokenizer),
        callbacks=[watch],
        optimizers=(MasterAdamW(parameters, config.lr) if narrow else None, None),
    )
    if processes.count() > 1:
        torch.manual_seed(config.seed + processes.number())  # no two processes draw the same dropout masks
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _record(
    trainer: PenaltyTrainer,
    result: TrainResult,
    config: TrainConfig,
    watch: Watch,
    on_step: Callable[[Step], None] | None,
    grad_norm: float,
) -> None:
    """Add one optimizer step to ``result`` and report it."""
    number = len(result.loss) + 1
    due = number % config.snapshot_every == 0 or number == config.steps
    drift = processes.mean([mean_drift(trainer.accelerator.unwrap_model(trainer.model))])[0] if due else None
    result.loss.append(trainer.task_loss)
    result.penalty.append(trainer.penalty_value)
    result.grad_norm.append(grad_norm)
    if drift is not None and math.isfinite(drift):
        result.drift[number] = drift
    if on_step is not None:
        seconds, tokens = watch.seconds[-1], trainer.tokens
        on_step(Step(number, result.loss[-1], result.penalty[-1], grad_norm, seconds, drift, tokens))
    trainer.tokens = 0


def _run(trainer: PenaltyTrainer, watch: Watch, result: TrainResult, config: TrainConfig) -> None:
    """Train to the end, or to the first number that is not finite, or to Ctrl-C."""
    snapshot = watch.snapshot
    try:
        trainer.train()
        if not all(p.isfinite().all() for p in snapshot.parameters):
            raise NonFinite("the last update left a parameter that is not finite")
    except NonFinite as error:
        snapshot.restore()
        result.stopped = DIVERGED
        where = f"stopped at step {len(result.loss) + 1} of {config.steps}"
        result.note = f"{where}: {error}; kept the adapter of step {snapshot.step}"
    except KeyboardInterrupt:
        kept = len(result.loss)
        if watch.updating:  # some parameters may be updated and some not
            snapshot.restore()
            kept = snapshot.step
        result.stopped = INTERRUPTED
        result.note = f"interrupted; kept the adapter of step {kept} of {config.steps}"
