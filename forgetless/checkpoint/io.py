"""Adapters on disk: safetensors and JSON, nothing else.

A folder holds

    adapter_model.safetensors   the adapter's parameters; PEFT's key names for LoRA-shaped methods
    adapter_config.json         PEFT's config for LoRA-shaped methods, so that ``peft.PeftModel`` loads the folder
    forgetless.json             method, penalties, layers, and hashes of what must fit together
    forgetless_state.safetensors   statistics of the penalties (curvature, covariance), if there are any

LoRA-shaped folders written by PEFT itself load too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import whole
from ..coverage import warn_uncalled
from ..files import newest, read_json, write_together
from ..layers.linear import AdaptedLinear, site_of
from ..layers.quantized import weight_mark
from ..layers.stack import stacks
from ..methods import Method
from ..methods.curlora import CURLoRAAdapter, weight_hash
from ..methods.lora import LoRAAdapter
from ..model import adapt, adapters, remove
from ..siblings import share_statistics
from ..targets import find_layers
from . import peft_format
from .experts_format import flattened, stacked
from .peft_format import CONFIG, WEIGHTS, read_tensors, tensor_bytes

FORMAT = 1
OURS = "forgetless.json"
STATE = "forgetless_state.safetensors"


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` into ``folder``, which may exist; the base model is not written.

    Every file is written beside its place and then renamed, so a reader never sees half of one; killed at any moment,
    it leaves the old adapter or the new one for ``fl.load``. Where parameters are sharded over processes (FSDP2), every
    process must call this; the first one writes, and all return when it has.
    Parameters keep their dtype; PEFT loads the folders of LoRA, CLoRA and LaLoRA.

    Args:
        model: an adapted model.
        folder: is made if it is not there; files of an earlier adapter in it are replaced.

    Raises:
        ValueError: the model has no adapters, or they are of several methods.
        OSError: the folder cannot be written.
    """
    layers, method = _of_one_method(model)
    warn_uncalled(layers)
    first = next(iter(layers.values()))
    facts = {name: _facts(layer) for name, layer in layers.items()}
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in _saved_tensors(name, layer).items()}
    state = {
        f"{name}.{index}.{key}": tensor
        for name, layer in layers.items()
        for index, penalty in enumerate(layer.adapter.penalty_states())
        for key, tensor in penalty.state_dict().items()
    }
    if isinstance(first.adapter, LoRAAdapter):
        config = peft_format.config_of(model, layers, method)
    else:
        config = {"peft_type": method.name.upper(), "base_model_name_or_path": peft_format.base_name(model)}
    files = {WEIGHTS: tensor_bytes(flattened(model, tensors))}
    if state:
        files[STATE] = tensor_bytes(state)
    ours = {
        "format": FORMAT,
        "method": method.to_json(),
        "layers": facts,
        "consolidated": len(first.folded),
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files |= {CONFIG: _json(config), OURS: _json(ours)}  # last: it has the hashes of the others
    _write_once(Path(folder), files, layers)


def export_lora(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters as a plain LoRA checkpoint, whatever their method: PEFT loads it, and ``fl.load`` as fl.LoRA.

    CURLoRA's C U R is the LoRA with lora_B = C U and lora_A = R, exact but for the rounding of C U to the adapter's
    dtype; it takes r (N + K) numbers a layer instead of r^2, and its rank r is then free to learn. Penalties and what
    they measured are not in it. Under FSDP2 every process must call this, as ``fl.save``.

    Args:
        model: an adapted model.
        folder: as of ``fl.save``.

    Raises:
        ValueError: the model has no adapters, or they are of several methods; the folder holds a checkpoint of
            ``fl.save``, which this one would not fit.
        OSError: the folder cannot be written.
    """
    layers, method = _of_one_method(model)
    if newest(Path(folder), OURS).exists():
        raise ValueError(f"folder {folder} holds a checkpoint of fl.save ({OURS}); export into another one")
    tensors = {}
    for name, layer in layers.items():
        tensors.update(peft_format.tensors_of(name, layer))
    files = {
        WEIGHTS: tensor_bytes(flattened(model, tensors)),
        CONFIG: _json(peft_format.config_of(model, layers, method)),
    }
    _write_once(Path(folder), files, layers)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Adapt ``model`` as the folder says and fill in the saved parameters; returns the model, adapters trainable.

    Args:
        model: the base model, without adapters.
        folder: written by ``fl.save``, or a LoRA checkpoint written by PEFT.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit this model: names the file, the layer, what it got and what it
            wants. The model is then as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a saved adapter")
    path = newest(folder, OURS)
    if not path.exists():
        return _load_peft(model, folder)
    ours = _checked(read_json(path), folder / OURS)
    facts, digests, count = ours["layers"], ours["sha256"], ours.get("consolidated", 0)
    method = Method.from_json(ours["method"])
    tensors = stacked(model, facts, read_tensors(newest(folder, WEIGHTS), digests[WEIGHTS]), folder)
    state = read_tensors(newest(folder, STATE), digests[STATE]) if STATE in digests else {}
    if count > max([len(tensors), *(size for t in tensors.values() for size in t.shape)]):
        raise ValueError(f"{folder / OURS}: consolidated is {count}, more than {WEIGHTS} holds")
    _check_layers(model, facts, method, folder)
    try:
        adapt(model, method, list(facts))
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:  # a number beyond all bounds
        raise ValueError(f"{folder / OURS}: no adapter can be made of {method}: {error}") from None
    try:
        _restore(model, facts, tensors, state, count)
    except Exception:
        remove(model)
        raise
    return model


def _load_peft(model: nn.Module, folder: Path) -> nn.Module:
    """Load a LoRA checkpoint that PEFT wrote."""
    method, names, tensors = peft_format.read(model, folder)
    _find(model, names, folder)
    adapt(model, method, names)
    try:
        _fill(model, stacked(model, names, tensors, folder), {})
    except Exception:
        remove(model)
        raise
    return model


# ----------------------------------------------------------------------------------------- writing


def _of_one_method(model: nn.Module) -> tuple[dict[str, AdaptedLinear], Method]:
    layers = adapters(model)
    if not layers:
        raise ValueError("model has no adapters; call fl.adapt(model, method) first")
    method = next(iter(layers.values())).method
    if any(layer.method != method for layer in layers.values()):
        raise ValueError("model holds adapters of several methods; save wants one")
    return layers, method


def _facts(layer: AdaptedLinear) -> dict[str, Any]:
    """What the base model's layer must be for this adapter."""
    facts: dict[str, Any] = {"in_features": layer.in_features, "out_features": layer.out_features}
    if isinstance(layer.adapter, CURLoRAAdapter):
        facts["weight_sha256"] = layer.adapter.weight_sha256 or weight_hash(weight_mark(layer.base))
    return facts


def _saved_tensors(name: str, layer: AdaptedLinear) -> dict[str, Tensor]:
    if isinstance(layer.adapter, LoRAAdapter):
        return peft_format.tensors_of(name, layer)
    tensors = {f"{name}.{key}": whole(tensor) for key, tensor in _own_tensors(layer).items()}
    for index, factors in enumerate(layer.folded):
        tensors.update(zip(_folded_keys(name, index), factors, strict=True))
    return tensors


def _own_tensors(layer: AdaptedLinear) -> dict[str, Tensor]:
    return {key: value for key, value in layer.adapter.state_dict().items() if not key.startswith("penalties.")}


def _folded_keys(name: str, index: int) -> tuple[str, str]:
    return f"{name}.folded.{index}.down", f"{name}.folded.{index}.up"


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True) + "\n").encode()


