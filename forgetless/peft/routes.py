"""Which way one call of a PEFT LoRA layer goes, and why: our op, or PEFT's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import compat
from ..layers.frozen import hooked, is_conv1d, is_plain
from ..layers.stack import Stack, keys_of
from ..names import bare_name, checked
from ..ops.check import FLOATS, dtype_name

#: PEFT's layers whose forward is base_layer(x) + sum of lora_B(lora_A(dropout(x))) * scaling.
LAYERS = (
    "peft.tuners.lora.layer.Linear",
    "peft.tuners.lora.bnb.Linear4bit",
    "peft.tuners.lora.bnb.Linear8bitLt",
    "peft.tuners.lora.torchao.TorchaoLoraLinear",
)


def stack_of(layer: Any) -> Stack | None:
    """What a ParamWrapper adapts, if it is a stack of experts that can run our way."""
    key = getattr(layer, "parameter_name", None)
    experts = layer.get_base_layer() if isinstance(key, str) else nn.Identity()
    return Stack(experts, key) if isinstance(key, str) and key in keys_of(experts) else None


def lora_layers(model: nn.Module, cls: type) -> Iterator[tuple[str, Any]]:
    """Name and layer of every PEFT LoRA layer, ``cls`` being PEFT's class of them."""
    return (
        (bare_name(model, name), module) for name, module in checked(model).named_modules() if isinstance(module, cls)
    )


def taker_of(module: nn.Module) -> Any:
    """What ``swap_in`` keeps beside a layer that it has taken over; None for any other module."""
    return module.__dict__.get("_forgetless")


def kind_reason(layer: Any) -> str | None:
    """Why PEFT's own forward runs a layer of this class; None if our op may."""
    cls = getattr(type(layer), "_forgetless_base", type(layer))
    if cls.__name__ == "ParamWrapper":
        told = f"it adapts {layer.parameter_name} of a {type(layer.get_base_layer()).__name__}, no stack of experts"
        return None if stack_of(layer) is not None else told
    if f"{cls.__module__}.{cls.__qualname__}" in LAYERS:
        return None
    return f"{cls.__name__} is none of {', '.join(name.rpartition('.')[2] for name in LAYERS)}"


def adapter_reason(layer: Any, key: str, meta: bool = False) -> str | None:
    """Why PEFT's own forward must run this adapter; None if our op gives the same.

    ``meta``: as soon as factors on the meta device have been loaded.
    """
    variant = getattr(layer, "lora_variant", {}).get(key)
    if variant is not None:
        return f"adapter {key!r} is a {type(variant).__name__.removesuffix('LinearVariant')} adapter"
    if getattr(layer, "use_dora", {}).get(key):
        return f"adapter {key!r} is a Dora adapter"
    A, B, drop = layer.lora_A._modules[key], layer.lora_B._modules[key], layer.lora_dropout._modules[key]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        return f"lora_A and lora_B of {key!r} are {type(A).__name__} and {type(B).__name__}, not nn.Linear"
    if hooked(A) or hooked(B) or hooked(drop):
        return f"lora_A, lora_B or lora_dropout of {key!r} have hooks"
    if type(drop) is nn.Dropout:
        if drop.inplace or drop.p >= 1.0:
            return f"dropout of {key!r} is in place, or drops everything"
    elif type(drop) is not nn.Identity:
        return f"dropout of {key!r} is a {type(drop).__name__}"
    if A._parameters["bias"] is not None:
        return f"lora_A of {key!r} has a bias"
    if not all(_plain(module._parameters["weight"], meta) for module in (A, B)):
        dtypes = ", ".join(sorted(map(dtype_name, FLOATS)))
        return f"the factors of {key!r} are not plain tensors of one of the dtypes {dtypes}"
    return None


def base_reason(base: Any) -> str | None:
    """Why the frozen layer's own forward must make x @ W.T; None if the op can read its weight."""
    if not is_plain(base):
        return f"{type(base).__name__} makes x W^T itself"
    if not _plain(base.weight):
        return f"the weight is a {type(base.weight).__name__} and its layer makes x W^T itself"
    return "the frozen layer has hooks and runs itself" if hooked(base) else None


def state_reason(layer: Any) -> str | None:
    """Why no adapter runs at all."""
    if layer.disable_adapters:
        return "adapters are disabled: the frozen layer alone"
    if layer.merged:
        return f"merged into the weight: {', '.join(layer.merged_adapters)}"
    return None


def onto_base(layer: Any, keys: list[str], x: Any) -> bool | None:
    """Whether the frozen layer runs itself and these adapters are added onto it; None: all of it is PEFT's forward."""
    if layer._disable_adapters or layer.merged_adapters or not keys or not _surroundings_allow(x):
        return None
    for key in keys:
        if adapter_reason(layer, key) is not None:
            return None
        down, up = layer.lora_A._modules[key].weight, layer.lora_B._modules[key].weight
        if not x.device == down.device == up.device or x.shape[-1] != down.shape[1]:
            return None
        if down.dtype == torch.float64 != x.dtype:
            return None  # PEFT computes in float64 then
    base = layer.base_layer
    onto = base_reason(base) is not None
    if (onto or len(keys) > 1) and torch.compiler.is_compiling():
        return None  # the compiler fuses PEFT's formula
    if onto:
        return True
    weight, bias = base.weight, base.bias
    if weight.device != x.device or weight.shape[0 if is_conv1d(base) else 1] != x.shape[-1]:
        return None
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
    return False if alike or autocast else None


def runs_experts(layer: Any, keys: list[str], x: Any) -> bool:
    """Whether a stack of experts takes these adapters by our op; else PEFT adds them to the stack, or runs none."""
    return (
        len(keys) == 1
        and not layer._disable_adapters
        and not layer.merged_adapters
        and adapter_reason(layer, keys[0]) is None
        and layer.lora_B._modules[keys[0]]._parameters["bias"] is None
        and _surroundings_allow(x)
    )


def _plain(t: Tensor | None, meta: bool = False) -> bool:
    """A tensor of no subclass (DTensor, fake, functorch) in memory, with a dtype that the op takes."""
    return t is not None and type(t) in (Tensor, nn.Parameter) and t.dtype in FLOATS and (meta or not t.is_meta)


def _surroundings_allow(x: Any) -> bool:
    """Whether a call with this x, here and now, is one for our op: no transform, no tracer, no global hook."""
    if not _plain(x) or x.dim() == 0 or compat.transforms_active():
        return False
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return not (compat.forward_mode_active() or torch.jit.is_tracing() or compat.has_global_hooks())
