"""What penalties want of the skinny passes, on the kernels, against float64."""

from __future__ import annotations

import os

import pytest
import torch
import triton.language as tl
from torch import Tensor

from forgetless.ops import reference
from forgetless.ops.rows import More, Rows, Term, extra_of, hadamard_rows
from forgetless_kernels import fused, rows, sums, tiles

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter")
SEED = torch.tensor([-77, 5], dtype=torch.int32)
TILE = {"BLOCK_M": 16, "BLOCK_K": 32}


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))).to(dtype)


def signs(dim: int) -> Tensor:
    return (torch.arange(dim) % 3 - 1 + (torch.arange(dim) % 3 == 1)).to(torch.int8)


def kinds(of: str, dim: int, k: int, dtype: torch.dtype) -> dict[str, Rows]:
    columns = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))[: min(k, dim)]
    return {
        "stored": Rows(of, draw(k, dim, dtype=dtype).T),
        "by columns": Rows(of, draw(dim, k, dtype=dtype)),
        "float32": Rows(of, draw(k, dim).T),
        "shared": Rows(of, draw(k, dim, dtype=dtype).T, signs(dim)),
        "hadamard": Rows(of, None, signs(dim), columns),
        "own": Rows(of),
        "own, weighted": Rows(of, None, draw(dim).abs()),
    }


KINDS = list(kinds("down", 8, 4, torch.float32))


def wide(rows: Rows) -> Rows:
    return Rows(rows.of, *[t.double() if t is not None and t.is_floating_point() else t for t in rows[1:]])


def widened(more: More) -> More:
    return More(wide(more.rows), more.factor.double(), more.dz.double(), more.at, more.first)


def error(ours: Tensor, truth: Tensor) -> float:
    return ((ours.double() - truth).norm() / truth.norm().clamp(min=1e-30)).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim, k, R", [(64, 32, 16), (77, 20, 3), (33, 40, 1), (96, 9, 130)])
def test_products(kind, dim, k, R):
    """Exact to 2**-16 of factors in float32 beside activations in bfloat16."""
    dtype = torch.bfloat16
    x, down, up = draw(21, dim, dtype=dtype), draw(R, dim), draw(dim, R, seed=1)
    terms = [Term(0, (kinds("down", dim, k, dtype)[kind], kinds("up", dim, k, dtype)[kind]))]
    with tiles.forced("project", **TILE):
        h, (z,) = fused.project_terms(x, [down], [up], terms, 0.5, 0.25, SEED)
        alone = fused.project(x, down, 0.5, 0.25, SEED)
    assert torch.equal(h, alone) and z.dtype == torch.float32
    truth = [Term(0, tuple(wide(rows) for rows in terms[0].rows))]
    _, (expected,) = reference.project_terms(x.double(), [down.double()], [up.double()], truth)
    assert error(z, expected) < 1e-5


@pytest.fixture
def backwards(monkeypatch):
    """A function after which the programs of a launch come in the opposite order"""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    at = builder.set_grid_idx

    def turn() -> None:
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: at(builder.grid_dim[0] - 1 - x, y, z))

    return turn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dim, k, R", [(77, 20, 3), (33, 40, 1), (130, 40, 16), (96, 9, 130)])
def test_products_in_parts(kind, dim, k, R, monkeypatch, backwards):
    """V wider than x: programs take a part of its columns each, and add up alike whichever comes last."""
    monkeypatch.setattr(rows, "PRODUCT_COLUMNS", tl.constexpr(32))
    dtype = torch.bfloat16
    x, downs, ups = draw(70, 24, dtype=dtype), [draw(R, 24), draw(2, 24)], [draw(dim, R, seed=1), draw(dim, 2)]
    own = (Rows("up"), Rows("hidden"))
    terms = [Term(0, (kinds("down", 24, k, dtype)[kind], kinds("up", dim, k, dtype)[kind], *own)), Term(1, own)]
    with tiles.forced("project", **TILE):
        h, zs = fused.project_terms(x, downs, ups, terms, 0.5, 0.25, SEED)
        backwards()
        again, others = fused.project_terms(x, downs, ups, terms, 0.5, 0.25, SEED)
    assert all(torch.equal(*pair) for pair in zip((h, *zs), (again, *others), strict=True))
    truth = [Term(term.layer, tuple(wide(one) for one in term.rows)) for term in terms]
    wide_downs, wide_ups = ([factor.double() for factor in some] for some in (downs, ups))
    _, expected = reference.project_terms(x.double(), wide_downs, wide_ups, truth)
    for layer, (z, value) in enumerate(zip(zs, expected, strict=True)):
        ranks = slice(0, R) if layer == 0 else slice(R, R + 2)
        gram = h[:, ranks].double().T @ h[:, ranks].double()
        assert error(z[: -len(gram)], value[: -len(gram)]) < 1e-5 and error(z[-len(gram) :], gram) < 1e-5


