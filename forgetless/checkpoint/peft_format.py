"""PEFT's folder layout for LoRA: its two files, its key names and its config, written and read without PEFT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from ..files import newest, read_json, sha256_of
from ..layers.linear import AdaptedLinear
from ..methods import LoRA, Method
from ..methods.lora import LoRAAdapter
from ..names import bare_modules
from .experts_format import PREFIX, keys, named, split_targets, stacked

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PICKLED = "adapter_model.bin"
#: Entries of a config that are read here, and those that say nothing about what the checkpoint computes.
KNOWN = {
    "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "modules_to_save", "init_lora_weights",
    "task_type", "base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config", "qalora_group_size",
    "ensure_weight_tying", "target_parameters",
}  # fmt: skip
#: Entries that change what the checkpoint computes, for people; any other that is set is refused by its name alone.
UNSUPPORTED = {
    "use_dora": "DoRA",
    "bias": "trained biases",
    "alora_invocation_tokens": "activated LoRA",
    "rank_pattern": "per-layer ranks",
    "alpha_pattern": "per-layer alphas",
    "lora_bias": "a bias in lora_B",
    "layer_replication": "replicated layers",
    "trainable_token_indices": "trained tokens",
}


@dataclass(frozen=True)
class Saved:
    """What a folder holds."""

    method: Method
    facts: dict[str, dict[str, Any]]  # by layer, what it was made on as far as that is saved
    tensors: dict[str, Tensor]
    trained: dict[str, bool]  # tensor beside the adapters -> whether it is trained
    state: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0  # consolidated tasks


def tensors_of(name: str, layer: AdaptedLinear) -> dict[str, Tensor]:
    """lora_A (R, K) and lora_B (N, R) on the CPU; of a stack of experts (E, R, K) and (E, N, R).

    The factors of consolidated tasks follow as further ranks, so that PEFT computes the sum on the original base model.
    """
    factors = [tuple(factor.detach() for factor in layer.adapter.factors()), *layer.folded]
    downs, ups = zip(*((down.cpu(), up.cpu()) for down, up in factors), strict=True)
    return dict(zip(keys(name).values(), (torch.cat(downs, dim=-2), torch.cat(ups, dim=-1)), strict=True))


def base_name(model: nn.Module) -> str | None:
    """What the model was loaded from, as transformers records it."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def config_of(model: nn.Module, layers: Mapping[str, AdaptedLinear], method: Method) -> dict[str, Any]:
    """The content of adapter_config.json."""
    first = next(iter(layers.values()))
    rank = first.adapter.factors()[0].shape[-2] * (1 + len(first.folded))
    exact = isinstance(first.adapter, LoRAAdapter) and not first.folded  # PEFT divides by the rank as the method does
    rslora = exact and bool(getattr(method, "rslora", False))
    alpha = getattr(method, "alpha", None) if exact else None
    if alpha is None:
        alpha = first.adapter.scale * rank
    modules, experts = split_targets(model, layers)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if type(model).__name__.endswith("ForCausalLM") else None,
        "base_model_name_or_path": base_name(model),
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": first.adapter.dropout,
        "use_rslora": rslora,
        "fan_in_fan_out": any(layer.transposed for layer in modules.values()),
        "bias": "none",
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": _target_modules(model, modules),
        **experts,
    }


def _target_modules(model: nn.Module, layers: Mapping[str, AdaptedLinear]) -> list[str]:
    """The last parts of the names where they select the same layers, else the full names."""
    last = {name.rpartition(".")[2] for name in layers}
    selected = {name for name in bare_modules(model) if name.rpartition(".")[2] in last}
    return sorted(last) if selected == set(layers) else sorted(layers)


def read(model: nn.Module, folder: Path) -> Saved:
    """What PEFT wrote there, for this model.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is damaged, or the checkpoint has what forgetless does not load.
    """
    path = folder / CONFIG
    config = read_json(newest(folder, CONFIG))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}, wants 'LORA'")
    for key, value in config.items():
        if value and value != "none" and key not in KNOWN:
            title = UNSUPPORTED.get(key, "an entry that is not known")
            raise ValueError(f"{path}: the checkpoint has {title} ({key}={value!r}), which forgetless does not load")
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise ValueError(
            f"{path}: init_lora_weights is {start!r}, which changes the base weights as well; "
            "convert the checkpoint to plain LoRA with PEFT first"
        )
    if not newest(folder, WEIGHTS).exists() and (folder / PICKLED).exists():
        raise ValueError(
            f"{folder / PICKLED}: a pickle, which can run code, is not read; "
            "PEFT's save_pretrained(folder, safe_serialization=True) writes safetensors"
        )
    tensors = read_tensors(newest(folder, WEIGHTS))
    beside = [
        key.removeprefix(PREFIX)
        for key in tensors
        if ".lora_" not in key and _within(key.removeprefix(PREFIX), config.get("modules_to_save") or ())
    ]
    saved = {PREFIX + key for key in beside}
    wrappers = list(dict.fromkeys(_layer_of(key, folder) for key in tensors if key not in saved))
    names = named(model, wrappers, config.get("target_parameters") or (), folder)
    if not wrappers:
        raise ValueError(f"{folder / WEIGHTS}: holds no tensors")
    sizes: dict[str, Any] = {"rank": config.get("r"), "alpha": config.get("lora_alpha")}
    method = LoRA(**sizes, dropout=config.get("lora_dropout") or 0.0, rslora=bool(config.get("use_rslora")))
    if method.rank > max(max(t.shape, default=0) for t in tensors.values()):  # else that much memory is asked for
        raise ValueError(f"{path}: the rank is {method.rank}, but no tensor in {WEIGHTS} is as wide")
    facts: dict[str, dict[str, Any]] = {name: {} for name in names}
    return Saved(method, facts, stacked(model, names, tensors, folder), dict.fromkeys(beside, True))


def _within(key: str, modules: Iterable[str]) -> bool:
    """Whether a tensor of that name is one of a module that ends like one of ``modules``, as PEFT has it."""
    parts = key.split(".")
    owners = [".".join(parts[:end]) for end in range(1, len(parts))]
    return any(owner.endswith(name) for owner in owners for name in modules)


def _layer_of(key: str, folder: Path) -> str:
    for suffix in (".lora_A.weight", ".lora_B.weight"):
        if key.endswith(suffix):
            return key.removeprefix(PREFIX).removesuffix(suffix)
    if ".lora_" in key:
        raise ValueError(f"{folder / WEIGHTS}: {key} is not a LoRA factor of a linear layer")
    raise ValueError(
        f"{folder / WEIGHTS}: {key} is a weight of the base model and not of modules_to_save; PEFT writes those of "
        "embeddings unless save_pretrained is given save_embedding_layers=False"
    )


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """A safetensors file of these tensors.

    Raises:
        ValueError: one has no numbers.
    """
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise ValueError(f"{key} is on the meta device, offloaded or never filled: there is nothing to save")
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    return serialise(plain, metadata={"format": "pt"})


def read_tensors(path: Path, sha256: str | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        path: the file.
        sha256: hexadecimal digest that the file must have, if one is known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the digest differs, or it is no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    actual = sha256 if sha256 is None else sha256_of(path)
    if actual != sha256:
        raise ValueError(f"{path}: damaged, or of another save than forgetless.json: SHA-256 {actual}, wants {sha256}")
    try:
        return load_file(path)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path}: not a readable safetensors file: {error}") from None
