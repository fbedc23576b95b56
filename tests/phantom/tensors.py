"""Tensors of a phantom card: meta tensors that say they are on ``cuda:0``, and what an operation on them would cost."""

from __future__ import annotations

import contextlib
import copy
import operator
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .trace import Trace, place

aten = torch.ops.aten
COMPARISONS = {getattr(aten, name): getattr(operator, name) for name in ("gt", "lt", "ge", "le", "eq", "ne")}
KEEPING = (aten.all, aten.any)
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_is_meta, _device = torch._C.TensorBase.is_meta, torch._C.TensorBase.device
#: What torch does of a CUDA device before any operation of its own.
_plain = {
    name: getattr(Tensor, name) for name in ("to", "tolist", "data_ptr", "__getitem__", "__setitem__", "__deepcopy__")
}
_made = {"tensor": torch.tensor, "as_tensor": torch.as_tensor}


def on_card(t: Any) -> bool:
    return isinstance(t, Tensor) and _is_meta.__get__(t)


class Disguise:
    """Meta tensors say that they are CUDA's, but to torch's own meta functions."""

    def __init__(self, trace: Trace):
        self.trace, self.off = trace, False
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Disguise:
        looks = {
            "device": property(lambda t: CUDA if self.hides(t) else _device.__get__(t)),
            "is_cuda": property(self.hides),
            "is_meta": property(lambda t: on_card(t) and not self.hides(t)),
            "get_device": lambda t: 0 if self.hides(t) else -1,
            "data_ptr": address, "to": to, "cuda": lambda t, *_, **__: t.to(CUDA), "tolist": tolist,
            "__getitem__": self.indexing("__getitem__"), "__setitem__": self.indexing("__setitem__"),
            "__deepcopy__": deep_copy,
        }  # fmt: skip
        for name, look in looks.items():
            self.stack.enter_context(mock.patch.object(Tensor, name, look))
        for name in _made:
            self.stack.enter_context(mock.patch.object(torch, name, maker(name)))
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.close()

    def hides(self, t: Tensor) -> bool:
        return not self.off and on_card(t)

    def indexing(self, name: str) -> Any:
        def indexed(t: Tensor, index: Any, *value: Any) -> Any:
            parts = index if isinstance(index, tuple) else (index,)
            if self.hides(t) and any(isinstance(part, (list, range)) for part in parts):
                self.trace.copies.append(f"a list as an index at {place()}")
            return _plain[name](t, index, *value)

        return indexed

    @contextlib.contextmanager
    def dropped(self) -> Iterator[None]:
        """Within the block, meta tensors are meta tensors."""
        before, self.off = self.off, True
        try:
            yield
        finally:
            self.off = before


def address(t: Tensor) -> int:
    """As torch's allocator would give it: aligned, but for the offset."""
    return (1 << 20) + t.storage_offset() * t.element_size() if on_card(t) else _plain["data_ptr"](t)


def numbered(device: Any) -> Any:
    """``cuda`` as ``cuda:0``"""
    return CUDA if isinstance(device, (str, torch.device)) and str(device) == "cuda" else device


def to(t: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if "device" in kwargs:
        kwargs["device"] = numbered(kwargs["device"])
    return _plain["to"](t, *map(numbered, args), **kwargs)


def tolist(t: Tensor) -> Any:
    return _plain["tolist"](t.cpu() if on_card(t) else t)


def maker(name: str) -> Any:
    """torch.tensor, torch.as_tensor: data of Python's, made on the host and copied."""

    def make(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        if device is None or torch.device(device).type != "cuda":
            return _made[name](data, device=device, **options)
        return _made[name](data, **options).to(CUDA)

    return make


def deep_copy(t: Tensor, memo: dict[int, Any]) -> Tensor:
    """torch copies the storage, which a meta tensor has not."""
    if not on_card(t) or id(t) in memo:
        return _plain["__deepcopy__"](t, memo)
    with torch.no_grad():
        twin = t.clone()
    if isinstance(t, torch.nn.Parameter):
        twin = torch.nn.Parameter(twin, t.requires_grad)
        twin.__dict__.update(copy.deepcopy(t.__dict__, memo))
    else:
        twin.requires_grad_(t.requires_grad)
    memo[id(t)] = twin
    return twin


class Operations(TorchDispatchMode):
    """Every operation of torch's: on the card it computes shapes alone."""

    def __init__(self, trace: Trace, disguise: Disguise):
        super().__init__()
        self.trace, self.disguise = trace, disguise

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        to = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if to == "cuda":
            kwargs["device"] = torch.device("meta")
            if getattr(kwargs.get("generator"), "device", CUDA).type != "cuda":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        here = [t for t in tensors if on_card(t)]
        if not here and to != "cuda":
            return function(*args, **kwargs)
        if here and (read := self.read(function, args, kwargs, to)) is not None:
            return read
        if len(here) < len(tensors):
            self.moved(function, tensors)
            args, kwargs = tree_map(lambda t: t.to("meta") if isinstance(t, Tensor) else t, (args, kwargs))
        if function in INDEXING:
            args = self.unmasked(*args)
        with self.disguise.dropped():
            result = function(*args, **kwargs)
        packet = function.overloadpacket
        if packet in COMPARISONS:
            result.outcome = COMPARISONS[packet](1, 1 if isinstance(args[1], Tensor) else args[1])
        elif packet is aten.isnan or packet in KEEPING and hasattr(args[0], "outcome"):
            result.outcome = getattr(args[0], "outcome", False)
        return result

    def read(self, function: Any, args: Any, kwargs: Any, to: str | None) -> Any:
        """What the host reads of the card, after a wait: ones; None if it reads nothing."""
        if function is aten._local_scalar_dense.default:
            self.wait("a number is read")
            if args[0].dtype == torch.bool:
                return getattr(args[0], "outcome", True)
            return torch.ones((), dtype=args[0].dtype).item()
        if function is aten.equal.default:
            self.wait("equal")
            return True
        if to == "cpu":
            self.wait("copied to the host")
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if function is aten.copy_.default and not on_card(args[0]):
            self.wait("copied to the host")
            return args[0].fill_(1)
        if function is aten.nonzero.default:
            self.wait("nonzero")
            return torch.empty(args[0].numel(), args[0].dim(), dtype=torch.int64, device="meta")
        return None

    def unmasked(self, t: Tensor, indices: Any, *value: Any) -> Any:
        """An index with its masks as the indices of all they have: how many are true, the host has to ask."""
        result: list[Any] = []
        for index in indices:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.wait("a mask as an index")
                result += [torch.empty(index.numel(), dtype=torch.int64, device="meta")] * index.dim()
            else:
                result.append(index)
        return t, result, *value

    def wait(self, what: str) -> None:
        self.trace.waits.append(f"{what} at {place()}")

    def moved(self, function: Any, tensors: list[Tensor]) -> None:
        """An operation of tensors here and there: a copy to the card, an argument by value, or an error."""
        if function in (aten._to_copy.default, aten.copy_.default, *INDEXING):
            self.trace.copies.append(f"{function} at {place()}")
        elif any(t.dim() for t in tensors if not on_card(t)):
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! "
                f"({function})"
            )
