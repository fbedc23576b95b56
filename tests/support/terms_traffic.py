"""Bytes that penalties and cores add to the kernels' own, in closed form: what the counters are compared with."""

from __future__ import annotations

import dataclasses

from forgetless_bench.penalised import gram_traffic
from forgetless_bench.static import Bytes, Sizes, cdiv, outer_traffic, project_outer_traffic, project_traffic
from forgetless_kernels import tiles
from forgetless_kernels.rows import PRODUCT_COLUMNS, PRODUCT_ROWS, SUM_COLUMNS, SUM_ROWS
from forgetless_kernels.sums import strips_of
from forgetless_kernels.tl_utils import pad_rank


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
