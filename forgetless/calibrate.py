"""Calibration: one pass over source-domain data fills the statistics that the attached penalties ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import compat
from .layers.experts import matrices
from .layers.linear import AdaptedLinear
from .model import running_layers
from .penalties import SourceDeviation
from .penalties.covariance import Covariance
from .samples import LossFunction, Tokens, Window, loss_of
from .siblings import Family, StatesOf, siblings, states_of
from .switch import evaluating


def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    loss: LossFunction | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, int]:
    """Measure what must not be forgotten, with the adapters as they are, and centre the penalties there.

    ``Laplace`` takes per-sequence gradients (one forward and backward per batch, no per-sample backward),
    ``LossDeviation`` those of each token, ``SourceDeviation`` the inputs of each layer (forward only). Dropout is off.
    Saved with the adapter by ``fl.save``.
    Siblings (q/k/v, gate/up) that are given the very same x share one covariance from then on. A layer that is used
    several times, or that some batches skip, counts as it is used: the gradient of a sequence is the sum over its uses.

    Args:
        model: an adapted model.
        batches: source-domain batches: mappings of tensors for ``model(**batch)``, with "labels" where gradients
            are needed, first dimension sequences; padding is left out where "attention_mask" (of a decoder
            "decoder_attention_mask") says so. Anything else if ``loss`` is given. Layers are given (sequences, ..,
            features), or all tokens in their order; else batches of one sequence, without padding, are wanted.
        loss: (model, batch) -> scalar mean loss; the model's own ``.loss`` if not given.
        on_batch: called with the number of batches done, for a progress bar.

    Returns:
        Counts: "layers" filled, "batches", "sequences".

    Raises:
        ValueError: no adapters, nothing asks for statistics, no batch, no loss, no logits where Laplace's
            fisher="true" draws labels from them, or two Laplace penalties of which one does; it cannot be told which
            tokens of a layer are of which sequence, or padding (statistics are then reset); or weights are cut over
            processes by tensor parallelism.
    """
    running = matrices(running_layers(model))
    layers = {name: layer for name, layer in running.items() if states_of(layer)}
    return _measure(_Measured(model, layers, loss), list(running.values()), batches, on_batch)


def measure_inputs(
    model: nn.Module, batches: Iterable[Any], form: str | int, loss: LossFunction | None = None
) -> dict[str, Covariance]:
    """Layer name -> E x x^T of its inputs, beside the penalties' own statistics, which stay. Siblings share one.

    Args: as of ``calibrate``; ``form`` as of ``Covariance``. Raises: as of ``calibrate``.
    """
    layers = matrices(running_layers(model))
    spec = SourceDeviation(covariance=form)
    states: dict[AdaptedLinear, Any] = {layer: spec.attach(layer.adapter, layer.site()) for layer in layers.values()}
    _measure(_Measured(model, layers, loss, lambda layer: [states[layer]]), list(layers.values()), batches)
    return {name: states[layer].source for name, layer in layers.items()}


def _measure(
    measured: _Measured,
    running: list[AdaptedLinear],
    batches: Iterable[Any],
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, int]:
    counts = {"layers": len(measured.layers), "batches": 0, "sequences": 0}
    try:
        with _measuring(measured.model, running, measured.needs_gradients):
            measured.begin()
            for batch in batches:
                counts["sequences"] += measured.take(batch, counts["batches"] + 1)
                counts["batches"] += 1
                if on_batch is not None:
                    on_batch(counts["batches"])
            if counts["batches"] == 0:
                raise ValueError("batches is empty, wants at least one batch of source-domain data")
            for state in {state.shared(): state for state in measured.states}.values():
                state.end_statistics()
            for state in measured.states:
                state.calibrated  # noqa: B018 - asked now, so that no step has to wait for the answer
    except BaseException:  # sums that were never divided must not be taken for statistics
        batch = None
        measured.reset()
        raise
    return counts


@contextmanager
def _measuring(model: nn.Module, layers: list[AdaptedLinear], needs_gradients: bool) -> Iterator[None]:
    """Evaluation mode without gradients of parameters; restores all modes afterwards and drops the layers' traces.

    Only gradients of the layers' outputs are measured. Inference mode is left: its tensors have no graph.
    """
    parameters = (*model.parameters(), *(p for layer in layers for p in layer.adapter.parameters()))
    trained = [p for p in dict.fromkeys(parameters) if p.requires_grad and p.is_leaf]
    try:
        for p in trained:
            p.requires_grad_(not needs_gradients)
        with evaluating(model), torch.inference_mode(False), torch.set_grad_enabled(needs_gradients):
            yield
    finally:
        for p in trained:
            p.requires_grad_(True)
        for layer in layers:
            layer.trace = None


class _Measured:
    """The layers that are measured, and what is measured on them, batch by batch. Raises what ``calibrate`` does."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, AdaptedLinear],
        loss: LossFunction | None,
        of: StatesOf = states_of,
    ):
        self.model, self.layers, self.loss, self.of = model, layers, loss, of
        if not layers:
            raise ValueError(
                "no attached penalty asks for statistics; only Laplace (LaLoRA), LossDeviation and SourceDeviation do"
            )
        cut = next((name for name, layer in layers.items() if layer.cut is not None), None)
        if cut is not None:
            raise ValueError(
                f"the weight of {cut} is cut over processes: calibrate the model whole and fl.save; "
                "fl.load after cutting"
            )
        self.states = [state for layer in layers.values() for state in of(layer)]
        draws = {getattr(s.spec, "fisher", None) == "true" for s in self.states if s.statistics != "inputs"}
        if len(draws) > 1:
            raise ValueError(
                "one Laplace penalty has fisher='true', another has not; calibrate wants one kind of labels"
            )
        if draws == {True} and loss is not None:
            raise ValueError("loss is given, but fisher='true' draws labels from the model's own logits; leave it out")
        self.needs_gradients = bool(draws)
        self.generator = torch.Generator().manual_seed(0) if draws == {True} else None
        self.families: dict[nn.Module, Family] = {}

    def begin(self) -> None:
        """Forget earlier statistics; siblings share what is to come."""
        self.reset()
        for members in siblings(self.layers, self.of):
            self.families.update(dict.fromkeys(members, Family(members)))

    def reset(self) -> None:
        """No statistics, and no tensor of a batch is kept."""
        for family in self.families.values():
            family.drop()
        for layer in self.layers.values():
            for state in self.of(layer):
                state.begin_statistics(layer.adapter)

    def _check_read(self) -> None:
        name = next((name for name, layer in self.layers.items() if layer.read), None)
        if name is not None:
            raise ValueError(
                f"the parent of {name} reads its weight instead of calling it: nothing can be measured there; leave it "
                "out with fl.adapt(model, method, exclude=[..])"
            )

    def take(self, batch: Any, number: int) -> int:
        """Run the model on one batch, the ``number``-th; returns its sequences."""
        if self.loss is None and not isinstance(batch, Mapping | Tensor):
            raise ValueError(
                f"batch {number} is a {type(batch).__name__}, wants a mapping of tensors such as a tokenizer returns "
                "with return_tensors='pt'; or pass loss="
            )
        window = Window(batch, next(iter(self.layers.values())).device, self.model)
        value: Any = None
        try:
            with ExitStack() as hooks:
                for layer in self.layers.values():
                    if self.needs_gradients:
                        hooks.callback(layer.register_forward_pre_hook(window.start_graph).remove)
                    hooks.callback(layer.register_forward_hook(partial(self._observe, window)).remove)
                if self.generator is not None:
                    value = window.drawn_loss(self.model, self.generator)
                else:
                    value = loss_of(self.model, window.batch, self.loss, self.needs_gradients)
                if self.needs_gradients:
                    if not torch.isfinite(value).all():
                        raise ValueError(f"batch {number} has a loss of {value.item()}; has it any label?")
                    if value.requires_grad:  # else the batch skips every layer
                        torch.autograd.grad(value, window.leaves, allow_unused=True)
                    for layer in self.layers.values():
                        self._finish(layer, window)  # what has not had all its gradients
            for family in self.families.values():
                family.close()
            self._check_read()
            return window.sequences
        finally:  # an exception keeps this frame alive, and with it the graph
            batch = value = None
            window.drop()

    def _observe(self, window: Window, layer: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        """A forward hook: what the layer is given counts now, or as soon as its output has a gradient."""
        assert isinstance(layer, AdaptedLinear)
        x, again = args[0].detach(), compat.in_backward()  # again: a checkpoint recomputes the call
        window.sequences = window.sequences or x.shape[0]
        states = self.of(layer)
        inputs = [state for state in states if state.statistics == "inputs" and not again]
        rows = window.real(layer.name, x) if inputs else x
        for state in inputs:
            family = self.families.get(state)
            family.take(state, args[0], rows) if family else state.add_inputs(rows)
        if not any(state.statistics != "inputs" for state in states):
            return
        version, calls = x._version, window.calls[layer]
        calls.count += not again
        samples = window.split(layer.name, x)
        mask = window.mask_of(layer.name, x) if any(s.statistics == "tokens" for s in states) else None

        def take_gradient(dy: Tensor) -> None:
            if x._version != version:
                raise ValueError(f"the input of {layer.name} was changed in place after the layer had run on it")
            calls.add(samples, window.split(layer.name, dy), mask)
            if len(calls.xs) == calls.count:
                self._finish(layer, window)

        if y.requires_grad:
            y.register_hook(take_gradient)

    @torch.no_grad()
    def _finish(self, layer: AdaptedLinear, window: Window) -> None:
        """Give the layer's states what it was given in all calls of this batch, once."""
        states = [state for state in self.of(layer) if state.statistics != "inputs"]
        calls = window.calls[layer]
        if not states or calls.finished:
            return
        x, dy, mask = calls.joined(layer, window.sequences)
        labels = window.sequences if window.labels is None else window.labels
        share = window.share
        if share is None:
            share = x.new_full((x.shape[0],), 1.0 / max(x.shape[0], 1), dtype=torch.float64)
        factor = torch.where(share > 0, 1.0 / share, 0.0)
        each = Tokens(layer.adapter, x, dy, mask, factor, (share > 0).sum(), labels)
        joint = None if mask is None else mask.flatten()[None]
        as_one = Tokens(layer.adapter, x.flatten(0, 1)[None], dy.flatten(0, 1)[None], joint, None, 1, labels)
        for state in states:
            state.add_tokens(as_one if getattr(state.spec, "fisher", None) == "batch" else each)
