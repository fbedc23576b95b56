"""The updates scaled, or off: ``scaled`` and ``disabled``; and what forward passes make for the penalty."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from .layers.linear import AdaptedLinear
from .model import adapters, running_layers


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
        changes = [_change_layer(name, layer, factor) for name, layer in adapters(model).items()]
        if "peft" in sys.modules:
            from .peft.scales import changes as changes_of_peft

            changes += changes_of_peft(model, factor)
        self._states = _change_states(model)
        self._undo = [change() for change in changes]  # every error has been raised

    def __enter__(self) -> None: ...

    def __exit__(self, *error: object) -> None:
        for undo in self._undo:
            undo()
        for passes, state in self._states:
            passes.state = state


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
    switched = [(layer.__dict__, "disabled", True) for layer in adapters(model).values()]
    if "peft" in sys.modules:
        from .peft.scales import switches

        switched += switches(model)
    before = [(table, key, table.get(key, False)) for table, key, _ in switched]
    states = _change_states(model)
    try:
        for table, key, value in switched:
            table[key] = value
        yield
    finally:
        for table, key, value in before:
            table[key] = value
        for passes, state in states:
            passes.state = state


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


def _change_states(model: nn.Module) -> list[tuple[Any, int]]:
    """Each pass-keeper of the model is in a new state; (keeper, the state before)."""
    keepers = {id(layer.passes): layer.passes for layer in running_layers(model).values() if layer.passes is not None}
    before = [(passes, passes.state) for passes in keepers.values()]
    for passes in keepers.values():
        passes.made += 1
        passes.state = passes.made
    return before


def _change_layer(name: str, layer: AdaptedLinear, factor: float) -> Callable[[], Callable[[], None]]:
    """What multiplies the layer's scale, and returns what undoes that."""
    method: Any = layer.method
    scale, folded = layer.adapter.scale, layer.folded
    if not hasattr(method, "alpha"):
        raise ValueError(f"{name}: {type(method).__name__} has no alpha, in which fl.save could keep the factor")
    if factor == 0 and folded:
        raise ValueError(f"factor is 0, but {name} has consolidated tasks, which fl.save writes at the adapter's scale")

    def change() -> Callable[[], None]:
        layer.adapter.scale = scale * factor
        layer.method = replace(method, alpha=method.alpha * factor)
        layer.folded = [(down, up / factor) for down, up in folded]  # scale * up @ down as it was
        ours = {id(up): pair for (_, up), pair in zip(layer.folded, folded, strict=True)}

        def undo() -> None:
            layer.adapter.scale, layer.method = scale, method
            layer.folded = [ours.get(id(up), (down, up * factor)) for down, up in layer.folded]

        return undo

    return change


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
