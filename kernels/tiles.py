"""Tile sizes: one table by kernel, architecture and element size, and a scoped override.

A row is a starting point; ``forgetless tune`` measures better ones on the card at hand. Whatever a row says, stages are
taken away until the tile fits the card's shared memory, so no rank and no dtype needs a row of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Tile:
    """How a kernel cuts its matrices: rows, columns, reduction; warps of a program; loads in flight."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int = 4
    num_stages: int = 3


# What one block may use, in bytes; an unknown card gets the least of them.
SHARED = {0: 65536, 80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}

#: Registers of a thread, as ``maxnreg``. Without it ptxas (of Triton 3.8 and 3.9) spills a few bytes to fit in programs
#: that shared memory keeps out, of which it knows nothing.
MOST_REGISTERS = 255

# TABLE[kernel][architecture, element bytes]; architecture 0 is the safe default of an unknown card.
# project and project_outer stream their first operand: BLOCK_M x BLOCK_K of it a step, BLOCK_N unused.
# matmul_lowrank_t is matmul_lowrank with the weight stored the other way round (the backward pass).
TABLE: dict[str, dict[tuple[int, int], Tile]] = {
    "project": {
        (0, 2): Tile(32, 0, 64, 4, 3),
        (0, 4): Tile(32, 0, 32, 4, 2),
        (80, 2): Tile(64, 0, 128, 4, 4),
        (86, 2): Tile(64, 0, 64, 4, 4),
        (89, 2): Tile(64, 0, 64, 4, 4),
        (90, 2): Tile(64, 0, 128, 4, 5),
        (100, 2): Tile(64, 0, 128, 4, 5),
        (120, 2): Tile(64, 0, 64, 4, 4),
    },
    # sm_90 and sm_100 come here with unaligned matrices and large ranks alone: twice as wide, those spilt half a
    # kilobyte. What is aligned takes the descriptor kernel below.
    "matmul_lowrank": {
        (0, 2): Tile(64, 64, 32, 4, 3),
        (0, 4): Tile(64, 64, 32, 4, 2),
        (80, 2): Tile(128, 128, 64, 8, 4),
        (80, 4): Tile(64, 128, 32, 8, 3),
        (86, 2): Tile(64, 128, 32, 4, 4),
        (89, 2): Tile(128, 128, 32, 8, 4),
        (90, 2): Tile(128, 128, 64, 8, 4),
        (90, 4): Tile(64, 128, 32, 8, 3),
        (100, 2): Tile(128, 128, 64, 8, 4),
        (120, 2): Tile(128, 128, 32, 8, 4),
    },
    "matmul_lowrank_t": {
        (0, 2): Tile(64, 64, 32, 4, 3),
        (0, 4): Tile(64, 64, 32, 4, 2),
        (80, 2): Tile(128, 128, 64, 8, 4),
        (80, 4): Tile(64, 128, 32, 8, 3),
        (86, 2): Tile(64, 128, 32, 4, 4),
        (89, 2): Tile(128, 128, 32, 8, 4),
        (90, 2): Tile(128, 128, 64, 8, 4),
        (90, 4): Tile(64, 128, 32, 8, 3),
        (100, 2): Tile(128, 128, 64, 8, 4),
        (120, 2): Tile(128, 128, 32, 8, 4),
    },
    # a row here is what makes a card take the descriptor kernel; sm_120 has the hardware but no use for it yet
    "matmul_lowrank_descriptor": {
        (90, 2): Tile(128, 256, 64, 8, 3),
        (100, 2): Tile(128, 256, 64, 8, 3),
    },
    "matmul_lowrank_t_descriptor": {
        (90, 2): Tile(128, 256, 64, 8, 3),
        (100, 2): Tile(128, 256, 64, 8, 3),
    },
    # the whole forward in one kernel; both hold a second, narrow accumulator
    "full": {
        (0, 2): Tile(64, 64, 32, 4, 3),
        (0, 4): Tile(64, 64, 32, 4, 2),
        (80, 2): Tile(128, 128, 32, 8, 4),
        (86, 2): Tile(64, 128, 32, 4, 4),
        (89, 2): Tile(64, 128, 32, 4, 4),
        (90, 2): Tile(128, 128, 64, 8, 4),
        (100, 2): Tile(128, 128, 64, 8, 4),
        (120, 2): Tile(64, 64, 64, 4, 3),
    },
    "once": {
        (0, 2): Tile(64, 64, 32, 4, 3),
        (0, 4): Tile(64, 64, 32, 4, 2),
        (80, 2): Tile(128, 128, 32, 8, 4),
        (86, 2): Tile(64, 128, 32, 4, 4),
        (89, 2): Tile(64, 128, 32, 4, 4),
        (90, 2): Tile(128, 256, 64, 8, 3),
        (100, 2): Tile(128, 128, 64, 4, 4),
        (120, 2): Tile(64, 128, 32, 8, 4),
    },
    "outer": {
        (0, 2): Tile(32, 0, 64, 4, 3),
        (0, 4): Tile(32, 0, 64, 4, 2),
        (80, 2): Tile(64, 0, 128, 4, 4),
        (86, 2): Tile(64, 0, 128, 4, 3),
        (89, 2): Tile(64, 0, 128, 4, 3),
        (90, 2): Tile(64, 0, 128, 4, 5),
        (100, 2): Tile(64, 0, 128, 4, 5),
        (120, 2): Tile(64, 0, 128, 4, 3),
    },
    # BLOCK_M rows a step against BLOCK_K columns held: wide, so that few partial sums are written
    "project_outer": {
        (0, 2): Tile(32, 0, 128, 8, 2),
        (0, 4): Tile(32, 0, 64, 4, 2),
        (80, 2): Tile(64, 0, 256, 8, 4),
        (86, 2): Tile(32, 0, 256, 8, 4),
        (89, 2): Tile(32, 0, 256, 8, 4),
        (90, 2): Tile(64, 0, 512, 8, 3),
        (100, 2): Tile(64, 0, 512, 8, 3),
        (120, 2): Tile(32, 0, 256, 8, 4),
    },
    # of experts: an expert's last block of rows is half empty on average, so blocks are small
    "grouped_project": {
        (0, 2): Tile(32, 0, 64, 4, 3),
        (0, 4): Tile(32, 0, 32, 4, 2),
        (80, 2): Tile(64, 0, 64, 4, 4),
        (90, 2): Tile(64, 0, 64, 4, 4),
        (100, 2): Tile(64, 0, 64, 4, 4),
    },
    "grouped_matmul": {
        (0, 2): Tile(64, 64, 32, 4, 3),
        (0, 4): Tile(64, 64, 32, 4, 2),
        (80, 2): Tile(64, 128, 64, 8, 3),
        (86, 2): Tile(64, 128, 32, 4, 3),
        (89, 2): Tile(64, 128, 32, 4, 3),
        (90, 2): Tile(64, 128, 64, 8, 4),
        (100, 2): Tile(64, 128, 64, 8, 4),
        (120, 2): Tile(64, 128, 32, 4, 3),
    },
    "grouped_outer": {
        (0, 2): Tile(32, 0, 64, 4, 3),
        (0, 4): Tile(32, 0, 64, 4, 2),
        (80, 2): Tile(64, 0, 128, 4, 3),
        (90, 2): Tile(64, 0, 128, 4, 3),
        (100, 2): Tile(64, 0, 128, 4, 3),
    },
}

