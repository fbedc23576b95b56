"""Calibration: one pass over source-domain data fills the statistics that the attached penalties ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .layers import AdaptedLinear
from .model import adapters

LossFunction = Callable[[nn.Module, Any], Tensor]


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Measure what must not be forgotten, with the adapters as they are, and centre the penalties there.

    ``Laplace`` takes per-sequence gradients (one forward and backward per batch, no per-sample backward),
    ``SourceDeviation`` the inputs of each layer (forward only). Dropout is off. Saved with the adapter by ``fl.save``.

    Args:
        model: an adapted model.
        batches: source-domain batches: mappings of tensors for ``model(**batch)``, with "labels" where gradients
            are needed, first dimension sequences; padding is left out where "attention_mask" says so. Anything else
            if ``loss`` is given.
        loss: (model, batch) -> scalar mean loss; the model's own ``.loss`` if not given.
        on_batch: called with the number of batches done, for a progress bar.

    Returns:
        Counts: "layers" filled, "batches", "sequences".

    Raises:
        ValueError: no adapters, nothing asks for statistics, no batch, or no loss. Statistics are then reset.
    """
    found = adapters(model)
    if not found:
        raise ValueError("model has no adapters; call fl.adapt(model, method) first")
    wanting = {
        name: layer
        for name, layer in found.items()
        if any(state.statistics for state in layer.adapter.penalty_states())
    }
    if not wanting:
        raise ValueError("no attached penalty asks for statistics; only Laplace (LaLoRA) and SourceDeviation do")
    gradients = any(state.statistics == "gradients" for layer in wanting.values() for state in _states(layer))
    for layer in wanting.values():
        for state in _states(layer):
            state.begin_statistics(layer.adapter)
            state.known_calibrated = False
    modes = {module: module.training for module in model.modules()}
    done = sequences = 0
    model.eval()
    try:
        for batch in batches:
            with ExitStack() as hooks:
                window = _Window(batch, next(iter(wanting.values())).weight.device)
                for layer in wanting.values():
                    handle = layer.register_forward_hook(_observer(window))
                    hooks.callback(handle.remove)
                with torch.set_grad_enabled(gradients):
                    value = _loss(model, window.batch, loss, gradients)
                    if gradients:
                        if not torch.isfinite(value).all():
                            raise ValueError(f"batch {done + 1} has a loss of {value.item()}; has it any label?")
                        parameters = [p for layer in wanting.values() for p in layer.adapter.parameters()]
                        wanted = [p for p in parameters if p.requires_grad]
                        torch.autograd.grad(value, wanted, allow_unused=True)
            done += 1
            sequences += window.sequences
            if on_batch is not None:
                on_batch(done)
    except BaseException:  # sums that were never divided must not be taken for statistics
        for layer in wanting.values():
            for state in _states(layer):
                state.begin_statistics(layer.adapter)
        raise
    finally:
        for module, training in modes.items():
            module.training = training
    if done == 0:
        raise ValueError("batches is empty, wants at least one batch of source-domain data")
    for layer in wanting.values():
        layer.trace = None
        for state in _states(layer):
            state.end_statistics()
    return {"layers": len(wanting), "batches": done, "sequences": sequences}


def _states(layer: AdaptedLinear) -> list[Any]:
    return [state for state in layer.adapter.penalty_states() if state.statistics]


class _Window:
    """One batch: its tensors on the model's device, its sequences, tokens and label counts."""

    def __init__(self, batch: Any, device: torch.device):
        self.batch = batch
        self.mask: Tensor | None = None  # (sequences, tokens) bool
        self.share: Tensor | None = None  # (sequences,) share of each sequence in the batch's mean loss
        self.sequences = 0
        if not isinstance(batch, Mapping):
            return
        self.batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
        leading = next((v for v in self.batch.values() if isinstance(v, Tensor) and v.dim() >= 1), None)
        self.sequences = 0 if leading is None else leading.shape[0]
        mask = self.batch.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self.mask = mask.bool()
        labels = self.batch.get("labels")
        if isinstance(labels, Tensor) and labels.dim() == 2:
            counts = (labels[:, 1:] != -100).sum(1).double()  # a causal model predicts all but the first token
            self.share = counts / counts.sum().clamp(min=1)

    def split(self, t: Tensor) -> Tensor:  # -> (sequences, tokens, features)
        """Layers see (sequences, tokens, features), (samples, features), or tokens flattened into one dimension."""
        if t.dim() == 3:
            return t
        rows = t.reshape(-1, t.shape[-1])
        groups = self.sequences if self.sequences and rows.shape[0] % self.sequences == 0 else rows.shape[0]
        return rows.view(groups, -1, t.shape[-1])


def _observer(window: _Window) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
    def hook(layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        assert isinstance(layer, AdaptedLinear)
        x = window.split(args[0].detach())
        if window.sequences == 0:
            window.sequences = x.shape[0]
        for state in _states(layer):
            if state.statistics == "inputs":
                fits = window.mask is not None and window.mask.shape == x.shape[:2]
                state.add_inputs(x[window.mask] if fits else x.flatten(0, 1))
        if any(state.statistics == "gradients" for state in _states(layer)):
            y.register_hook(lambda dy: _add_gradients(layer, window, x, window.split(dy)))

    return hook


@torch.no_grad()
def _add_gradients(layer: AdaptedLinear, window: _Window, x: Tensor, dy: Tensor) -> None:
    """Per-sequence gradients from the layer's x (S, T, K) and dy (S, T, N): S small products, no second backward."""
    adapter = layer.adapter
    down, up = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in adapter.factors())
    x, dy = x.to(down.dtype), dy.to(down.dtype)
    h = adapter.scale * (x @ down.T)
    dup = dy.transpose(1, 2) @ h
    if up.any():
        ddown = (adapter.scale * (dy @ up)).transpose(1, 2) @ x
    else:  # the usual start: no gradient reaches down
        ddown = x.new_zeros(x.shape[0], *down.shape)
    share = window.share
    if share is None or share.shape[0] != x.shape[0]:
        share = x.new_full((x.shape[0],), 1.0 / x.shape[0])
    grads = adapter.pullback(ddown, dup)
    for state in _states(layer):
        if state.statistics == "gradients":
            state.add_gradients(grads, share.to(device=x.device, dtype=x.dtype))


def _loss(model: nn.Module, batch: Any, loss: LossFunction | None, needed: bool) -> Any:
    if loss is not None:
        return loss(model, batch)
    output = model(**batch) if isinstance(batch, Mapping) else model(batch)
    value = getattr(output, "loss", None)
    if value is None and isinstance(output, Mapping):
        value = output.get("loss")
    if value is None and needed:
        raise ValueError('the model returned no loss: put "labels" into the batches, or pass loss=')
    return value
