"""PEFT's layout for experts: names of nested wrappers, factors flattened over experts, and ``target_parameters``.

PEFT wraps an experts module once for each adapted parameter, the first one innermost, so that a checkpoint has
"experts.base_layer.lora_A.weight" and "experts.lora_A.weight" and does not say which is which: the order of the
module's parameters does. lora_A is (E * R, K) with the expert slowest, lora_B (N, R * E) with the expert fastest.
Here a stack's factors go by its own name, as (E, R, K) and (E, N, R).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.experts import AdaptedExperts
from ..layers.linear import AdaptedLinear
from ..layers.stack import Stack, stacks

PREFIX = "base_model.model."
_LAYER = ".base_layer"
#: Linear layers of these names PEFT takes for experts in a model that has stacks of them, and loses when it loads.
_TAKEN_FOR_EXPERTS = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}


def keys(name: str) -> dict[str, str]:
    """Factor -> the key of its tensor, for the layer ``name``."""
    return {"down": f"{PREFIX}{name}.lora_A.weight", "up": f"{PREFIX}{name}.lora_B.weight"}


def wrapper_names(names: Iterable[str], known: Mapping[str, Stack]) -> dict[str, str]:
    """Stack -> name of the wrapper that PEFT has for it, where these are adapted; ``known`` are all of the model."""
    chosen = set(names)
    modules: dict[str, list[str]] = {}
    for name in known:
        if name in chosen:
            modules.setdefault(name.rpartition(".")[0], []).append(name)
    return {
        name: module + _LAYER * (len(inside) - 1 - place)
        for module, inside in modules.items()
        for place, name in enumerate(inside)
    }


def flattened(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as PEFT lays them out."""
    known = stacks(model)
    wrappers = wrapper_names([name for name in known if keys(name)["down"] in tensors], known)
    result = dict(tensors)
    for name, wrapper in wrappers.items():
        down, up = (result.pop(key) for key in keys(name).values())
        E, R, K = down.shape
        flat = down.reshape(E * R, K), up.permute(1, 2, 0).reshape(up.shape[1], R * E)
        result.update(zip(keys(wrapper).values(), flat, strict=True))
    return result


def stacked(model: nn.Module, names: Iterable[str], tensors: Mapping[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Inverse of ``flattened``, for these stacks.

    Raises:
        ValueError: a shape does not fit the number of experts.
    """
    known = stacks(model)
    result = dict(tensors)
    for name, wrapper in wrapper_names(names, known).items():
        E = known[name].matrices().shape[0]
        for (factor, key), old in zip(keys(name).items(), keys(wrapper).values(), strict=True):
            if old not in result:
                continue  # who fills the adapters says so
            t = result.pop(old)
            side = 0 if factor == "down" else 1
            if t.dim() != 2 or t.shape[side] % E:
                raise ValueError(f"{folder}: {old} has shape {tuple(t.shape)}, wants {E} experts in dimension {side}")
            result[key] = t.view(E, -1, t.shape[1]) if factor == "down" else t.view(len(t), -1, E).permute(2, 0, 1)
    return result


def named(model: nn.Module, wrappers: Iterable[str], parameters: Iterable[str], folder: Path) -> list[str]:
    """The layers that the names of a checkpoint of PEFT mean; ``parameters`` is its target_parameters.

    Raises:
        ValueError: it does not say which parameters of an experts module it adapts.
    """
    known = stacks(model)
    suffixes = tuple(f".{name}" for name in parameters)
    meant = [name for name in known if f".{name}".endswith(suffixes)]
    of_module = {wrapper: name for name, wrapper in wrapper_names(meant, known).items()}
    modules = {name.rpartition(".")[0] for name in known}
    result = []
    for wrapper in wrappers:
        if wrapper.replace(_LAYER, "") in modules and wrapper not in of_module:
            raise ValueError(f"{folder}: target_parameters does not say which parameter {wrapper} adapts")
        result.append(of_module.get(wrapper, wrapper))
    return result


def split_targets(
    model: nn.Module, layers: Mapping[str, AdaptedLinear]
) -> tuple[dict[str, AdaptedLinear], dict[str, Any]]:
    """The layers for target_modules, and what else adapter_config.json needs where the model has experts."""
    known = stacks(model)
    parameters, modules = [], {}
    for name, layer in layers.items():
        if isinstance(layer, AdaptedExperts):
            parameters.append(name)
        elif known and name.rpartition(".")[2] in _TAKEN_FOR_EXPERTS and type(layer.base) is nn.Linear:
            parameters.append(f"{name}.weight")  # the same tensors, by a way on which PEFT keeps them
        else:
            modules[name] = layer
    # PEFT refuses dropout beside target_parameters
    return modules, {"target_parameters": parameters, "lora_dropout": 0.0} if parameters else {}