#: Kernel and the fields that are forced on it, the last one first.
Forced = tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
_forced: ContextVar[Forced] = ContextVar("forced", default=())


@contextmanager
def forced(kernel: str, **fields: int) -> Iterator[None]:
    """Within the block, ``kernel`` runs with these fields of its tile: for tests and tuning.

    Args:
        kernel: a name of ``TABLE``, AssertionError if not.
        fields: any of ``Tile``'s, likewise.
    """
    assert kernel in TABLE and set(fields) <= {f.name for f in dataclasses.fields(Tile)}
    others = tuple(one for one in _forced.get() if one[0] != kernel)
    token = _forced.set(((kernel, tuple(fields.items())), *others))
    try:
        yield
    finally:
        _forced.reset(token)


def forced_tiles() -> Forced:
    """What is forced here and now: a tile depends on it."""
    return _forced.get()


@functools.cache
def arch_of(device: torch.device) -> int:
    """The compute capability as one number: 90 for sm_90; 0 without CUDA"""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def known_arch(arch: int) -> int:
    """The newest architecture of the table in the same family and not after this one, or 0"""
    return max((a for a in SHARED if a <= arch and a // 10 == arch // 10), default=0)


def row(kernel: str, arch: int, itemsize: int) -> Tile:
    """The table's row, or the default"""
    rows = TABLE[kernel]
    return rows.get((known_arch(arch), itemsize)) or rows.get((0, itemsize), Tile(32, 32, 32))


def has_row(kernel: str, device: torch.device) -> bool:
    """Whether ``kernel`` is made for this card, or forced upon it"""
    return (known_arch(arch_of(device)), 2) in TABLE[kernel] or kernel in dict(_forced.get())


def stage_bytes(kernel: str, tile: Tile, R: int, itemsize: int) -> int:
    """Shared memory of one step of the kernel's main loop"""
    kernel = kernel.removeprefix("grouped_")
    if kernel in ("outer", "project_outer"):
        return tile.BLOCK_M * (tile.BLOCK_K + R) * itemsize
    if kernel == "project":
        return (tile.BLOCK_M + R) * tile.BLOCK_K * itemsize
    extra = R if kernel in ("full", "once") else 0
    return (tile.BLOCK_M + tile.BLOCK_N + extra) * tile.BLOCK_K * itemsize


def fit(kernel: str, tile: Tile, R: int, itemsize: int, arch: int) -> Tile:
    """The tile made smaller until accumulators of rank R fit the registers and its stages the shared memory"""
    BLOCK_N, BLOCK_K, num_warps = tile.BLOCK_N, tile.BLOCK_K, tile.num_warps
    arch = known_arch(arch)
    if kernel == "grouped_outer" and arch == 90 and R > 32:  # of 128 Triton 3.6 makes each wgmma wait
        BLOCK_K = min(BLOCK_K, 64)
    kernel = kernel.removeprefix("grouped_")
    if kernel == "project":
        BLOCK_K, num_warps = min(BLOCK_K, 4096 // R), max(num_warps, R // 16)
    elif kernel == "outer":
        num_warps = 8 if R > 32 else num_warps
    elif kernel == "project_outer":  # its accumulator is BLOCK_K x R: 64 registers a thread
        BLOCK_K = min(BLOCK_K, num_warps * 2048 // R)
    elif kernel in ("full", "once") and R > 32:
        BLOCK_N //= 2
    tile = dataclasses.replace(tile, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=num_warps)
    room = SHARED[arch] // stage_bytes(kernel, tile, R, itemsize)
    return dataclasses.replace(tile, num_stages=max(1, min(tile.num_stages, room)))


@functools.cache
def _arguments(kernel: str, arch: int, itemsize: int, R: int) -> dict[str, int]:
    tile = fit(kernel, row(kernel, arch, itemsize), R, itemsize, arch)
    more = {"maxnreg": MOST_REGISTERS} if kernel.startswith("grouped_") and tile.num_warps == 4 else {}
    return {name: value for name, value in dataclasses.asdict(tile).items() if value} | more


def tile_for(kernel: str, device: torch.device, itemsize: int, R: int) -> dict[str, Any]:
    """The launch arguments of ``kernel`` for a card, an element size in bytes and a padded rank"""
    return {**_arguments(kernel, arch_of(device), itemsize, R), **dict(dict(_forced.get()).get(kernel, ()))}


def for_two(tile: dict[str, Any], device: torch.device, itemsize: int, R: int, factor: int) -> dict[str, Any]:
    """The tile of project with as many stages as leave room for two programs a multiprocessor, of factors of so many
    bytes an element, and with all the registers of two"""
    tile, arch = dict(tile), known_arch(arch_of(device))
    operands = (tile["BLOCK_M"] + R) * tile["BLOCK_K"] * itemsize if arch in (90, 100) else 0  # once more, for wgmma
    stage = tile["BLOCK_K"] * (tile["BLOCK_M"] * itemsize + R * factor)
    room = (SHARED[arch] + 1024) // 2 - 1024 - operands  # of each program 1024 bytes are the card's own
    tile["num_stages"] = max(1, min(tile["num_stages"], room // stage + 1))
    if tile["num_warps"] == 4:
        tile["maxnreg"] = MOST_REGISTERS
    return tile
