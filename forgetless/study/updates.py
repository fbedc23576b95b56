"""An optimizer step: refused where a number is not finite, undone where it was cut short, timed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


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

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        if state.global_step:  # the adapter of a checkpoint has been loaded
            self.snapshot.take(state.global_step)

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
