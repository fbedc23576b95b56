"""What the penalties of a step of Llama-3-8B take: operations, FLOPs and bytes, and a time PREDICTED from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from forgetless.adapter import Site
from forgetless.methods import LoRA
from forgetless.ops.rows import Products
from forgetless.penalties import NullSpace, OutputDeviation, SourceDeviation, WeightDeviation, nullspace
from forgetless.penalties.base import Item
from forgetless_kernels import tiles
from forgetless_kernels.rows import GRAM_GROUP

from .harness import Results, Row, begin, finish, row
from .static import Bytes, Sizes, cdiv, designs, seconds


def gram_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of what project does to add up h.T @ h"""
    blocks = cdiv(s.M, tile.BLOCK_M)
    groups = cdiv(blocks, GRAM_GROUP.value)
    part = 4 * (blocks + groups) * s.R * s.R
    tickets = 4 * (blocks + groups)  # an atomic operation loads and stores; counters are set back
    stores = {"part": part, "tickets": tickets + 4 * (1 + groups), "z": 4 * s.R * s.R}
    return {"part": part, "tickets": tickets}, stores


# ------------------------------------------------------------------- a step of a model, predicted

LAYERS = 32
#: Llama-3-8B: (in_features, out_features) of the linear layers of one block
SHAPES = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
TOKENS, RANK = 8192, 16
ARCH = 90


class Counted(TorchDispatchMode):
    """Operations that are no views, and the bytes that they read and write"""

    operations = moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace == "aten" and "detach" not in str(function):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.operations += 1
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


def items_of(penalty: Any) -> list[Item]:
    """The penalty on every layer of the model, on tensors without storage"""
    items = []
    with mock.patch.object(nullspace, "haar", lambda dim, k, *_: torch.empty(dim, k)):
        for index in range(LAYERS):
            for number, (K, N) in enumerate(SHAPES):
                weight = torch.empty(N, K, dtype=torch.bfloat16, device="meta")
                adapter = LoRA(RANK).build(Site(f"{index}.{number}", weight))
                state: Any = penalty.attach(adapter, Site(f"{index}.{number}", weight))
                h = torch.empty(TOKENS, RANK, dtype=torch.bfloat16, device="meta", requires_grad=True)
                state._known_calibrated = True
                items.append(Item(state, adapter, h if state.needs_hidden else None))
    return items


#: Of the penalties of all layers in a step: operations of torch, FLOPs, bytes over the memory bus.
Cost = dict[str, float]


def counted(total: Callable[[], torch.Tensor], inputs: Sequence[torch.Tensor]) -> Cost:
    """The cost of a value and of its backward pass, as torch computes them; the gradient of the value is the loss's"""
    seed = torch.ones((), device="meta")
    with FlopCounterMode(display=False) as flops, Counted() as count:
        torch.autograd.grad(total(), inputs, seed, allow_unused=True)
    return {"moved": count.moved, "operations": count.operations, "FLOPs": flops.get_total_flops()}


def grouped(items: list[Item]) -> Cost:
    """``fl.penalty`` for all layers at once"""
    inputs = [t for item in items for t in (*item.adapter.factors(), *([] if item.hidden is None else [item.hidden]))]
    return counted(lambda: type(items[0].state).total(items), inputs)


def made(items: list[Item]) -> Cost:
    """What the passes make, and ``fl.penalty`` of it"""
    zs, moved, work = [], 0.0, 0.0
    for item in items:
        factors = dict(zip(("down", "up"), item.adapter.factors(), strict=True))
        lengths = [rows.length(RANK) for rows in item.state.rows()]
        zs.append(Products([item.state.rows()], torch.empty(sum(lengths), RANK, device="meta", requires_grad=True)))
        for rows, k in zip(item.state.rows(), lengths, strict=True):
            if rows.of == "hidden":
                _, stores = gram_traffic(Sizes(TOKENS, 0, 0, RANK), tiles.row("project", ARCH, 2))
                moved += sum(stores.values())
                work += 2 * 2 * TOKENS * RANK**2
                continue
            dim = max(factors[rows.of].shape)
            V = sum(t.numel() * t.element_size() for t in rows[1:] if t is not None)
            size = dim * RANK * 4
            # forward V, the factor, z; backward V, the factor where it is V, dz, the strip's partial sum
            moved += 2 * V + size + (size if rows.own else 0) + 2 * 4 * k * RANK + size
            work += 2 * 2 * k * dim * RANK
    cost = counted(lambda: type(items[0].state).total_made(items, zs), [z for _, z in zs])
    return {**cost, "moved": moved + cost["moved"], "FLOPs": work + cost["FLOPs"]}


def lora_seconds() -> float:
    """Predicted time of a step's linear layers with LoRA"""
    return LAYERS * sum(sum(designs(Sizes(TOKENS, N, K, RANK), ARCH)["forgetless split"]) for K, N in SHAPES)


PENALTIES = (
    NullSpace(k=256),
    NullSpace(k=256, basis="hadamard"),
    WeightDeviation(),
    OutputDeviation(),
    SourceDeviation(),
    SourceDeviation(covariance=32),
)


def rows() -> list[Row]:
    """What each penalty costs on both ways, and the predicted step that it is a part of"""
    made_rows = [row("LoRA", "forgetless split", "step", "predicted time", lora_seconds(), "s")]
    for penalty in PENALTIES:
        items = items_of(penalty)
        fields = [f"{f.name}={getattr(penalty, f.name)}" for f in dataclasses.fields(penalty)[1:3]]
        name = f"{type(penalty).__name__}({', '.join(fields)})"
        kept = sum(b.numel() * b.element_size() for item in items for b in item.state.buffers())
        for way, cost in (("grouped", grouped(items)), ("in the pass", made(items))):
            time = seconds(ARCH, cost["FLOPs"], cost["moved"])
            values = {"kept": kept, "moved": cost["moved"], "predicted time": time, **cost}
            units = {"kept": "B", "moved": "B", "predicted time": "s"}
            made_rows += [row(name, way, "penalty", metric, v, units.get(metric, "1")) for metric, v in values.items()]
    return made_rows


def main(arguments: list[str] | None = None) -> Results:
    options, _, results = begin(__doc__, "penalised", arguments, 1)
    results["rows"] = rows()
    return finish(results, options)
