"""The cost model's bytes against the kernels' own, counted in Triton's interpreter; and what a whole plan moves."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import pytest
import torch
from kernel_plans import PLANS, TILE, fitted, on_kernels
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forgetless.ops.autograd import lowrank_linear
from forgetless_bench import static as traffic
from forgetless_kernels import fused, sums, tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
SKINNY = fitted("project", **TILE)
EVEN = traffic.Sizes(M=32, N=64, K=64, R=16)
RAGGED = traffic.Sizes(M=21, N=50, K=40, R=10)
P = 0.25


def bf16(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bfloat16)


def drop(s: traffic.Sizes) -> dict[str, Any]:
    return {"p": P, "seed": torch.ones(2, dtype=torch.int32)} if s.dropout else {}


def operands_of(s: traffic.Sizes, *names: str) -> dict[str, torch.Tensor]:
    shapes = {"x": (s.M, s.K), "weight": (s.N, s.K), "h": (s.M, s.R), "g": (s.M, s.R), "bias": (s.N,)}
    factors = {"down": (s.R, s.K), "up": (s.N, s.R)}
    return {name: torch.ones(factors[name]) if name in factors else bf16(*shapes[name]) for name in names}


def with_seed(operands: dict[str, torch.Tensor], options: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {**operands, "seed": options["seed"]} if options else operands


def variants(*changes: dict[str, Any]) -> list[traffic.Sizes]:
    return [dataclasses.replace(s, **change) for s in (EVEN, RAGGED) for change in ({}, *changes)]


@pytest.mark.parametrize("s", variants({"dropout": True}, {"R": 256}, {"dropout": True, "R": 144}), ids=str)
def test_project(s, meter):
    operands, options = operands_of(s, "x", "down"), drop(s)
    with tiles.forced("project", **SKINNY):
        fused.project(*operands.values(), **options)
    want = traffic.project_traffic(s, tiles.Tile(**TILE))
    assert meter.total(with_seed(operands, options), ["h"]) == want
    if s == EVEN:
        assert want == ({"x": s.M * s.K * 2, "down": s.M // 16 * s.R * s.K * 4}, {"h": s.M * s.R * 2})


@pytest.mark.parametrize("s", variants({"dropout": True}, {"bias": True, "R": 200}), ids=str)
def test_matmul_lowrank(s, meter):
    operands, options = operands_of(s, "x", "weight", "h", "up", *(["bias"] if s.bias else [])), drop(s)
    with tiles.forced("matmul_lowrank", **TILE):
        fused.matmul_lowrank(*operands.values(), **options)
    want = traffic.matmul_lowrank_traffic(s, tiles.Tile(**TILE))
    assert meter.total(with_seed(operands, options), ["y"]) == want
    if s == EVEN:  # x through the cache for each column of tiles, y once
        assert want[0]["x"] == s.N // 32 * s.M * s.K * 2 and want[1] == {"y": s.M * s.N * 2}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("change", [{}, {"dropout": True}, {"bias": True, "R": 128}], ids=str)
@pytest.mark.parametrize("sizes", [(32, 64, 64), (21, 72, 40)])
def test_matmul_lowrank_on_descriptors(sizes, change, transposed, meter):
    s = traffic.Sizes(*sizes, **{"R": 16, **change})
    operands, options = operands_of(s, "x", "weight", "h", "up", *(["bias"] if s.bias else [])), drop(s)
    if transposed:
        operands["weight"] = operands["weight"].T.contiguous().T
    tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 32}
    with tiles.forced("matmul_lowrank_t_descriptor" if transposed else "matmul_lowrank_descriptor", **tile):
        fused.matmul_lowrank(*operands.values(), **options)
    assert meter.launches == ["matmul_lowrank_descriptor"]
    want = traffic.matmul_lowrank_descriptor_traffic(s, tiles.Tile(**tile))
    assert meter.total(with_seed(operands, options), ["y"]) == want


@pytest.mark.parametrize("M", [32, 1024])
@pytest.mark.parametrize("s", variants({"dropout": True}, {"dropout": True, "R": 144}), ids=str)
def test_outer(s, M, meter):
    s = dataclasses.replace(s, M=M + s.M % 2)
    operands, options = operands_of(s, "g", "x"), drop(s)
    with tiles.forced("outer", BLOCK_M=16 if M < 64 else 64, BLOCK_K=64):
        fused.outer(*operands.values(), **options, dtype=torch.float32)
        tile = tiles.Tile(16 if M < 64 else 64, 0, 64)
    want = traffic.outer_traffic(s, tile)
    assert meter.total(with_seed(operands, options), ["out", "part", "tickets"]) == want


@pytest.mark.parametrize("s", variants({"R": 64}), ids=str)
def test_one_sweep(s, meter, monkeypatch):
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    operands = operands_of(s, "x", "down", "h")
    with tiles.forced("project_outer", **SKINNY):
        fused.project_outer(operands["x"], operands["down"].T, operands["h"], dtype=torch.float32)
    want = traffic.project_outer_traffic(s, tiles.Tile(**TILE))
    assert meter.total(operands, ["g", "out", "g_part", "out_part", "tickets"]) == want
    assert want[0]["x"] == s.M * s.K * 2  # once, though two products are made of it


@pytest.mark.parametrize("plan", ["full", "once"])
@pytest.mark.parametrize("drop_output", [False, True])
@pytest.mark.parametrize("s", variants({"dropout": True}, {"bias": True, "R": 64}, {"N": 20}), ids=str)
def test_whole_forward_in_one_kernel(s, plan, drop_output, meter):
    operands, options = operands_of(s, "x", "weight", "down", "up", *(["bias"] if s.bias else [])), drop(s)
    with tiles.forced(plan, **TILE):
        fused.linear_lowrank(*operands.values(), **options, drop_output=drop_output, plan=plan)
    want = traffic.TRAFFIC[plan](s, tiles.Tile(**TILE), drop_output)
    made = ["y", "h", "flags"] if plan == "once" else ["y", "h"]
    assert meter.total(with_seed(operands, options), made) == want


# ------------------------------------------------------------------------------------- whole plans


class Large(TorchDispatchMode):
    """The results of torch's own operations that have memory of their own and at least so many elements"""

    def __init__(self, numel: int, given: list[torch.Tensor]):
        super().__init__()
        self.numel, self.found = numel, []
        self.known = {t.untyped_storage().data_ptr() for t in given}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.numel() >= self.numel:
                address = t.untyped_storage().data_ptr()
                if address not in self.known:
                    self.found.append((str(function), tuple(t.shape)))
                    self.known.add(address)
        return result


