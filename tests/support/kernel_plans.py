"""The op on the Triton kernels by one plan, at sizes that the interpreter can do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from forgetless.ops import dispatch as ops
from forgetless_kernels import sums, tiles

#: "descriptors" is the plan split, its GEMMs on tensor descriptors as on sm_90 and sm_100
PLANS = ("split", "descriptors", "full", "once")


@contextlib.contextmanager
def on_kernels(plan: str, monkeypatch: pytest.MonkeyPatch, **tile: int) -> Iterator[None]:
    """Within the block the op runs on the kernels by this plan and on these tiles; a fallback is an error."""
    tile = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 32, **tile}
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    monkeypatch.setenv("FORGETLESS_PLAN", f"{'split' if plan == 'descriptors' else plan},strict")
    with contextlib.ExitStack() as stack:
        stack.enter_context(ops.backend("triton"))
        for row in tiles.TABLE:
            if plan == "descriptors" or not row.endswith("_descriptor"):
                stack.enter_context(tiles.forced(row, **tile))
        yield
