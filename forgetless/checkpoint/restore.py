"""Filling an adapted model with what a folder holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..files import newest
from ..folding import check_foldable
from ..layers.frozen import site_of
from ..layers.linear import AdaptedLinear
from ..layers.quantized import weight_mark
from ..methods import Method
from ..methods.curlora import CURLoRAAdapter, weight_hash
from ..methods.lora import LoRAAdapter
from ..model import adapters
from ..siblings import share_statistics
from . import peft_format
from .beside import places
from .description import OURS, read_description
from .experts_format import stacked
from .peft_format import PREFIX, WEIGHTS, Saved, read_tensors

STATE = "forgetless_state.safetensors"


def read_saved(model: nn.Module, folder: Path) -> Saved:
    """What ``fl.save`` wrote there, for this model. Raises what ``fl.load`` does."""
    ours = read_description(newest(folder, OURS))
    digests, count = ours["sha256"], ours["consolidated"]
    method = Method.from_json(ours["method"])
    tensors = stacked(model, ours["layers"], read_tensors(newest(folder, WEIGHTS), digests[WEIGHTS]), folder)
    state = read_tensors(newest(folder, STATE), digests[STATE]) if STATE in digests else {}
    if count > max([len(tensors), *(size for t in tensors.values() for size in t.shape)]):
        raise ValueError(f"{folder / OURS}: consolidated is {count}, more than {WEIGHTS} holds")
    return Saved(method, ours["layers"], tensors, ours["trained"], state, count)


def own_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    """The adapter's state dict without its penalties."""
    return {key: value for key, value in layer.adapter.state_dict().items() if not key.startswith("penalties.")}


def folded_keys(name: str, index: int) -> tuple[str, str]:
    """Keys of the factors down and up of a consolidated task."""
    return f"{name}.folded.{index}.down", f"{name}.folded.{index}.up"


def facts_of(name: str, layer: AdaptedLinear) -> dict[str, Any]:
    """What the base model's layer must be for this adapter, and the name that its random bases are drawn for."""
    facts: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features}
    if layer.name != name:
        facts["drawn_as"] = layer.name
    if isinstance(layer.adapter, CURLoRAAdapter):
        facts["weight_sha256"] = layer.adapter.weight_sha256 or weight_hash(weight_mark(layer.base))
    return facts


def resume(model: nn.Module, folder: Path) -> None:
    """Fill the adapters that the model has with those of a folder of ``fl.save``, in place.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or holds adapters that are others than those of the model.
    """
    saved, layers = read_saved(model, folder), adapters(model)
    if {name: facts_of(name, layer) for name, layer in layers.items()} != saved.facts:
        raise ValueError(f"{folder} holds adapters of other layers, or of another base model, than this model has")
    for name, layer in layers.items():
        if layer.method != saved.method:
            raise ValueError(f"{folder} holds {saved.method}, the model has {layer.method} on {name}")
        if len(layer.folded) not in (0, saved.count):
            raise ValueError(f"{folder} holds {saved.count} consolidated tasks, the model has {len(layer.folded)}")
    restore(model, saved)


def restore(model: nn.Module, saved: Saved) -> None:
    """Copy what was saved into the adapters, and fold those consolidated tasks into the weights that are not there."""
    layers = adapters(model)
    folded = {name: _take_folded(saved.tensors, name, layer, saved.count) for name, layer in layers.items()}
    if any(len(layer.folded) != saved.count for layer in layers.values()):
        check_foldable(model, "loaded")
    fill(model, saved)
    for name, layer in layers.items():
        if isinstance(layer.adapter, CURLoRAAdapter) and not layer.folded:  # C and R are of the first weight
            layer.adapter.gather(site_of(layer.name, layer.base, values=True).weight)
            layer.adapter.weight_sha256 = saved.facts[name].get("weight_sha256")
        for factors in folded[name][len(layer.folded) :]:
            layer.fold(factors)
    share_statistics(model)


