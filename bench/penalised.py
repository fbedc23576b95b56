"""What penalties and cores add to a layer's kernels: bytes in closed form; of penalties a time PREDICTED from them."""

from __future__ import annotations

import dataclasses
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
from forgetless_kernels.rows import GRAM_GROUP, PRODUCT_COLUMNS, PRODUCT_ROWS, SUM_COLUMNS, SUM_ROWS
from forgetless_kernels.sums import strips_of
from forgetless_kernels.tl_utils import pad_rank

from .harness import Results, Row, begin, finish, parser, row
from .static import CARDS, Bytes, Rate, Sizes, cdiv, designs, outer_traffic, project_outer_traffic, project_traffic


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows V (k, dim) that a factor (R, dim) is multiplied with, and what they are stored in, in bytes"""

    k: int
    dim: int
    element: int = 2  # of V; 0: made from row numbers
    weight: int = 0  # of a column's factor; 0: none
    own: bool = False  # V is the factor


def product_traffic(rows: Rows, R: int, blocks_of: int, factor: int = 4, K: int | None = None) -> tuple[Bytes, Bytes]:
    """Loads and stores of the programs of project that make V @ factor.T, ``blocks_of`` ranks each

    Beside x of K columns: a V that is wider, and wider than PRODUCT_COLUMNS, is cut into parts.
    """
    blocks_r = cdiv(R, blocks_of)
    blocks, most = cdiv(rows.k, PRODUCT_ROWS.value) * blocks_r, PRODUCT_COLUMNS.value
    parts = cdiv(rows.dim, most) if K is not None and rows.dim > max(K, most) else 1
    loads = {"V": rows.k * rows.dim * rows.element * blocks_r, "weight": blocks * rows.dim * rows.weight}
    loads["factor"] = blocks * blocks_of * rows.dim * factor
    loads["columns"] = 0 if rows.element else 8 * rows.k * blocks_r * parts
    stores = {"z": 4 * rows.k * R}
    if parts > 1:
        loads["part"] = stores["part"] = 4 * blocks * parts * PRODUCT_ROWS.value * blocks_of
        loads["tickets"] = 4 * blocks * parts
        stores["tickets"] = loads["tickets"] + 4 * blocks
    return {name: size for name, size in loads.items() if size}, stores


def gram_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of what project does to add up h.T @ h"""
    blocks = cdiv(s.M, tile.BLOCK_M)
    groups = cdiv(blocks, GRAM_GROUP.value)
    part = 4 * (blocks + groups) * s.R * s.R
    tickets = 4 * (blocks + groups)  # an atomic operation loads and stores; counters are set back
    stores = {"part": part, "tickets": tickets + 4 * (1 + groups), "z": 4 * s.R * s.R}
    return {"part": part, "tickets": tickets}, stores


def core_traffic(s: Sizes, tile: tiles.Tile, ranks: list[int]) -> tuple[Bytes, Bytes]:
    """Loads and stores of project_core: layers of these ranks with float32 cores, the factors in ``s.factor`` bytes"""
    s = dataclasses.replace(s, R=sum(ranks))
    loads, stores = project_traffic(s, tile)
    loads["core"] = cdiv(s.M, tile.BLOCK_M) * 4 * sum(R * R for R in ranks)
    return loads, {**stores, "t": stores["h"]}


def core_outer_traffic(s: Sizes, tile: tiles.Tile, frozen: bool) -> tuple[Bytes, Bytes]:
    """Loads and stores of project_core_outer, of dy (M, K) and up (K, R); q is not stored, dcore not if ``frozen``"""
    loads, stores = core_traffic(s, tile, [s.R])
    del stores["h"]
    if not frozen:
        add(loads, {"h": s.M * s.R * s.element})
        more, made = gram_traffic(s, tile)
        add(loads, more)
        add(stores, made)
    return loads, stores


