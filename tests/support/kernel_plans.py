"""The op on the Triton kernels by one plan, at sizes that the interpreter can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from forgetless.ops import dispatch as ops
from forgetless_kernels import sums, tiles

#: "descriptors" is the plan split, its GEMMs on tensor descriptors as on sm_90 and sm_100
PLANS = ("hybrid", "split", "descriptors", "full", "once")
#: The tile of a whole pass, unless a test wants another.
TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32}
#: What ``test_any_tile`` runs every product of the kernels on.
TILES = (
    {"BLOCK_M": 16, "BLOCK_K": 16},
    {"BLOCK_M": 128, "BLOCK_K": 32, "num_warps": 8},
    {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 128},
)


def fitted(row: str, **tile: int) -> dict[str, int]:
    """Those fields of a tile that the kernel of this row has: the skinny passes know no BLOCK_N."""
    return {name: value for name, value in tile.items() if getattr(tiles.row(row, 0, 2), name)}


@contextlib.contextmanager
def on_kernels(plan: str, monkeypatch: pytest.MonkeyPatch, **tile: int) -> Iterator[None]:
    """Within the block the op runs on the kernels by this plan and on these tiles; a fallback is an error."""
    tile = {**TILE, **tile}
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    monkeypatch.setenv("FORGETLESS_PLAN", f"{'split' if plan == 'descriptors' else plan},strict")
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops.backend("triton"))
        for row in tiles.TABLE:
            if plan == "descriptors" or not row.endswith("_descriptor"):
                stack.enter_context(tiles.forced(row, **fitted(row, **tile)))
        yield
