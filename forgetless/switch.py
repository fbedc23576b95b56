"""The updates scaled, or off: ``scaled`` and ``disabled``; and what forward passes make for the penalty."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from .layers.linear import AdaptedLinear
from .model import adapters, running_layers

#: Attributes of an object or another dictionary, one key of it, and a value for it.
Entry = tuple[dict[str, Any], str, Any]


class scaled:  # noqa: N801 - used as a function
    """Multiply the update of every layer: at once and for good, or as a context manager until its end.

    ``fl.scaled(model, 0.6)`` goes on from there: merge, drift, penalties, and ``fl.save`` (PEFT's ``save_pretrained``
    of a swapped-in model), which writes an ``alpha`` that is multiplied as well. Factors multiply up. With
    ``with fl.scaled(model, 0.6):`` what was before comes back at the end. In a model of PEFT the active adapters are
    meant. Curvature that ``Laplace`` has measured is that of the scale it was measured at.

    Args:
        model: an adapted model, or one with PEFT's layers swapped in.
        factor: finite.

    Raises:
        ValueError: the model has no adapters; ``factor`` is not a finite number, or 0 after ``fl.consolidate``; a
            method has no ``alpha``; an adapter of PEFT is merged, or its output is not linear in its scale.
    """

    def __init__(self, model: nn.Module, factor: float):
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not math.isfinite(factor):
            raise ValueError(f"factor is {factor!r}, wants a finite number")
        running_layers(model)  # raises without adapters
        layers = adapters(model)
        entries = [entry for name, layer in layers.items() for entry in _scaled(name, layer, factor)]
        if "peft" in sys.modules:
            from .peft.scales import scaled_entries

            entries += scaled_entries(model, factor)
        self._change = _Change(model, entries)  # every error has been raised
        self._factor, self._layers = factor, list(layers.values())
        self._folded: dict[int, tuple[Tensor, Tensor]] = {}  # what was there, by the id of what is there now
        for layer in self._layers:
            before = layer.folded
            layer.folded = [(down, up / factor) for down, up in before]  # scale * up @ down as it was
            self._folded.update((id(up), pair) for (_, up), pair in zip(layer.folded, before, strict=True))

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            layer.folded = [self._folded.get(id(up), (down, up * self._factor)) for down, up in layer.folded]
        self._change.undo()


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context the frozen layers run alone: the reference model of KL or DPO, without a second copy.

    What a pass before it left behind for ``fl.penalty`` and ``fl.drift`` stays. A model of PEFT has all its adapters
    off, as by PEFT's ``disable_adapter``.

    Args:
        model: an adapted model, or one with PEFT's layers swapped in.

    Raises:
        ValueError: the model has no adapters.
    """
    running_layers(model)
    entries: list[Entry] = [(layer.__dict__, "disabled", True) for layer in adapters(model).values()]
    if "peft" in sys.modules:
        from .peft.scales import disabled_entries

        entries += disabled_entries(model)
    change = _Change(model, entries)
    try:
        yield
    finally:
        change.undo()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each module is in the mode it was in."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Change:
    """Entries that are other ones until ``undo``; passes that run meanwhile are in a state of their own."""

    def __init__(self, model: nn.Module, entries: list[Entry]):
        self.before = [(table, key, table.get(key)) for table, key, _ in entries]
        keepers = {layer.passes for layer in running_layers(model).values()}
        self.states = [(passes, passes.state) for passes in keepers if passes is not None]
        for table, key, value in entries:
            table[key] = value
        for passes, _ in self.states:
            passes.made += 1
            passes.state = passes.made

    def undo(self) -> None:
        for table, key, value in self.before:
            if value is None:  # it was not there
                del table[key]
            else:
                table[key] = value
        for passes, state in self.states:
            passes.state = state


def _scaled(name: str, layer: AdaptedLinear, factor: float) -> list[Entry]:
    """What multiplies the layer's scale."""
    method: Any = layer.method
    if not hasattr(method, "alpha"):
        raise ValueError(f"{name}: {type(method).__name__} has no alpha, in which fl.save could keep the factor")
    if factor == 0 and layer.folded:
        raise ValueError(f"factor is 0, but {name} has consolidated tasks, which fl.save writes at the adapter's scale")
    changed = replace(method, alpha=method.alpha * factor)
    return [(layer.adapter.__dict__, "scale", layer.adapter.scale * factor), (layer.__dict__, "method", changed)]


def fuse_penalty(model: nn.Module, enabled: bool = True) -> nn.Module:
    """Whether passes on the kernels or under FSDP2 make what ``fl.penalty`` needs; they do unless told not to.

    With it, a training pass makes the products of the factors with the penalties' rows in the launches that it makes
    anyway, and ``fl.penalty`` adds up what they made: it shares the graph of that pass, so that backward is called
    once, on the loss with the penalty. Without it, or where the factors have changed since the pass, they are made by
    ``fl.penalty``, for all layers at once. With gradient accumulation, switch it off for the micro-batches that no
    penalty is added to: each would pay for its rows, about k / M of the low-rank path for k rows and M tokens.

    Args:
        model: an adapted model, or one with PEFT's layers swapped in.
        enabled: False to stop.

    Returns:
        The same model.

    Raises:
        ValueError: the model has no adapters.
    """
    for layer in running_layers(model).values():
        layer.makes_products = enabled
    return model
