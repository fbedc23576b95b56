"""Training on transformers' Trainer: the penalty once per optimizer step, before clipping, and nothing lost on a stop.

How the penalty gets into the loss is ``forgetless.training``'s.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

from ..training import PenaltyMixin, mean_drift
from . import processes
from .checkpoints import Checkpoints
from .data import Collator, in_batches
from .encoding import MESSAGES, Encoded, encode_for_training
from .machine import Peak
from .options import CompareOptions, FinetuneOptions
from .texts import Example
from .updates import MasterAdamW, NonFinite, Snapshot, Watch, trainable

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
    gradient_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    report: str = "none"  # the Trainer's report_to
    pool: int = 8  # batches sorted by length together, see in_batches; a fifth less padding in the default compare

    @classmethod
    def of(cls, options: CompareOptions | FinetuneOptions, steps: int, lr: float, seed: int) -> TrainConfig:
        """The sizes that were asked for on the command line."""
        config = cls(steps, options.batch_size, options.accumulate, lr, max_length=options.max_length, seed=seed)
        if isinstance(options, FinetuneOptions):
            recompute = options.gradient_checkpointing
            config = dataclasses.replace(config, gradient_checkpointing=recompute, report=options.report)
        return config


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


class PenaltyTrainer(PenaltyMixin, Trainer):
    """A Trainer with the penalty that runs the head only where it must, and stops at what is not finite."""

    emit: Callable[[float], None] | None = None
    extra: Callable[[nn.Module], Tensor] | None = None  # added to each step's loss
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
            if self.extra is not None:
                results = results + self.extra(model)
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
        if "grad_norm" in logs:
            logs["penalty"] = self.penalty_value
        Trainer.log(self, logs, *args, **kwargs)  # the study measures drift when it is due, not at every step
        if self.emit is not None and "grad_norm" in logs:
            self.emit(logs["grad_norm"])


def _arguments(config: TrainConfig, device: torch.device, folder: Path, every: int | None) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
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
        save_strategy="steps" if every else "no",
        save_steps=every or 1,
        report_to=config.report,
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
    checkpoints: Checkpoints | None = None,
    extra: Callable[[nn.Module], Tensor] | None = None,
) -> TrainResult:
    """Train what is trainable in ``model``. A NaN or Ctrl-C ends it early with the last good state in place.

    With ``checkpoints`` it goes on from where an earlier run was stopped, as if that had not been.

    Parameters in half precision (full fine-tuning) are updated through float32 copies. Several processes (torchrun)
    divide each batch; they end early together, also when one of them finds that ``stop`` has been asked for.
    """
    encoded = encode_for_training(examples, tokenizer, config.max_length, config.template)
    result, watch = TrainResult(), Watch(Snapshot(trainable(model)), config.snapshot_every)
    use_cache = getattr(model.config, "use_cache", None)
    peak = Peak(model.device)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # reentrant wants inputs with a gradient
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, tokenizer, encoded, config, watch, checkpoints or Path(folder))
        if checkpoints is not None:
            _continue(checkpoints, result, watch)
        trainer.stop, trainer.extra = stop or trainer.stop, extra
        trainer.emit = partial(_record, trainer, result, config, watch, on_step)
        _run(trainer, watch, result, config, checkpoints)
    for parameter in watch.snapshot.parameters:
        parameter.grad = None
    if use_cache is not None:
        model.config.use_cache = use_cache
    if config.gradient_checkpointing:
        model.gradient_checkpointing_disable()
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
    place: Checkpoints | Path,
) -> PenaltyTrainer:
    parameters = watch.snapshot.parameters
    folder, every = (place, None) if isinstance(place, Path) else (place.folder, place.every)
    narrow = any(p.dtype.itemsize < 4 for p in parameters)
    trainer = PenaltyTrainer(
        model=model,
        args=_arguments(config, model.device, folder, every),
        train_dataset=in_batches(
            encoded, config.batch_size, config.steps * config.accumulate, config.seed, config.pool
        ),
        data_collator=Collator(tokenizer),
        callbacks=[watch] if isinstance(place, Path) else [watch, place],
        optimizers=(MasterAdamW(parameters, config.lr) if narrow else None, None),
    )
    if processes.count() > 1:
        torch.manual_seed(config.seed + processes.number())  # no two processes draw the same dropout masks
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def _continue(checkpoints: Checkpoints, result: TrainResult, watch: Watch) -> None:
    """Take the curves of the run that goes on, and have them written into its next checkpoints."""
    saved = checkpoints.saved
    if saved:
        result.loss, result.penalty, result.grad_norm = saved["loss"], saved["penalty"], saved["grad_norm"]
        result.drift = {int(step): value for step, value in saved["drift"].items()}
        watch.seconds = saved["seconds"]
    checkpoints.record = lambda: {
        **{name: getattr(result, name) for name in ("loss", "penalty", "grad_norm", "drift")},
        "seconds": watch.seconds,
    }


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


def _run(
    trainer: PenaltyTrainer, watch: Watch, result: TrainResult, config: TrainConfig, checkpoints: Checkpoints | None
) -> None:
    """Train to the end, or to the first number that is not finite, or to Ctrl-C."""
    snapshot = watch.snapshot
    try:
        begun = None if checkpoints is None else checkpoints.begun
        trainer.train(resume_from_checkpoint=None if begun is None else str(begun))
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
