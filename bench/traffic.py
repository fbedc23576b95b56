"""Bytes and FLOPs of one launch of each kernel, by tensor: tests count the same bytes in Triton's interpreter."""

from __future__ import annotations

import dataclasses

from forgetless_kernels import tiles
from forgetless_kernels.project import strips_of
from forgetless_kernels.tl_utils import pad_rank, parts_of


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A layer and its element sizes, activations and factors"""

    M: int
    N: int
    K: int
    R: int
    element: int = 2
    factor: int = 4
    bias: bool = False
    dropout: bool = False


Bytes = dict[str, int]  # by tensor: what one launch loads or stores of it
SEED = 4  # bytes of the one number that each block of rows, or of columns, reads of the dropout's seed


def project_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of project; x comes once for each block of ranks, down once for each block of rows"""
    R = pad_rank(s.R)
    rows, blocks_r = cdiv(s.M, tile.BLOCK_M), cdiv(s.R, R)
    x = rows * tile.BLOCK_M * s.K * s.element * blocks_r
    loads = {"x": x, "down": rows * blocks_r * R * s.K * s.factor}
    if s.dropout:
        loads["seed"] = rows * blocks_r * (1 + cdiv(s.K, tile.BLOCK_K)) * SEED
    return loads, {"h": s.M * s.R * s.element}


def matmul_lowrank_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of matmul_lowrank: x for each column of tiles, weight for each row of tiles"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    M, N, parts = rows * tile.BLOCK_M, columns * tile.BLOCK_N, parts_of(tile.BLOCK_N, s.dropout)
    loads = {
        "x": columns * M * s.K * s.element,
        "weight": rows * N * s.K * s.element,
        "h": parts * columns * M * s.R * s.element,
        "up": rows * N * s.R * s.factor,
    }
    if s.bias:
        loads["bias"] = rows * N * s.element
    if s.dropout:
        loads["seed"] = rows * columns * parts * 2 * SEED
    return loads, {"y": s.M * s.N * s.element}


def matmul_lowrank_descriptor_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of matmul_lowrank on descriptors: they cut off what is past the end of x and weight"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = matmul_lowrank_traffic(s, tile)
    loads["x"] = columns * s.M * s.K * s.element
    loads["weight"] = rows * s.N * s.K * s.element
    return loads, stores


def outer_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of outer, its second kernel included"""
    R = pad_rank(s.R)
    columns, blocks_r = cdiv(s.K, tile.BLOCK_K), cdiv(s.R, R)
    strips, steps = strips_of(s.M, tile.BLOCK_M, columns * blocks_r)
    loads = {
        "g": columns * blocks_r * R * s.M * s.element,
        "x": columns * tile.BLOCK_K * s.M * s.element * blocks_r,
    }
    if s.dropout:
        loads["seed"] = columns * blocks_r * strips * (1 + steps) * SEED
    stores = {"out": s.R * s.K * s.factor}
    if strips > 1:
        loads["part"] = stores["part"] = 4 * strips * s.R * s.K
    return loads, stores


def project_outer_traffic(s: Sizes, tile: tiles.Tile) -> tuple[Bytes, Bytes]:
    """Loads and stores of the one sweep over x (M, K) of project_outer, its second kernel included"""
    R = pad_rank(s.R, most=64)
    columns = cdiv(s.K, tile.BLOCK_K)
    strips, _ = strips_of(s.M, tile.BLOCK_M, columns, programs=128)
    part = {"g_part": 4 * columns * s.M * s.R, "out_part": 4 * strips * s.K * s.R}
    loads = {
        "x": s.M * s.K * s.element,
        "down": strips * s.K * R * s.factor,
        "h": columns * s.M * R * s.element,
        **part,
    }
    return loads, {"g": s.M * s.R * s.element, "out": s.K * s.R * s.factor, **part}


def full_traffic(s: Sizes, tile: tiles.Tile, drop_output: bool = False) -> tuple[Bytes, Bytes]:
    """Loads and stores of the plan full: every tile makes h for itself, the first of each row of tiles stores it"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = matmul_lowrank_traffic(s, tile)
    del loads["h"]
    loads["down"] = rows * columns * pad_rank(s.R) * s.K * s.factor
    if s.dropout:
        keys = 2 * parts_of(tile.BLOCK_N, True) if drop_output else 1 + cdiv(s.K, tile.BLOCK_K)  # of y, or of x
        loads["seed"] = rows * columns * keys * SEED
    return loads, {**stores, "h": s.M * s.R * s.element}


def once_traffic(s: Sizes, tile: tiles.Tile, drop_output: bool = False) -> tuple[Bytes, Bytes]:
    """Loads and stores of the plan once: one column of tiles makes h, the others load it; where no tile has to wait"""
    rows, columns = cdiv(s.M, tile.BLOCK_M), cdiv(s.N, tile.BLOCK_N)
    loads, stores = full_traffic(s, tile, drop_output)
    loads["down"] = rows * pad_rank(s.R) * s.K * s.factor
    if columns > 1:
        loads["h"] = (columns - 1) * s.M * s.R * s.element
    if s.dropout and not drop_output:
        loads["seed"] //= columns  # the makers alone drop x
    # a ticket for each tile, then a flag raised or looked at; an atomic operation loads and stores
    loads["flags"] = stores["flags"] = 2 * 4 * rows * columns
    return loads, stores


TRAFFIC = {
    "project": project_traffic,
    "matmul_lowrank": matmul_lowrank_traffic,
    "matmul_lowrank_descriptor": matmul_lowrank_descriptor_traffic,
    "outer": outer_traffic,
    "project_outer": project_outer_traffic,
    "full": full_traffic,
    "once": once_traffic,
}


def flops(kernel: str, s: Sizes, tile: tiles.Tile) -> int:
    """What the kernel's products take, padding not counted"""
    gemm, skinny = 2 * s.M * s.N * (s.K + s.R), 2 * s.M * s.K * s.R
    return {
        "project": skinny,
        "matmul_lowrank": gemm,
        "matmul_lowrank_descriptor": gemm,
        "outer": skinny,
        "project_outer": 2 * skinny,
        "full": gemm + cdiv(s.N, tile.BLOCK_N or s.N) * skinny,
        "once": gemm + skinny,
    }[kernel]


def memory(kernel: str, s: Sizes, tile: tiles.Tile) -> int:
    """Bytes over the memory bus: every matrix once; partial sums are written, their reads left to L2"""
    loads, stores = TRAFFIC[kernel](s, tile)
    once = {
        "x": s.M * s.K * s.element,
        "weight": s.N * s.K * s.element,
        "h": s.M * s.R * s.element,
        "g": s.M * s.R * s.element,
        "down": s.R * s.K * s.factor,
        "up": s.N * s.R * s.factor,
    }
    return sum(once[name] for name in loads if name in once and name not in stores) + sum(stores.values())
