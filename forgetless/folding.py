"""Folding adapters into the frozen weights."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from .coverage import warn_uncalled
from .layers.experts import AdaptedExperts
from .layers.linear import AdaptedLinear
from .layers.quantized import kind_of, unpacked
from .layers.wrapped import AdaptedPacked, AdaptedSharded
from .model import _replace, adapted_layers, adapters, remove
from .targets import refusal


def merge(model: nn.Module, dequantise: bool = False) -> nn.Module:
    """Fold every adapter into its frozen weight, in place; the layers are plain nn.Linear (or Conv1D) again.

    The sum is taken in float32 and rounded once to the weight's dtype, so an update much smaller than the weight's
    last bit is lost: merge into float32 weights where that matters.

    Args:
        model: an adapted model.
        dequantise: make a layer that packs its weight an nn.Linear in the dtype it was packed from, where that is
            known, else in the model's; that takes so much more memory. Layers without an adapter too, so that a
            model of transformers is no quantised one any more, and neither is its config.

    Raises:
        ValueError: no adapters; an adapter holds NaN or Inf; a weight is shared with another module (a tied
            embedding), which merging would change too; a weight is computed from others (weight norm, pruning); a
            weight is packed and ``dequantise`` is False. Nothing is changed then.
    """
    result = check_foldable(model, "merged", dequantise)
    warn_uncalled(result)
    inside = {id(p) for layer in result.values() for p in layer.parameters()}
    others = (p.dtype for p in model.parameters() if p.is_floating_point() and id(p) not in inside)
    dtype = next(others, torch.float32)
    for layer in result.values():
        if isinstance(layer, AdaptedPacked):
            _replace(model, layer, unpacked(layer.base, dtype, layer.delta()))
        else:
            layer.fold()
    if adapters(model):
        remove(model)
    if dequantise:
        _unpack_rest(model, dtype)
    return model


def _unpack_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Unpack the layers that had no adapter; where none is left that packs its weight, transformers is told."""
    for module in list(model.modules()):
        kind = kind_of(module)
        if kind is not None and kind.wants(module) is None:
            _replace(model, module, unpacked(module, dtype))
    left = sorted({type(module).__qualname__ for module in model.modules() if _packs(module)})
    for module in model.modules():
        quantizer = getattr(module, "hf_quantizer", None)
        if quantizer is None:
            continue
        if left:
            warnings.warn(f"the model's config still says quantised: it has {', '.join(left)}", stacklevel=3)
            return
        quantizer.remove_quantization_config(module)
        for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
            module.__dict__.pop(flag, None)


def _packs(module: nn.Module) -> bool:
    """Whether a layer packs its weight, in a way that is known or not."""
    weight = getattr(module, "weight", None)
    dense = isinstance(weight, Tensor) and weight.is_floating_point()
    return kind_of(module) is not None or (not dense and refusal(module) is not None)


def check_foldable(model: nn.Module, done: str, dequantise: bool = False) -> dict[str, AdaptedLinear]:
    """The adapted layers, if all updates can go into their weights; ValueError otherwise (``done``: for its text)."""
    result = adapted_layers(model)
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        for p in module.parameters(recurse=False):
            owners.setdefault(id(p), []).append((name, module))
    for name, layer in result.items():
        if isinstance(layer, AdaptedSharded) and done == "consolidated":
            raise ValueError(
                f"the weight of {name} is cut over processes: consolidate the model whole, before cutting it"
            )
        if layer.weight.is_meta:
            raise ValueError(
                f"the weight of {name} is offloaded, or has no numbers yet: nothing was {done}; "
                "load the base model without offloading, fl.load the adapter onto it, and go on from there"
            )
        if not all(torch.isfinite(p).all() for p in layer.adapter.parameters()):
            raise ValueError(f"the adapter of {name} holds NaN or Inf; nothing was {done}")
        if isinstance(layer, AdaptedPacked):
            if not dequantise:
                raise ValueError(
                    f"the weight of {name} is packed ({layer.kind.title}): nothing was {done}; fl.save the adapter and "
                    "fl.load it onto the base model in full precision, or fl.merge(model, dequantise=True)"
                )
            continue
        stack = isinstance(layer, AdaptedExperts)
        if not stack and layer.base._parameters.get("weight") is None:
            raise ValueError(
                f"the weight of {name} is computed from others (weight norm, pruning, a parametrisation): nothing was "
                f"{done}; make it a plain parameter first"
            )
        own = layer.base.experts if stack else layer.base
        others = [other for other, module in owners[id(layer.weight)] if module is not own]
        if others:
            raise ValueError(f"the weight of {name} is also that of {others[0]}; untie them first; nothing was {done}")
    return result