@pytest.mark.parametrize("M", [1, 70, 300])
@pytest.mark.parametrize("ranks", [(8,), (3, 16, 5), (100, 60)])
def test_grams_of_siblings(M, ranks):
    x, downs = draw(M, 40, dtype=torch.bfloat16), [draw(R, 40, seed=i) for i, R in enumerate(ranks)]
    ups = [draw(8, R) for R in ranks]
    terms = [Term(i, (Rows("up"), Rows("hidden"))) for i in range(len(ranks))]
    with tiles.forced("project", **TILE):
        h, zs = fused.project_terms(x, downs, ups, terms, 0.5)
    for part, up, z in zip(h.double().split(ranks, 1), ups, zs, strict=True):
        assert error(z, torch.cat((up.double().T @ up.double(), part.T @ part))) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sweep", [True, False])
@pytest.mark.parametrize("M, dim, k, R", [(70, 64, 32, 16), (33, 77, 20, 3), (300, 33, 40, 1), (0, 20, 5, 4)])
def test_sums(kind, sweep, M, dim, k, R, monkeypatch):
    """The gradients of the products join those of the layer, with dropout for x alone."""
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: sweep)
    dtype, f32 = torch.bfloat16, torch.float32
    x, down, h = draw(M, dim, dtype=dtype), draw(R, dim), draw(M, R, dtype=dtype, seed=2)
    up, start = draw(dim, R, seed=1), draw(R, R, seed=5)

    def more(of: str, factor: Tensor) -> list[More]:
        rows = kinds(of, dim, k, dtype)[kind]
        dz = draw(2 + rows.length(R) + R, R)  # that of the second begins where the first's ends
        return [More(rows, factor, dz, 2), More(Rows(of), factor, dz, 2 + rows.length(R))]

    downs, ups = more("down", down), more("up", up)
    true_downs, true_ups = ([widened(one) for one in some] for some in (downs, ups))
    with tiles.forced("project", **TILE), tiles.forced("outer", **TILE), tiles.forced("project_outer", **TILE):
        g, dup = fused.project_outer(x, up, h, 0.5, f32, ups, start)
        dropped = fused.outer(h, x, 0.25, SEED, f32, downs)
    wide_x, wide_h = x.double(), h.double()
    both = reference.project_outer(wide_x, up.bfloat16().double(), wide_h, 0.5, None, true_ups, start.double())
    expected = (*both, reference.outer(wide_h, wide_x, 0.25, SEED, None, true_downs))
    for ours, value in zip((g, dup, dropped), expected, strict=True):
        assert ours.shape == value.shape and error(ours, value) < (4e-3 if ours.dtype == dtype else 1e-5)


def test_ranks_of_siblings_in_one_sum():
    """Each gets its own rows' part, whatever the others have."""
    x, g = draw(40, 50, dtype=torch.bfloat16), draw(40, 3 + 150 + 6, dtype=torch.bfloat16)
    downs = [draw(R, 50) for R in (3, 150, 6)]
    terms = [Term(i, (Rows("down"), Rows("down", draw(50, 9, dtype=torch.bfloat16)))) for i in (0, 1, 2)]
    dzs = [draw(len(down) + 9, len(down)) for down in downs]
    extra = extra_of(terms, dzs, downs, [draw(4, len(down)) for down in downs])
    with tiles.forced("outer", **TILE):
        out = fused.outer(g, x, 0.0, None, torch.float32, extra.downs)
    truth = [widened(one) for one in extra.downs]
    assert error(out, reference.outer(g.double(), x.double(), more=truth)) < 1e-5


@pytest.mark.parametrize("dim", [1, 8, 77, 96])
def test_hadamard_rows(dim):
    from forgetless.penalties.hadamard import hadamard_blocks

    truth = hadamard_blocks(torch.eye(dim, dtype=torch.float64))
    torch.testing.assert_close(hadamard_rows(torch.arange(dim), dim), truth)
