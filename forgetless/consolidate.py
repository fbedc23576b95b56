"""Consolidation: a task has been learnt; keep it, and make room for the next one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .calibrate import LossFunction, calibrate
from .folding import check_foldable
from .layers.frozen import site_of
from .layers.linear import AdaptedLinear
from .methods.curlora import CURLoRAAdapter, weight_hash
from .siblings import share_statistics
from .switch import scaled


@dataclass
class Consolidation:
    """What ``consolidate`` did.

    Attributes:
        rounding: layer name -> ||W_new - (W_old + delta)|| / ||delta||, what rounding to the weight's dtype lost of
            the update; 0 for a layer whose update was zero.
    """

    rounding: dict[str, float]
    _layers: dict[str, AdaptedLinear] = field(repr=False)
    _before: dict[str, tuple[Tensor, dict[str, Tensor]]] | None = field(repr=False)
    _model: nn.Module = field(repr=False)

    @torch.no_grad()
    def undo(self) -> None:
        """Put weights, adapters and statistics back, bit for bit. Only after ``consolidate(..., undo=True)``.

        Raises:
            ValueError: nothing was kept, or it was undone already.
        """
        if self._before is None:
            raise ValueError("nothing was kept to undo: call fl.consolidate(model, batches, undo=True)")
        for name, (weight, state) in self._before.items():
            layer = self._layers[name]
            layer.weight.copy_(weight)
            layer.folded = layer.folded[:-1]
            layer.adapter.load_state_dict(state)
        share_statistics(self._model)
        self._before = None


def consolidate(
    model: nn.Module,
    batches: Iterable[Any] | None = None,
    loss: LossFunction | None = None,
    on_batch: Callable[[int], None] | None = None,
    undo: bool = False,
    scale: float = 1.0,
) -> Consolidation:
    """Fold the update of the finished task into the frozen weights and start afresh, with the task among the kept.

    The update is added to the base (in float32, rounded once; the loss to rounding is measured), the adapters start
    again from zero, the statistics of ``batches`` are added to those the penalties hold, and the penalties are
    centred at the new start. The folded factors stay beside the adapter, so that ``fl.save`` still describes the
    whole change of the original base model. Start a fresh optimiser afterwards: its moments belong to the old task.

    Args:
        model: an adapted model.
        batches: of the finished task, as of ``fl.calibrate``; needed if a penalty asks for statistics.
        loss: as of ``fl.calibrate``.
        on_batch: as of ``fl.calibrate``.
        undo: keep a copy of the weights and adapters, so that ``.undo()`` restores them bit for bit. (While it works,
            consolidate holds such a copy in any case, so that a failure changes nothing.)
        scale: factor of the update that is folded, not 0: below 1 it keeps more of the base and of earlier tasks, see
            ``fl.fit_budget``.

    Raises:
        ValueError: no adapters; ``scale`` is 0 or not finite; an adapter holds NaN or Inf; a weight is tied to another
            module's; batches are missing. Nothing is changed then.
    """
    if scale == 0:
        raise ValueError("scale is 0, wants another number: nothing would be consolidated; fl.remove drops an update")
    result = check_foldable(model, "consolidated")
    asking = [s for layer in result.values() for s in layer.adapter.penalty_states() if s.statistics]
    if asking and batches is None:
        title = type(asking[0].spec).__name__
        raise ValueError(f"batches is missing: {title} needs statistics of the finished task")
    before = {
        name: (layer.weight.detach().clone(), {k: v.clone() for k, v in layer.adapter.state_dict().items()})
        for name, layer in result.items()
    }
    once = {id(state.shared()): state for state in asking}
    copies = {key: state.export_statistics() for key, state in once.items()}
    current = [copies[id(state.shared())] for state in asking]
    rounding = {}
    try:
        with scaled(model, scale) if scale != 1.0 else nullcontext():
            for name, layer in result.items():
                if isinstance(layer.adapter, CURLoRAAdapter) and layer.adapter.weight_sha256 is None:
                    layer.adapter.weight_sha256 = weight_hash(layer.weight)
                rounding[name] = layer.fold()
                layer.trace = None
                layer.adapter.restart(site_of(name, layer.base))
        if asking:
            assert batches is not None
            calibrate(model, batches, loss, on_batch)
            _add(asking, current)
    except BaseException:
        Consolidation({}, {name: result[name] for name in rounding}, {n: before[n] for n in rounding}, model).undo()
        raise
    return Consolidation(rounding, result, before if undo else None, model)


def _add(states: list[Any], saved: list[dict[str, Tensor]]) -> None:
    """Add to each state what it held; siblings that share statistics go on sharing if they held the same."""
    first: dict[int, tuple[Any, dict[str, Tensor]]] = {}
    for state, mine in zip(states, saved, strict=True):
        _, theirs = first.setdefault(id(state.shared()), (state, mine))
        if theirs is not mine and not all(torch.equal(theirs[name], mine[name]) for name in mine):
            state.separate()
    done: set[int] = set()
    for state, mine in zip(states, saved, strict=True):
        if id(state.shared()) not in done:
            done.add(id(state.shared()))
            state.add_statistics(mine)
