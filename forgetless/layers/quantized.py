"""Frozen layers that pack their weight: what each kind is called, and how to read its numbers once.

Such a layer makes x @ W.T by its own forward; the low-rank product is added onto it. Its weight
is unpacked only where numbers are asked for: CURLoRA's columns and rows when the layer is adapted, its checkpoint's
hash, and ``fl.merge(model, dequantise=True)``; one layer at a time, never in a training step.

Kinds are known by the name of the class of the layer, or of the tensor that an nn.Linear holds, so nothing is imported.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter import whole
from ..offload import execution_device, onloaded


@dataclass(frozen=True)
class Kind:
    """One way to pack a weight.

    Attributes:
        title: for people.
        unpack: layer -> its weight (out_features, in_features), a tensor of its own in a floating-point dtype.
        dtype: layer -> the dtype it was packed from and computes in; None: it has that of its input.
        wants: layer -> what must be done before it can be adapted, None if nothing.
        fresh: its forward returns memory of its own, which nothing else holds: the update is added in place.
        mark: layer -> what stands for the weight in a hash, where packing it once more changes what ``unpack`` gives.
    """

    title: str
    unpack: Callable[[Any], Tensor]
    dtype: Callable[[Any], torch.dtype | None] = lambda base: None
    wants: Callable[[Any], str | None] = lambda base: None
    mark: Callable[[Any], Tensor] | None = None
    fresh: bool = False


def register(
    cls: type[nn.Module],
    unpack: Callable[[Any], Tensor],
    dtype: Callable[[Any], torch.dtype | None] = lambda base: None,
) -> None:
    """Have ``fl.adapt`` take a layer class of your own that packs its weight.

    Its instances have ``in_features``, ``out_features`` and ``bias`` (or None), and a forward (..., in_features) ->
    (..., out_features) that autograd can differentiate in its input and that does not write to it.

    Args:
        cls: the class; subclasses are not meant.
        unpack: layer -> its weight (out_features, in_features), floating point.
        dtype: layer -> the dtype that ``fl.merge(model, dequantise=True)`` makes of it, and penalties keep their bases
            in; None: the model's there, float32 here.

    Raises:
        ValueError: ``cls`` is not a class of modules, or one that is known already.
    """
    if not (isinstance(cls, type) and issubclass(cls, nn.Module)):
        raise ValueError(f"cls is {cls!r}, wants a subclass of nn.Module")
    name = _full_name(cls)
    if cls is nn.Linear or name in KINDS:
        raise ValueError(f"cls is {name}, which is known already")
    KINDS[name] = Kind(cls.__name__, unpack, dtype)


def kind_of(module: nn.Module) -> Kind | None:
    """How the layer packs its weight; None if it does not, or in a way that is not known."""
    cls = type(module)
    if cls is nn.Linear:
        weight = module._parameters.get("weight")
        if weight is None or not type(weight).__module__.startswith("torchao."):
            return None
        return _NF4 if hasattr(weight, "get_original_weight") else _TORCHAO if hasattr(weight, "dequantize") else None
    return KINDS.get(_full_name(cls))


def weight_mark(base: Any) -> Tensor:
    """What is hashed to know a weight again: the weight itself, all of it, or unpacked. Collective where it is cut."""
    kind = kind_of(base)
    with onloaded(base):
        return whole(base.weight) if kind is None else (kind.mark or kind.unpack)(base)


def stand_in(base: Any, dtype: torch.dtype | None) -> Tensor:
    """NaN in the shape of the weight, where its layer executes, in no memory: who reads it learns that it must not."""
    shape: Any = base.weight.shape if kind_of(base) is None else (base.out_features, base.in_features)
    device = execution_device(base) or next(t.device for t in (*base.parameters(), *base.buffers()))
    return torch.full((1, 1), torch.nan, dtype=dtype or torch.float32, device=device).expand(shape)


@torch.no_grad()
def unpacked(base: Any, dtype: torch.dtype, delta: Tensor | None = None) -> nn.Linear:
    """The layer as an nn.Linear in its own dtype or in this, with ``delta`` added in delta's dtype and rounded once."""
    kind: Any = kind_of(base)
    weight, bias = kind.unpack(base), base.bias
    N, K = weight.shape
    made = nn.Linear(K, N, bias is not None, weight.device, kind.dtype(base) or dtype)
    made.weight.copy_(weight if delta is None else weight.to(delta.dtype) + delta)
    if bias is not None:
        made.bias.copy_(bias)
    return made.requires_grad_(False).train(base.training)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