def _write_once(folder: Path, files: dict[str, bytes], layers: dict[str, AdaptedLinear]) -> None:
    """Write the files. Where parameters are sharded, the first process writes and all return when it has."""
    sharded = any(hasattr(p, "full_tensor") for layer in layers.values() for p in layer.parameters())
    try:
        if not sharded or torch.distributed.get_rank() == 0:
            write_together(folder, files, (WEIGHTS, CONFIG, STATE, OURS))
    finally:
        if sharded:
            torch.distributed.barrier()


# ----------------------------------------------------------------------------------------- reading


def _checked(ours: dict[str, Any], path: Path) -> dict[str, Any]:
    """The content of forgetless.json, if it has the entries that ``load`` reads."""
    if ours.get("format") != FORMAT:
        raise ValueError(f"{path}: format {ours.get('format')!r}, this version reads {FORMAT}")
    layers, digests, count = ours.get("layers"), ours.get("sha256"), ours.get("consolidated", 0)
    if not (
        isinstance(layers, dict)
        and layers
        and all(isinstance(facts, dict) for facts in layers.values())
        and isinstance(digests, dict)
        and isinstance(digests.get(WEIGHTS), str)
        and isinstance(ours.get("method"), dict)
    ):
        raise ValueError(f"{path}: damaged, wants method, layers and sha256")
    if type(count) is not int or count < 0:
        raise ValueError(f"{path}: consolidated is {count!r}, wants a count")
    return ours


