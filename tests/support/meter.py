"""Counts what kernels load and store in Triton's interpreter."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np
import pytest
import torch

from forgetless_kernels import tl_utils


class Meter:
    """Loads and stores of every launch, by address; what the kernels' own memory is for"""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.traffic: list[tuple[int, str, int, int]] = []  # launch, kind, first address, bytes
        self.made: list[torch.Tensor] = []

    def note(self, kind: str, ptrs: Any, mask: Any) -> None:
        size = max(1, ptrs.dtype.element_ty.primitive_bitwidth // 8)
        mask = mask if isinstance(mask, np.ndarray) else mask.data  # an array where a descriptor was
        active = ptrs.data.ravel()[mask.ravel().astype(bool)]
        if len(active):
            self.traffic.append((len(self.launches) - 1, kind, int(active[0]), len(active) * size))

    def by_launch(self, tensors: dict[str, torch.Tensor]) -> list[tuple[dict[str, int], dict[str, int]]]:
        """(loads, stores) of each launch, by tensor; an address that belongs to none of them is an error"""
        ranges = [(name, t.data_ptr(), t.data_ptr() + t.untyped_storage().nbytes()) for name, t in tensors.items()]
        sums = [{"load": collections.Counter(), "store": collections.Counter()} for _ in self.launches]
        for launch, kind, address, size in self.traffic:
            owner = next(name for name, start, end in ranges if start <= address < end)
            sums[launch][kind][owner] += size
        return [(dict(each["load"]), dict(each["store"])) for each in sums]

    def total(self, operands: dict[str, torch.Tensor], names: list[str]) -> tuple[dict[str, int], dict[str, int]]:
        """(loads, stores) by tensor, of all launches; ``names`` are those of the memory made, in order"""
        loads: collections.Counter = collections.Counter()
        stores: collections.Counter = collections.Counter()
        for some_loads, some_stores in self.by_launch({**operands, **dict(zip(names, self.made, strict=True))}):
            loads.update(some_loads)
            stores.update(some_stores)
        return dict(loads), dict(stores)

    def streams(self, tensors: dict[str, torch.Tensor]) -> dict[str, int]:
        """How many launches read each of x, dy and W"""
        made = {f"made {i}": t for i, t in enumerate(self.made)}
        launches = self.by_launch({**tensors, **made})
        return dict(collections.Counter(name for loads, _ in launches for name in loads if name in ("x", "dy", "W")))


@pytest.fixture
def meter(monkeypatch):
    """Every load, store, descriptor access (they become masked ones) and atomic operation of the kernels"""
    from triton.runtime import interpreter

    meter, builder = Meter(), interpreter.InterpreterBuilder
    load, store, atomic = builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw
    call = interpreter.GridExecutor.__call__

    def masked_load(self, ptrs, mask, *rest, **options):
        meter.note("load", ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def masked_store(self, ptrs, value, mask, *rest, **options):
        meter.note("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest, **options)

    def atomic_rmw(self, operation, ptr, value, mask, *rest, **options):
        meter.note("load", ptr, mask)
        meter.note("store", ptr, mask)
        return atomic(self, operation, ptr, value, mask, *rest, **options)

    def launch(self, *args, **options):
        meter.launches.append(self.fn.__name__.strip("_").removesuffix("_kernel"))
        return call(self, *args, **options)

    def empty(shape, dtype, like):
        meter.made.append(torch.empty(shape, dtype=dtype))
        return meter.made[-1]

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    monkeypatch.setattr(builder, "create_atomic_rmw", atomic_rmw)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch)
    monkeypatch.setattr(tl_utils, "empty", empty)
    return meter
