"""The cost model against the kernels themselves: bytes counted in the interpreter, and the promised predictions."""

from __future__ import annotations

import collections
import os

import pytest
import torch

from forgetless_bench import static
from forgetless_kernels import backward, lowrank, tiles, tl_utils

interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
TILE = {"BLOCK_M": 16, "BLOCK_K": 32}


@pytest.fixture
def counted(monkeypatch):
    """Counts the bytes of every load and store, by tensor: counted(names) -> (loads, stores)"""
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    traffic: list[tuple[str, int, int]] = []
    load, store = builder.create_masked_load, builder.create_masked_store

    def note(kind, ptrs, mask):
        size = max(1, ptrs.dtype.element_ty.primitive_bitwidth // 8)
        active = ptrs.data.ravel()[mask.data.ravel().astype(bool)]
        if len(active):
            traffic.append((kind, int(active[0]), len(active) * size))

    def masked_load(self, ptrs, mask, *rest):
        note("load", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def masked_store(self, ptrs, value, mask, *rest):
        note("store", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(builder, "create_masked_load", masked_load)
    monkeypatch.setattr(builder, "create_masked_store", masked_store)
    made: list[torch.Tensor] = []
    monkeypatch.setattr(
        tl_utils, "empty", lambda shape, dtype, like: made.append(torch.empty(shape, dtype=dtype)) or made[-1]
    )

    def total(operands: dict[str, torch.Tensor], names: list[str]):
        tensors = {**operands, **dict(zip(names, made, strict=True))}
        sums = {"load": collections.Counter(), "store": collections.Counter()}
        for kind, address, size in traffic:
            owner = next(
                name
                for name, t in tensors.items()
                if t.data_ptr() <= address < t.data_ptr() + t.untyped_storage().nbytes()
            )
            sums[kind][owner] += size
        return dict(sums["load"]), dict(sums["store"])

    return total


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


S = static.Sizes(M=96, N=64, K=128, R=16)


@interpreted
@pytest.mark.parametrize("R", [16, 32, 256])
def test_project_moves_what_the_model_says(R, counted):
    s = static.Sizes(S.M, S.N, S.K, R)
    operands = {"x": bf16(s.M, s.K), "down": torch.ones(R, s.K)}
    with tiles.forced("project", **TILE):
        lowrank.project(*operands.values())
    assert counted(operands, ["h"]) == static.project_traffic(s, tiles.Tile(16, 0, 32))


@interpreted
@pytest.mark.parametrize("bias", [False, True])
def test_matmul_lowrank_moves_what_the_model_says(bias, counted):
    operands = {"x": bf16(S.M, S.K), "weight": bf16(S.N, S.K), "h": bf16(S.M, S.R), "up": torch.ones(S.N, S.R)}
    if bias:
        operands["bias"] = bf16(S.N)
    with tiles.forced("matmul_lowrank", **TILE, BLOCK_N=32):
        lowrank.matmul_lowrank(*operands.values())
    loads, stores = static.matmul_lowrank_traffic(S, tiles.Tile(16, 32, 32))
    if bias:
        loads["bias"] = S.M // 16 * S.N * 2
    assert counted(operands, ["y"]) == (loads, stores)
    assert loads["x"] == S.N // 32 * S.M * S.K * 2 and stores["y"] == S.M * S.N * 2


@interpreted
@pytest.mark.parametrize("M", [32, 1024])
def test_outer_moves_what_the_model_says(M, counted):
    s = static.Sizes(M, S.N, S.K, S.R)
    operands = {"g": bf16(M, s.R), "x": bf16(M, s.K)}
    with tiles.forced("outer", **TILE):
        lowrank.outer(*operands.values(), dtype=torch.float32)
    assert counted(operands, ["out", "part"] if M > 64 else ["out"]) == static.outer_traffic(s, tiles.Tile(16, 0, 32))


@interpreted
def test_one_sweep_moves_what_the_model_says(counted, monkeypatch):
    monkeypatch.setattr(backward, "sweep_pays", lambda *sizes: True)
    operands = {"x": bf16(S.M, S.K), "down": torch.ones(S.R, S.K), "h": bf16(S.M, S.R)}
    with tiles.forced("project_outer", **TILE):
        backward.project_outer(*operands.values(), dtype=torch.float32)
    want = static.project_outer_traffic(S, tiles.Tile(16, 0, 32))
    assert counted(operands, ["g", "out", "g_part", "out_part"]) == want
    assert want[0]["x"] == S.M * S.K * 2  # once, though two products are made of it


def test_nothing_the_size_of_an_activation_is_written_but_the_outputs():
    for make, sizes in ((static.project_traffic, S), (static.outer_traffic, S), (static.project_outer_traffic, S)):
        big = static.dataclasses.replace(sizes, M=8192, N=4096, K=4096)
        kernel = make.__name__.removesuffix("_traffic")
        _, stores = make(big, static.tile_of(kernel, 90, big.R))
        assert max(stores.values()) < big.M * big.K * big.element / 8


def test_the_best_plan_is_predicted_within_eight_percent():
    over = static.overhead(static.Sizes(8192, 4096, 4096, 16), 90)
    ours = {name: value for name, value in over.items() if name.startswith("forgetless")}
    assert min(ours.values()) <= 8.0
    assert over["forgetless once"] <= 8.0
    assert max(ours.values()) < over["blas: small product first, beta=1"] < over["eager bfloat16"]
