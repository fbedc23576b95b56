"""The weight of an adapted layer as other code sees it during a pass: what the layer applies, update and all.

Some parents do not call a linear layer but compute with its ``weight`` (Mamba's dt_proj, torch's fused encoder layer).
During a pass they are given this tensor. What is asked about it, such as its dtype, is the frozen weight's; only where
something is computed with it is the sum made. torch's own fused paths see a subclass and step aside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

_ASKED = (
    "dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta", "is_nested", "is_quantized",
    "is_sparse", "requires_grad", "is_leaf", "grad", "grad_fn", "data",
)  # fmt: skip
_METADATA: frozenset[Any] = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in _ASKED),
        Tensor.size, Tensor.dim, Tensor.numel, Tensor.nelement, Tensor.element_size, Tensor.stride, Tensor.__len__,
        Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.data_ptr,
    )
)  # fmt: skip


class SeenWeight(Tensor):
    """Shares the memory of the frozen weight of ``layer``."""

    layer: Any

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        writes = name in ("__set__", "__setitem__") or name.endswith("_") and not name.endswith("__")
        asks = func in _METADATA or writes

        def value(t: SeenWeight) -> Tensor:
            frozen: Tensor = t.layer.frozen if asks else t.layer.applied()
            return frozen

        return func(*_replaced(args, value), **_replaced(kwargs or {}, value))


def seen(layer: Any) -> Tensor:
    """The frozen weight of the layer, as this class."""
    weight: SeenWeight = layer.frozen.detach().as_subclass(SeenWeight)
    weight.layer = layer
    return weight


def _replaced(given: Any, value: Callable[[SeenWeight], Tensor]) -> Any:
    """``given`` with other values in the place of these tensors, in tuples, lists and dictionaries too."""
    if isinstance(given, SeenWeight):
        return value(given)
    if type(given) in (tuple, list):
        return type(given)(_replaced(item, value) for item in given)
    return {key: _replaced(item, value) for key, item in given.items()} if type(given) is dict else given
