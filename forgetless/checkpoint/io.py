"""Adapters on disk: safetensors and JSON, nothing else.

A folder holds

    adapter_model.safetensors   the adapter's parameters, what is trained beside it; PEFT's key names for LoRA-shaped
                                methods
    adapter_config.json         PEFT's config for LoRA-shaped methods, so that ``peft.PeftModel`` loads the folder
    forgetless.json             method, penalties, layers, and hashes of what must fit together
    forgetless_state.safetensors   statistics of the penalties (curvature, covariance), if there are any

LoRA-shaped folders written by PEFT itself load too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import whole
from ..coverage import warn_uncalled
from ..files import newest, write_together
from ..layers.frozen import site_of
from ..layers.linear import AdaptedLinear
from ..layers.quantized import weight_mark
from ..layers.stack import stacks
from ..methods import Method
from ..methods.curlora import weight_hash
from ..methods.lora import LoRAAdapter
from ..model import adapt_layers, adapted_layers, remove
from ..names import bare_modules
from ..targets import find_layers
from . import peft_format
from .beside import Beside, trained_beside, warn_of_lost
from .description import FORMAT, OURS, json_bytes
from .experts_format import flattened
from .peft_format import CONFIG, PREFIX, WEIGHTS, Saved, tensor_bytes
from .restore import STATE, facts_of, folded_keys, own_tensors, read_saved, restore


def save(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write the adapters of ``model`` into ``folder``, which may exist; the base model is not written.

    Every file is written beside its place and then renamed, so a reader never sees half of one; killed at any moment,
    it leaves the old adapter or the new one for ``fl.load``. Where parameters are sharded over processes (FSDP2), every
    process must call this; the first one writes, and all return when it has.
    Parameters keep their dtype; PEFT loads the folders of LoRA, CLoRA and LaLoRA. What is trained beside the adapters
    is written, too, with the other tensors of its module: PEFT's ``modules_to_save``. A warning names what of it PEFT
    does not read.

    Args:
        model: an adapted model.
        folder: is made if it is not there; files of an earlier adapter in it are replaced.

    Raises:
        ValueError: the model has no adapters, they are of several methods, or their numbers are not here (offloaded,
            flattened).
        OSError: the folder cannot be written.
    """
    model = bare_modules(model)[""]
    layers, method = _of_one_method(model)
    warn_uncalled(layers)
    first = next(iter(layers.values()))
    beside = trained_beside(model)
    facts = {name: facts_of(name, layer) for name, layer in layers.items()}
    tensors = {key: tensor for name, layer in layers.items() for key, tensor in _saved_tensors(name, layer).items()}
    state = {
        f"{name}.{index}.{key}": tensor
        for name, layer in layers.items()
        for index, penalty in enumerate(layer.adapter.penalty_states())
        for key, tensor in penalty.state_dict().items()
    }
    if isinstance(first.adapter, LoRAAdapter):
        config = _peft_config(model, layers, method, beside)
    else:
        config = {"peft_type": method.name.upper(), "base_model_name_or_path": peft_format.base_name(model)}
    files = {WEIGHTS: tensor_bytes(flattened(model, tensors) | _besides(beside))}
    if state:
        files[STATE] = tensor_bytes(state)
    ours = {
        "format": FORMAT,
        "method": method.to_json(),
        "layers": facts,
        "consolidated": len(first.folded),
        "trained": {key: key in beside.trained for key in beside.tensors},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    files |= {CONFIG: json_bytes(config), OURS: json_bytes(ours)}  # last: it has the hashes of the others
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
    model = bare_modules(model)[""]
    layers, method = _of_one_method(model)
    if newest(Path(folder), OURS).exists():
        raise ValueError(f"folder {folder} holds a checkpoint of fl.save ({OURS}); export into another one")
    beside = trained_beside(model)
    tensors = {key: t for name, layer in layers.items() for key, t in peft_format.tensors_of(name, layer).items()}
    files = {
        WEIGHTS: tensor_bytes(flattened(model, tensors) | _besides(beside)),
        CONFIG: json_bytes(_peft_config(model, layers, method, beside)),
    }
    _write_once(Path(folder), files, layers)


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Adapt ``model`` as the folder says and fill in the saved parameters; returns the model, adapters trainable.

    Args:
        model: the base model, without adapters.
        folder: written by ``fl.save``, or a LoRA checkpoint written by PEFT, its ``modules_to_save`` included.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged or does not fit this model: names the file, the layer, what it got and what it
            wants. The model is then as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder with a saved adapter")
    saved = (read_saved if newest(folder, OURS).exists() else peft_format.read)(model, folder)
    layers = _check_layers(model, saved, folder)
    try:
        drawn_as = {name: facts.get("drawn_as", name) for name, facts in saved.facts.items()}
        adapt_layers(model, saved.method, layers, drawn_as)
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, MemoryError, RuntimeError, TypeError) as error:  # a number beyond all bounds
        raise ValueError(f"{folder}: no adapter can be made of {saved.method}: {error}") from None
    try:
        restore(model, saved)
    except Exception:
        remove(model)
        raise
    return model