def _take_folded(
    tensors: dict[str, Tensor], name: str, layer: AdaptedLinear, count: int
) -> list[tuple[Tensor, Tensor]]:
    """Remove the factors of ``count`` consolidated tasks from ``tensors``, checked against the layer."""
    N, K = layer.out_features, layer.in_features
    device = layer.device
    if isinstance(layer.adapter, LoRAAdapter):
        *experts, R, _ = layer.adapter.down.shape
        a, b = peft_format.keys(name).values()
        shapes = {a: torch.empty(*experts, (1 + count) * R, K), b: torch.empty(*experts, N, (1 + count) * R)}
        (_, down), (_, up) = _take(tensors, shapes, WEIGHTS)
        downs, ups = down.split(R, dim=-2), [part.contiguous() for part in up.split(R, dim=-1)]
        tensors[a], tensors[b] = downs[0], ups[0]
        return [(d.to(device), u.to(device)) for d, u in zip(downs[1:], ups[1:], strict=True)]
    factors = []
    for index in range(count):
        R = layer.adapter.factors()[0].shape[0]
        shapes = dict(zip(folded_keys(name, index), (torch.empty(R, K), torch.empty(N, R)), strict=True))
        (_, down), (_, up) = _take(tensors, shapes, WEIGHTS)
        factors.append((down.to(device), up.to(device)))
    return factors


@torch.no_grad()
def fill(model: nn.Module, saved: Saved) -> None:
    """Copy the saved tensors into the model. All are checked before any is copied."""
    tensors, state = dict(saved.tensors), dict(saved.state)
    own = places(model) if saved.trained else {}
    missing = saved.trained.keys() - own.keys()
    if missing:
        raise ValueError(f"{WEIGHTS} holds {min(missing)}, which was trained beside the adapters; this model has none")
    pairs = _take(tensors, {PREFIX + key: own[key] for key in saved.trained}, WEIGHTS)
    for name, layer in adapters(model).items():
        if isinstance(layer.adapter, LoRAAdapter):
            targets = {key: getattr(layer.adapter, factor).data for factor, key in peft_format.keys(name).items()}
        else:
            targets = {f"{name}.{key}": tensor for key, tensor in own_tensors(layer).items()}
        pairs += _take(tensors, targets, WEIGHTS)
        for index, penalty in enumerate(layer.adapter.penalty_states()):
            prefix = f"{name}.{index}."
            penalty.make_room([key.removeprefix(prefix) for key in state if key.startswith(prefix)])
            targets = {prefix + key: tensor for key, tensor in penalty.state_dict().items()}
            pairs += _take(state, targets, STATE)
    for file, left in ((WEIGHTS, tensors), (STATE, state)):
        if left:
            raise ValueError(f"{file} holds {min(left)}, which this model has no place for")
    if any(target.is_meta for target, _ in pairs):
        raise ValueError("the model is offloaded, or has no numbers yet: there is nothing to load into")
    for target, tensor in pairs:
        target.copy_(tensor)
    for key, trained in saved.trained.items():
        if trained and own[key].is_floating_point():
            own[key].requires_grad_()


def _take(tensors: dict[str, Tensor], targets: dict[str, Tensor], file: str) -> list[tuple[Tensor, Tensor]]:
    """Remove the tensors of these keys from ``tensors``; pairs (target, tensor) of equal shape and kind of dtype."""
    pairs = []
    for key, target in targets.items():
        if key not in tensors:
            raise ValueError(f"{file} lacks {key}")
        tensor = tensors.pop(key)
        if tensor.shape != target.shape:
            raise ValueError(f"{file}: {key} has shape {tuple(tensor.shape)}, wants {tuple(target.shape)}")
        if tensor.is_floating_point() != target.is_floating_point():
            raise ValueError(f"{file}: {key} has dtype {tensor.dtype}, wants {target.dtype}")
        pairs.append((target, tensor))
    return pairs