def strip_traffic(rows: Rows, R: int, tile: tiles.Tile, blocks_r: int) -> Bytes:
    """Loads of the strip that adds d.T @ V to a sum of ``blocks_r`` blocks of ranks"""
    steps = cdiv(rows.k, SUM_ROWS.value)
    most = SUM_COLUMNS.value // (1 if R <= 32 else 2)
    columns = cdiv(rows.dim, tile.BLOCK_K) * max(1, tile.BLOCK_K // most)
    loads = {"V": rows.k * rows.dim * rows.element * blocks_r, "weight": steps * rows.dim * rows.weight * blocks_r}
    loads["d"] = (2 if rows.own else 1) * 4 * rows.k * R * columns
    loads["columns"] = 0 if rows.element else 8 * rows.k * columns * blocks_r
    return {name: size for name, size in loads.items() if size}


def outer_more_traffic(s: Sizes, tile: tiles.Tile, more: list[Rows]) -> tuple[Bytes, Bytes]:
    """Loads and stores of outer with these strips more"""
    loads, stores = outer_traffic(s, tile)
    blocks_r = cdiv(s.R, pad_rank(s.R))
    columns = cdiv(s.K, tile.BLOCK_K)
    programs = columns * blocks_r
    strips = strips_of(s.M, tile.BLOCK_M, programs, 256 - len(more) * programs)[0] + len(more)
    loads["part"] = stores["part"] = 4 * strips * s.R * s.K
    loads["tickets"] = 4 * programs * strips
    stores["tickets"] = loads["tickets"] + 4 * programs
    for rows in more:
        add(loads, strip_traffic(rows, s.R, tile, blocks_r))
    return loads, stores


def sweep_more_traffic(s: Sizes, tile: tiles.Tile, more: list[Rows], start: bool) -> tuple[Bytes, Bytes]:
    """Loads and stores of project_outer with these strips more, and h @ (d + d.T) in g"""
    loads, stores = project_outer_traffic(s, tile)
    columns = cdiv(s.K, tile.BLOCK_K)
    own, steps = strips_of(s.M, tile.BLOCK_M, columns, 128 - len(more) * columns)
    strips = own + len(more)
    loads["down"] = strips * s.K * pad_rank(s.R, most=64) * s.factor
    loads["out_part"] = stores["out_part"] = 4 * strips * s.K * s.R
    loads["tickets"] = 4 * columns * (strips + own)
    stores["tickets"] = loads["tickets"] + 4 * (columns + own)
    for rows in more:
        add(loads, strip_traffic(rows, s.R, tile, 1))
    if start:
        add(loads, {"start": own * steps * 2 * 4 * s.R * s.R, "h": s.M * s.R * s.element})
    return loads, stores


def add(total: Bytes, more: Bytes) -> None:
    for name, size in more.items():
        total[name] = total.get(name, 0) + size


# ------------------------------------------------------------------- a step of a model, predicted

LAYERS = 32
#: Llama-3-8B: (in_features, out_features) of the linear layers of one block
SHAPES = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096))
TOKENS, RANK = 8192, 16
ARCH = 90


class Counted(TorchDispatchMode):
    """Operations that are no views, and the bytes that they read and write"""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.moved = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function.namespace == "aten" and "detach" not in str(function):
            tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
            self.operations += 1
            self.moved += sum(t.numel() * t.element_size() for t in tensors)
        return result


@dataclasses.dataclass
class Cost:
    """What the penalties of all layers take in a step: operations of torch, FLOPs, bytes over the memory bus"""

    operations: int
    flops: float
    moved: float

    def time(self) -> float:
        _, speed, bandwidth = CARDS[ARCH]
        return Rate(speed, bandwidth).time(self.flops, self.moved)


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


def grouped(items: list[Item]) -> Cost:
    """``fl.penalty`` for all layers at once, and its backward pass"""
    inputs = [t for item in items for t in (*item.adapter.factors(), *([] if item.hidden is None else [item.hidden]))]
    with FlopCounterMode(display=False) as flops, Counted() as counted:
        torch.autograd.grad(type(items[0].state).total(items), inputs, allow_unused=True)
    return Cost(counted.operations, flops.get_total_flops(), counted.moved)


def made(items: list[Item]) -> Cost:
    """What the passes make, and ``fl.penalty`` of it, with its backward pass"""
    zs, moved, work = [], 0.0, 0.0
    for item in items:
        factors = dict(zip(("down", "up"), item.adapter.factors(), strict=True))
        lengths = [rows.length(RANK) for rows in item.state.rows()]
        z = torch.empty(sum(lengths), RANK, device="meta", requires_grad=True)
        zs.append(Products([item.state.rows()], z))
        for rows, k in zip(item.state.rows(), lengths, strict=True):
            if rows.of == "hidden":
                _, stores = gram_traffic(Sizes(TOKENS, 0, 0, RANK), tiles.row("project", ARCH, 2))
                moved += sum(stores.values())
                work += 2 * 2 * TOKENS * RANK**2
                continue
            factor = factors[rows.of]
            dim = max(factor.shape)
            V = sum(t.numel() * t.element_size() for t in rows[1:] if t is not None)
            size = dim * RANK * 4
            # forward V, the factor, z; backward V, the factor where it is V, dz, the strip's partial sum
            moved += 2 * V + size + (size if rows.own else 0) + 2 * 4 * k * RANK + size
            work += 2 * 2 * k * dim * RANK
    with FlopCounterMode(display=False) as flops, Counted() as counted:
        torch.autograd.grad(type(items[0].state).total_made(items, zs), [z for _, z in zs])
    return Cost(counted.operations, work + flops.get_total_flops(), moved + counted.moved)


def held(items: list[Item]) -> int:
    """Bytes of what the penalty keeps"""
    return sum(b.numel() * b.element_size() for item in items for b in item.state.buffers())


def lora_seconds() -> float:
    """Predicted time of a step's linear layers with LoRA"""
    layers = [Sizes(TOKENS, N, K, RANK) for K, N in SHAPES]
    return LAYERS * sum(sum(designs(s, ARCH)["forgetless split"]) for s in layers)


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
        for way, cost in (("grouped", grouped(items)), ("in the pass", made(items))):
            values = {"held": held(items), "moved": cost.moved, "predicted time": cost.time()}
            values |= {"operations": cost.operations, "FLOPs": cost.flops}
            units = {"held": "B", "moved": "B", "predicted time": "s"}
            made_rows += [row(name, way, "penalty", metric, v, units.get(metric, "1")) for metric, v in values.items()]
    return made_rows


def main(arguments: list[str] | None = None) -> Results:
    options, _, results = begin(parser(__doc__, "penalised", 1), "penalised", arguments)
    results["rows"] = rows()
    return finish(results, options)
