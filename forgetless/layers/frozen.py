"""The frozen layer under an adapter: what it is, what it stores, and how it runs by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Site, whole
from ..offload import execution_device, onloaded
from ..ops.bodies import exact_products
from ..ops.check import FLOATS
from .quantized import kind_of, stand_in
from .stack import Stack
from .tensor_parallel import cut_of


def is_conv1d(module: nn.Module) -> bool:
    """transformers' Conv1D (GPT-2): weight (in_features, out_features). Told by its type, never by its shape."""
    cls = type(module)
    return cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers.")


def is_plain(module: nn.Module) -> bool:
    """nn.Linear or Conv1D themselves: y = x Wᵀ + b, of the weight that they store."""
    return type(module) is nn.Linear or is_conv1d(module)


@torch.no_grad()
def runs_as_linear(module: nn.Module) -> bool:
    """Whether a subclass of nn.Linear gives x Wᵀ + b for its weight, up to rounding, and stores nothing else.

    One with a forward of its own is asked, with three rows of a small, a usual and a large size.
    """
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    others = len(module._parameters) > 2 or module._buffers or module._modules
    if not isinstance(module, nn.Linear) or others or type(weight) is not nn.Parameter or weight.dtype not in FLOATS:
        return False
    if type(module).forward is nn.Linear.forward:
        return True
    if weight.is_meta:
        return False
    rows = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (rows * torch.tensor([[0.01], [1.0], [100.0]])).to(weight.device, weight.dtype)
    with exact_products(weight.device.type):
        expected = F.linear(x, weight, bias)
        try:
            y = module.forward(x)
        except Exception:  # it wants other arguments, or another shape
            return False
    if not isinstance(y, Tensor) or y.shape != expected.shape or y.dtype != expected.dtype:
        return False
    error, size = (y.double() - expected.double()).norm(dim=1), expected.double().norm(dim=1)
    return bool((error <= 4 * torch.finfo(weight.dtype).eps * size).all())


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def runs_by(base: Any) -> tuple[Callable[[Tensor], Tensor], bool]:
    """What computes a base that runs itself, and whether its result may be written in place.

    Then it is the forward alone, without the module's call: no hook of all modules may see that memory.
    """
    kind = kind_of(base)
    fresh = kind is not None and kind.fresh and not hooked(base)
    return (base.forward if fresh else base), fresh


def stored(base: Any) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer, out of its table: a module's attribute costs a microsecond."""
    table = base._parameters
    weight = table.get("weight")
    if weight is None:  # parametrised, or packed
        return base.weight, base.bias
    return weight, table["bias"] if "bias" in table else base.bias


def site_of(name: str, base: Any, values: bool = False) -> Site:
    """The layer as a method sees it; a weight that is packed, cut or offloaded is a stand-in but for its ``values``."""
    if isinstance(base, Stack):
        if values:
            with onloaded(base):
                return Site(name, base.matrices().detach())  # (E, N, K)
        whole_stack = stand_in(base, base.weight.dtype) if execution_device(base) is not None else base.weight.detach()
        return Site(name, whole_stack.mT if base.transposed else whole_stack)
    kind, transposed = kind_of(base), is_conv1d(base)
    if values:
        with onloaded(base):
            weight = whole(base.weight).detach() if kind is None else kind.unpack(base)
    elif kind is not None:
        weight = stand_in(base, kind.dtype(base))
    elif cut_of(base) is not None or execution_device(base) is not None:
        weight = stand_in(base, base.weight.dtype)
    else:
        weight = base.weight.detach()
    return Site(name, weight.T if transposed else weight, transposed)