# ---------------------------------------------------------------------------------------- the kinds


def _unpack_4bit(base: Any, rounded: bool = False) -> Tensor:
    """``rounded``: the scales to bfloat16, as evaluation on a CPU with AVX512 does when it packs the weight anew."""
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    packed, state = base.weight.data, copy.copy(base.weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax  # (blocks of a row, rows); bitsandbytes 0.50.2 itself forgets to turn it back
        state.original_nested = False
        packed, state = bnb._convert_weight_packed_for_cpu_inverse(packed, state)
        state.absmax = scales.T.reshape(-1).float()
    elif state.nested:
        state.absmax = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
        state.nested = False
    if rounded:
        state.absmax = state.absmax.bfloat16().float()
    return bnb.dequantize_4bit(packed, state)


def _dtype_4bit(base: Any) -> torch.dtype:
    state = base.weight.quant_state
    return state.original_dtype if getattr(state, "packing_format_for_cpu", False) else state.dtype


def _wants_4bit(base: Any) -> str | None:
    return None if getattr(base.weight, "quant_state", None) is not None else _NOT_YET


def _unpack_8bit(base: Any) -> Tensor:
    current = base.weight if base.state.CB is None else base.state
    bnb: Any = importlib.import_module("bitsandbytes.functional")
    return bnb.int8_vectorwise_dequant(current.CB, current.SCB)


def _wants_8bit(base: Any) -> str | None:
    if base.state.has_fp16_weights:
        return "has_fp16_weights=True keeps it unpacked and trains it: make it with has_fp16_weights=False"
    return None if base.state.CB is not None or getattr(base.weight, "CB", None) is not None else _NOT_YET


def _unpack_gguf(base: Any) -> Tensor:
    kernels: Any = importlib.import_module("transformers.integrations.gguf.kernels")
    N, K = base.out_features, base.in_features
    dense = kernels.dequantize_blocks(base.weight, base.ggml_type, N, K, torch.float32)
    if base.input_permutation is not None:  # the layer multiplies x[:, permutation]
        dense = torch.empty_like(dense).index_copy_(1, base.input_permutation, dense)
    return dense


_NOT_YET = "it is not quantised yet: model.to(device) does that"

_4BIT = Kind(
    "bitsandbytes 4-bit",
    _unpack_4bit,
    _dtype_4bit,
    _wants_4bit,
    functools.partial(_unpack_4bit, rounded=True),
    fresh=True,
)
_8BIT = Kind("bitsandbytes int8", _unpack_8bit, wants=_wants_8bit, fresh=True)
_TORCHAO = Kind("torchao", lambda base: base.weight.detach().dequantize(), lambda base: base.weight.dtype)
_NF4 = Kind("torchao NF4", lambda base: base.weight.detach().get_original_weight(), lambda base: base.weight.dtype)

#: By the full name of the layer's class.
KINDS: dict[str, Kind] = {
    **{f"bitsandbytes.nn.modules.Linear{name}": _4BIT for name in ("4bit", "NF4", "FP4")},
    "bitsandbytes.nn.modules.Linear8bitLt": _8BIT,
    "transformers.integrations.gguf.utils.GgufLinear": Kind("GGUF", _unpack_gguf, fresh=True),
}
