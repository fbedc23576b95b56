"""What ``fl.explain`` says of the layers of a PEFT model."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

from ..report import LayerReport
from .experts import title
from .routes import adapter_reason, base_reason, kind_reason, lora_layers, state_reason, taker_of
from .views import OwnLayer, View


def reports(model: nn.Module) -> dict[str, LayerReport]:
    """Name -> how it runs, of every PEFT LoRA layer of the model, swapped in or not, and of our own in PEFT."""
    peft = sys.modules.get("peft.tuners.lora.layer")  # without it there is no such layer
    if peft is None:
        return {}
    ours = {name: layer.report() for name, layer in model.named_modules() if isinstance(layer, OwnLayer)}
    return {**ours, **{title(name, layer): _report(layer) for name, layer in lora_layers(model, peft.LoraLayer)}}


def _report(layer: Any) -> LayerReport:
    known = {**layer.lora_A._modules, **getattr(layer, "lora_embedding_A", {})}
    keys = [key for key in layer.active_adapters if key in known]
    path, reason = _path(layer, keys)
    rank = sum(layer.r[key] for key in keys)
    parameters = [p for part in layer.adapter_layer_names for p in getattr(layer, part, nn.Module()).parameters()]
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return LayerReport("lora", layer.in_features, layer.out_features, rank, trainable, path, reason)


def _path(layer: Any, keys: list[str]) -> tuple[str, str]:
    """How a layer with these active adapters runs, and why."""
    taker = taker_of(layer)
    if taker is None:
        return "peft", kind_reason(layer) or "not swapped in: call fl.swap_in(model), again after adding layers"
    if state := state_reason(layer):
        return "base", state
    if not keys:
        return "base", "none of its adapters is active: the frozen layer alone"
    if reason := next(filter(None, (adapter_reason(layer, key) for key in keys)), None):
        return "peft", reason
    if taker.stacked:
        several = "several adapters are active: the stack of experts takes one"
        return ("peft", several) if len(keys) > 1 else taker.active()[0].path(0)
    return _op_report(taker.active())


def _op_report(active: list[View]) -> tuple[str, str]:
    first = active[0]
    several = f"; {len(active)} adapters: {', '.join(view.adapter.key for view in active)}" if len(active) > 1 else ""
    if own := base_reason(first.layer.base_layer):
        return "onto", f"{own}, the low-rank product is added to its result{several}"
    path, reason = first.path(first.adapter.down.shape[0])
    members = first.group.partners(first) if first.group else []
    partners = [view.name.rpartition(".")[2] for view in members if view is not first]
    like, dropout = first.stored()[0], first.adapter.dropout
    together = all(view._joins(first, like, dropout) for view in members)
    if not several and partners and first in members and together:
        reason += f"; one pass over x with {', '.join(partners)}"
    return path, reason + several