# ----------------------------------------------------------------------------------------- writing


def _of_one_method(model: nn.Module) -> tuple[dict[str, AdaptedLinear], Method]:
    layers = adapted_layers(model)
    method = next(iter(layers.values())).method
    if any(layer.method != method for layer in layers.values()):
        raise ValueError("model holds adapters of several methods; save wants one")
    for name, layer in layers.items():
        if any(p.is_meta for p in layer.adapter.parameters()):
            raise ValueError(f"the adapter of {name} has no numbers: it is offloaded, or was never filled")
    return layers, method


def _peft_config(model: nn.Module, layers: dict[str, AdaptedLinear], method: Method, beside: Beside) -> dict[str, Any]:
    """adapter_config.json for PEFT, with a warning of what PEFT will not read."""
    config = peft_format.config_of(model, layers, method) | {"modules_to_save": beside.modules or None}
    warn_of_lost(beside)
    return config


def _besides(beside: Beside) -> dict[str, Tensor]:
    return {PREFIX + key: whole(tensor.detach()) for key, tensor in beside.tensors.items()}


def _saved_tensors(name: str, layer: AdaptedLinear) -> dict[str, Tensor]:
    if isinstance(layer.adapter, LoRAAdapter):
        return peft_format.tensors_of(name, layer)
    tensors = {f"{name}.{key}": whole(tensor) for key, tensor in own_tensors(layer).items()}
    for index, factors in enumerate(layer.folded):
        tensors.update(zip(folded_keys(name, index), factors, strict=True))
    return tensors


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


def _check_layers(model: nn.Module, saved: Saved, folder: Path) -> dict[str, nn.Module]:
    """The base model's layers of these names, of the sizes and with the weights that are saved, if they are."""
    present = bare_modules(model) | stacks(model)
    for name in saved.facts:
        if name not in present:
            raise ValueError(f"{folder}: the adapter has a layer {name}, this {type(model).__name__} has none")
    layers = find_layers(model, saved.facts)
    for name, facts in saved.facts.items():
        shape, sizes = tuple(site_of(name, layers[name]).weight.shape[-2:]), ("out_features", "in_features")
        if facts and tuple(map(facts.get, sizes)) != shape:
            N, K = map(facts.get, sizes)
            raise ValueError(f"{folder}: {name} was (out {N}, in {K}), this model's is {shape}")
        if "weight_sha256" in facts and weight_hash(weight_mark(layers[name])) != facts["weight_sha256"]:
            raise ValueError(
                f"{folder}: the weight of {name} is not the one this {saved.method.name} adapter was made on; "
                "load it onto the same base model, in the same dtype"
            )
    return {name: layers[name] for name in saved.facts}
