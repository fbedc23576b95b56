"""The cost model's bytes of what penalties and cores add, against the kernels' own, counted in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import terms_traffic as traffic
import torch
import triton.language as tl
from kernel_plans import TILE, fitted
from torch import Tensor

from forgetless.ops.rows import More, Rows, Term
from forgetless_bench.static import Sizes, project_traffic
from forgetless_kernels import fused, sums, tiles
from forgetless_kernels import rows as kernel_rows
from forgetless_kernels.tl_utils import pad_rank

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
PROJECT = fitted("project", **TILE)
BF16 = torch.bfloat16
SIZES = [Sizes(M=32, N=64, K=64, R=16), Sizes(M=300, N=50, K=40, R=10), Sizes(M=21, N=50, K=40, R=144)]


def rows(kind: str, of: str, dim: int, k: int) -> tuple[Rows, traffic.Rows, dict[str, Tensor]]:
    """The rows, as the cost model has them, and their tensors by its names"""
    basis, signs = torch.ones(dim, k, dtype=BF16), torch.ones(dim, dtype=torch.int8)
    if kind == "stored":
        return Rows(of, basis), traffic.Rows(k, dim), {"V": basis}
    if kind == "shared":
        return Rows(of, basis, signs), traffic.Rows(k, dim, 2, 1), {"V": basis, "weight": signs}
    columns = torch.arange(k)
    return Rows(of, None, signs, columns), traffic.Rows(k, dim, 0, 1), {"weight": signs, "columns": columns}


def own(of: str, dim: int, R: int) -> tuple[Rows, traffic.Rows, dict[str, Tensor]]:
    return Rows(of), traffic.Rows(R, dim, 4, own=True), {}


def kinds(kind: str, of: str, s: Sizes) -> tuple[Rows, traffic.Rows, dict[str, Tensor]]:
    dim = s.K if of == "down" else s.N
    return own(of, dim, s.R) if kind == "own" else rows(kind, of, dim, min(33, dim))


KINDS = ("stored", "shared", "hadamard", "own")


def joined(parts: dict[str, int], names: dict[str, str]) -> dict[str, int]:
    """The bytes of several names under one, where they are of one tensor"""
    result: dict[str, int] = {}
    for name, size in parts.items():
        name = names.get(name, name)
        result[name] = result.get(name, 0) + size
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("of", ["down", "up"])
@pytest.mark.parametrize("s", SIZES, ids=str)
def test_products(s, of, kind, meter):
    given, model, tensors = kinds(kind, of, s)
    x, down, up = torch.ones(s.M, s.K, dtype=BF16), torch.ones(s.R, s.K), torch.ones(s.N, s.R)
    with tiles.forced("project", **PROJECT):
        fused.project_terms(x, [down], [up], [Term(0, (given,))])
    loads, stores = project_traffic(s, tiles.Tile(**TILE))
    more, made = traffic.product_traffic(model, s.R, pad_rank(s.R))
    names = {"factor": of, "V": of} if kind == "own" else {"factor": of}
    traffic.add(loads, joined(more, names))
    assert meter.launches == ["project"]
    operands = {"x": x, "down": down, "up": up, **tensors}
    assert meter.total(operands, ["h", "z"]) == (loads, {**stores, **made})


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", [Sizes(M=21, N=130, K=40, R=16), Sizes(M=300, N=77, K=20, R=10)], ids=str)
def test_products_in_parts(s, kind, hidden, meter, monkeypatch):
    """Of V wider than x: V and the factor are read once as before, and the parts written and read once."""
    monkeypatch.setattr(kernel_rows, "PRODUCT_COLUMNS", tl.constexpr(32))
    monkeypatch.setattr(traffic, "PRODUCT_COLUMNS", tl.constexpr(32))
    given, model, tensors = kinds(kind, "up", s)
    x, down, up = torch.ones(s.M, s.K, dtype=BF16), torch.ones(s.R, s.K), torch.ones(s.N, s.R)
    terms = [Term(0, (given, Rows("hidden")) if hidden else (given,))]
    with tiles.forced("project", **PROJECT):
        fused.project_terms(x, [down], [up], terms)
    loads, stores = project_traffic(s, tiles.Tile(**TILE))
    more, made = traffic.product_traffic(model, s.R, pad_rank(s.R), K=s.K)
    assert more["part"] == 4 * -(-s.N // 32) * -(-model.k // 32) * 32 * 16
    traffic.add(loads, joined(more, {"factor": "up", "V": "up"} if kind == "own" else {"factor": "up"}))
    traffic.add(stores, made)
    if hidden:
        for total, part in zip((loads, stores), traffic.gram_traffic(s, tiles.Tile(**TILE)), strict=True):
            traffic.add(total, part)
    assert meter.launches == ["project"]
    operands = {"x": x, "down": down, "up": up, **tensors}
    assert meter.total(operands, ["h", "z", "part", "tickets"]) == (loads, stores)


@pytest.mark.parametrize("s", SIZES[:2], ids=str)
def test_grams(s, meter):
    x, down, up = torch.ones(s.M, s.K, dtype=BF16), torch.ones(s.R, s.K), torch.ones(s.N, s.R)
    with tiles.forced("project", **PROJECT):
        fused.project_terms(x, [down], [up], [Term(0, (Rows("hidden"),))])
    loads, stores = project_traffic(s, tiles.Tile(**TILE))
    more, made = traffic.gram_traffic(s, tiles.Tile(**TILE))
    operands = {"x": x, "down": down, "up": up}
    total = meter.total(operands, ["h", "z", "part", "tickets"])
    assert meter.launches == ["project"] and total == ({**loads, **more}, {**stores, **made})


@pytest.mark.parametrize("BLOCK_K", [64, 128])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("s", SIZES, ids=str)
def test_strips_of_outer(s, kind, BLOCK_K, meter):
    given, model, tensors = kinds(kind, "down", s)
    g, x, down = torch.ones(s.M, s.R, dtype=BF16), torch.ones(s.M, s.K, dtype=BF16), torch.ones(s.R, s.K)
    d = torch.ones(given.length(s.R), s.R)
    with tiles.forced("outer", BLOCK_M=16, BLOCK_K=BLOCK_K):
        fused.outer(g, x, dtype=torch.float32, more=[More(given, down, d)])
    loads, stores = traffic.outer_more_traffic(s, tiles.Tile(16, 0, BLOCK_K), [model])
    operands = {"g": g, "x": x, "down": down, "d": d, **tensors}
    loads = joined(loads, {"V": "down"} if kind == "own" else {})
    assert meter.launches == ["outer"]
    assert meter.total(operands, ["out", "part", "tickets"]) == (loads, stores)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("s", SIZES[:2], ids=str)
def test_strips_of_the_sweep(s, start, kind, meter, monkeypatch):
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    s_up = Sizes(s.M, s.K, s.N, s.R)  # of which x is dy
    given, model, tensors = kinds(kind, "up", s_up)
    x, up, h = torch.ones(s.M, s.K, dtype=BF16), torch.ones(s.K, s.R), torch.ones(s.M, s.R, dtype=BF16)
    d, seed = torch.ones(given.length(s.R), s.R), torch.ones(s.R, s.R)
    with tiles.forced("project_outer", **PROJECT):
        fused.project_outer(x, up, h, 1.0, torch.float32, [More(given, up, d)], seed if start else None)
    loads, stores = traffic.sweep_more_traffic(s, tiles.Tile(**TILE), [model], start)
    operands = {"x": x, "down": up, "h": h, "d": d, "start": seed, **tensors}
    loads = joined(loads, {"V": "down"} if kind == "own" else {})
    assert meter.launches == ["project_outer"]
    assert meter.total(operands, ["g", "out", "g_part", "out_part", "tickets"]) == (loads, stores)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("ranks", [[16], [10], [3, 16, 5]], ids=str)
@pytest.mark.parametrize("M, K", [(32, 64), (300, 40)])
def test_cores(M, K, ranks, dropout, meter, monkeypatch):
    """Frozen factors in the activations' dtype, and each layer's core in float32, once for each block of rows."""
    s = Sizes(M, 0, K, sum(ranks), factor=2, dropout=dropout)
    x, down, core = torch.ones(M, K, dtype=BF16), torch.ones(s.R, K, dtype=BF16), torch.ones(sum(R * R for R in ranks))
    seed = torch.ones(2, dtype=torch.int32)
    cores = [part.view(R, R) for part, R in zip(core.split([R * R for R in ranks]), ranks, strict=True)]
    monkeypatch.setattr(torch, "cat", lambda parts: down)  # their stack, where the meter knows it
    with tiles.forced("project", **PROJECT):
        fused.project_core(x, down.split(ranks), cores, 1.0, 0.25 if dropout else 0.0, seed)
    operands = {"x": x, "down": down, "core": core, "seed": seed}
    assert meter.launches == ["project_core"]
    assert meter.total(operands, ["h", "t"]) == traffic.core_traffic(s, tiles.Tile(**TILE), ranks)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("M, N, R", [(32, 64, 16), (300, 50, 10), (21, 40, 64)])
def test_cores_backward(M, N, R, frozen, meter):
    """Nothing of the size of up is written, and q = dy @ up not at all."""
    s = Sizes(M, 0, N, R, factor=2)
    dy, up = torch.ones(M, N, dtype=BF16), torch.ones(R, N, dtype=BF16).T
    h, core = torch.ones(M, R, dtype=BF16), torch.ones(R, R)
    with tiles.forced("project", **PROJECT):
        fused.project_core_outer(dy, up, core, None if frozen else h, 1.0, torch.float32)
    operands = {"x": dy, "down": up, "core": core, "h": h}
    names = ["t"] if frozen else ["t", "z", "part", "tickets"]
    assert meter.launches == ["project_core"]
    assert meter.total(operands, names) == traffic.core_outer_traffic(s, tiles.Tile(**TILE), frozen)