FORWARD = {
    "split": ["project", "matmul_lowrank"],
    "descriptors": ["project", "matmul_lowrank_descriptor"],
    "full": ["linear_lowrank"],
    "once": ["linear_lowrank"],
    "hybrid": ["project"],
}
BACKWARD = {
    "split": ["project_outer", "matmul_lowrank", "outer"],
    "descriptors": ["project_outer", "matmul_lowrank_descriptor", "outer"],
    "full": ["linear_lowrank", "outer", "outer"],
    "once": ["linear_lowrank", "outer", "outer"],
    "hybrid": ["project_outer", "outer"],
}


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_writes_nothing_large_but_its_results_and_reads_no_more_than_it_must(plan, dropout, meter, monkeypatch):
    M, N, K, R = 80, 48, 40, 4
    x, weight = bf16(M, K).requires_grad_(), bf16(N, K)
    down, up, dy = bf16(R, K).requires_grad_(), bf16(N, R).requires_grad_(), bf16(M, N)
    seed = torch.ones(2, dtype=torch.int32) if dropout else None
    named = {"x": x, "W": weight, "A": down, "B": up, "dy": dy, **({} if seed is None else {"seed": seed})}
    with on_kernels(plan, monkeypatch, BLOCK_K=64):
        with Large(M * min(N, K), [*named.values()]) as large:
            y = lowrank_linear(x, weight, down, up, None, 0.5, dropout, seed)
        own = plan != "hybrid"  # whose large product is the vendor's, which the meter does not see
        assert [t.shape for t in meter.made if t.numel() >= M * K] == ([(M, N)] if own else [])
        assert meter.launches == FORWARD[plan]
        assert meter.streams(named) == {"x": len(FORWARD[plan])} | ({"W": 1} if own else {})
        assert [shape for _, shape in large.found] == [(M, N)]
        assert not own or large.found[0][0] == "aten.empty.memory_format"
        del meter.launches[:], meter.traffic[:]
        forward = len(meter.made)
        with Large(M * min(N, K), [*named.values(), y]) as large:
            torch.autograd.grad(y, (x, down, up), dy)
    assert [t.shape for t in meter.made[forward:] if t.numel() >= M * K] == ([(M, K)] if own else [])
    # under dropout the vendor's low-rank part of dx is masked before it is added
    assert [shape for _, shape in large.found] == [(M, K)] * (1 if own or not dropout else 2)
    assert not own or large.found[0][0] == "aten.empty.memory_format"
    assert meter.launches == BACKWARD[plan]
    assert meter.streams(named) == ({"dy": 2, "x": 1, "W": 1} if own else {"dy": 1, "x": 1})
