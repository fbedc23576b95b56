"""Scaling and switching off the adapters of a PEFT model: what ``fl.scaled`` and ``fl.disabled`` do to it."""

from __future__ import annotations

from typing import Any

from torch import nn

from .routes import lora_layers
from .swap import _peft
from .views import OwnLayer


def scaled_entries(model: nn.Module, factor: float) -> list[tuple[dict[str, Any], str, Any]]:
    """(table, key, new value) of what the scale of each active adapter is in, in its layers and in its config.

    Raises:
        ValueError: an adapter is merged, or is one whose output is not linear in its scale.
    """
    layers = dict(lora_layers(model, _peft("tuners.lora.layer").LoraLayer))
    tables: dict[int, tuple[dict[str, Any], list[str]]] = {}
    active: set[str] = set()
    for name, layer in layers.items():
        keys = [key for key in layer.active_adapters if key in layer.scaling]
        if layer.merged:
            raise ValueError(f"{name} has its adapters merged into the weight; unmerge_adapter() first")
        for key in keys:
            if getattr(layer, "lora_variant", {}).get(key) is not None or getattr(layer, "use_dora", {}).get(key):
                raise ValueError(f"adapter {key!r} of {name} is not linear in its scale (DoRA or another variant)")
        active.update(keys)
        for table in (layer.scaling, layer.lora_alpha):
            tables[id(table)] = (table, keys)
    for name, module in model.named_modules():
        if isinstance(module, OwnLayer):
            if getattr(module, "merged", False):
                raise ValueError(f"{name} has its adapters merged into the weight; unmerge_adapter() first")
            for key, own in module.active_layers().items():
                active.add(key)
                tables[id(own.adapter)] = (own.adapter.__dict__, ["scale"])
    for module in model.modules():
        configs = getattr(module, "peft_config", {})
        for key in active & configs.keys():
            config = vars(configs[key])
            tables[id(config)] = (config, ["lora_alpha" if "lora_alpha" in config else "alpha"])
            patterns = config.get("alpha_pattern") or {}
            tables[id(patterns)] = (patterns, list(patterns))
    return [(table, key, table[key] * factor) for table, keys in tables.values() for key in keys]


def disabled_entries(model: nn.Module) -> list[tuple[dict[str, Any], str, Any]]:
    """(attributes of a module of PEFT, the one that switches its adapters off, its value)."""
    tuners = _peft("tuners.tuners_utils").BaseTunerLayer, _peft("utils.other").AuxiliaryTrainingWrapper
    return [(module.__dict__, "_disable_adapters", True) for module in model.modules() if isinstance(module, tuners)]