def _find(model: nn.Module, names: Iterable[str], folder: Path) -> dict[str, nn.Module]:
    names = list(names)
    present = dict(model.named_modules()) | stacks(model)
    for name in names:
        if name not in present:
            raise ValueError(f"{folder}: the adapter has a layer {name}, this {type(model).__name__} has none")
    layers = find_layers(model, names)
    return {name: layers[name] for name in names}


def _check_layers(model: nn.Module, facts: dict[str, Any], method: Method, folder: Path) -> None:
    """The base model has these layers, of these sizes and, where that is saved, with these weights."""
    for name, layer in _find(model, facts, folder).items():
        saved, shape = facts[name], tuple(site_of(name, layer).weight.shape[-2:])
        if (saved.get("out_features"), saved.get("in_features")) != shape:
            raise ValueError(
                f"{folder}: {name} was (out {saved.get('out_features')}, in {saved.get('in_features')}), "
                f"this model's is {shape}"
            )
        if "weight_sha256" in saved and weight_hash(weight_mark(layer)) != saved["weight_sha256"]:
            raise ValueError(
                f"{folder}: the weight of {name} is not the one this {method.name} adapter was made on; "
                "load it onto the same base model, in the same dtype"
            )


def _restore(
    model: nn.Module, facts: dict[str, Any], tensors: dict[str, Tensor], state: dict[str, Tensor], count: int
) -> None:
    """Copy what was saved into the adapters, and fold the ``count`` consolidated tasks into the weights."""
    layers = adapters(model)
    folded = {name: _take_folded(tensors, layer, count) for name, layer in layers.items()}
    _fill(model, tensors, state)
    for name, layer in layers.items():
        if isinstance(layer.adapter, CURLoRAAdapter):
            layer.adapter.gather(site_of(layer.name, layer.base, values=True).weight)
            layer.adapter.weight_sha256 = facts[name].get("weight_sha256")
        for factors in folded[name]:
            layer.fold(factors)
    share_statistics(model)


def _take_folded(tensors: dict[str, Tensor], layer: AdaptedLinear, count: int) -> list[tuple[Tensor, Tensor]]:
    """Remove the factors of ``count`` consolidated tasks from ``tensors``, checked against the layer."""
    N, K = layer.out_features, layer.in_features
    device = layer.weight.device
    if isinstance(layer.adapter, LoRAAdapter):
        *experts, R, _ = layer.adapter.down.shape
        a, b = peft_format.keys(layer.name).values()
        shapes = {a: torch.empty(*experts, (1 + count) * R, K), b: torch.empty(*experts, N, (1 + count) * R)}
        (_, down), (_, up) = _take(tensors, shapes, WEIGHTS)
        downs, ups = down.split(R, dim=-2), [part.contiguous() for part in up.split(R, dim=-1)]
        tensors[a], tensors[b] = downs[0], ups[0]
        return [(d.to(device), u.to(device)) for d, u in zip(downs[1:], ups[1:], strict=True)]
    factors = []
    for index in range(count):
        R = layer.adapter.factors()[0].shape[0]
        shapes = dict(zip(_folded_keys(layer.name, index), (torch.empty(R, K), torch.empty(N, R)), strict=True))
        (_, down), (_, up) = _take(tensors, shapes, WEIGHTS)
        factors.append((down.to(device), up.to(device)))
    return factors


@torch.no_grad()
def _fill(model: nn.Module, tensors: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """Copy the saved tensors into the model. All are checked before any is copied."""
    pairs = []
    tensors, state = dict(tensors), dict(state)
    for name, layer in adapters(model).items():
        if isinstance(layer.adapter, LoRAAdapter):
            targets = {key: getattr(layer.adapter, factor).data for factor, key in peft_format.keys(name).items()}
        else:
            targets = {f"{name}.{key}": tensor for key, tensor in _own_tensors(layer).items()}
        pairs += _take(tensors, targets, WEIGHTS)
        for index, penalty in enumerate(layer.adapter.penalty_states()):
            targets = {f"{name}.{index}.{key}": tensor for key, tensor in penalty.state_dict().items()}
            pairs += _take(state, targets, STATE)
    for file, left in ((WEIGHTS, tensors), (STATE, state)):
        if left:
            raise ValueError(f"{file} holds {min(left)}, which this model has no place for")
    for target, tensor in pairs:
        target.copy_(tensor)


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
