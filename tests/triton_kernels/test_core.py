"""The skinny passes of layers with a core, on the kernels, against float64."""

from __future__ import annotations

import os

import pytest
import torch
from helpers import assert_as_good_as_eager
from torch import Tensor

from forgetless.ops import reference
from forgetless_kernels import fused, tiles
from forgetless_kernels.launcher import Launch

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs in the interpreter")
SEED = torch.tensor([-77, 5], dtype=torch.int32)
TILE = {"BLOCK_M": 16, "BLOCK_K": 32}
RANKS = (1, 3, 16, 64, 100, 200)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape))).to(dtype)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    names: list[str] = []
    plain = Launch.__call__

    def noted(self, *arguments):
        names.append(self.kernel.__name__)
        return plain(self, *arguments)

    monkeypatch.setattr(Launch, "__call__", noted)
    return names


def wide(t: Tensor, dtype: torch.dtype) -> Tensor:
    """The number that the kernels compute with, in float64."""
    return t.to(dtype).double()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, K, R", [(1, 9, 7, 3), (300, 64, 64, 16), *((70, 33, 66, R) for R in RANKS)])
def test_one_layer(M, N, K, R, dtype, launches):
    """Ragged sizes, dropout, cores in float32 and of any strides; one launch each way where the ranks are few."""
    x, dy = draw(M, K, dtype=dtype), draw(M, N, dtype=dtype, seed=1)
    down, up = draw(R, K, dtype=dtype, seed=2) / K**0.5, draw(R, N, dtype=dtype, seed=3).T / N**0.5
    for middle in (draw(R, R, seed=4) / R**0.5, draw(R, 2 * R, seed=5)[:, ::2].T / R**0.5):
        launches.clear()
        with tiles.forced("project", **TILE), tiles.forced("outer", **TILE):
            h, t = fused.project_core(x, [down], [middle], 0.5, 0.25, SEED)
            assert len(launches) == 1
            g, dcore = fused.project_core_outer(dy, up, middle, h, 0.5, torch.float32)
        assert len(launches) == (2 if R <= (32 if dtype == torch.float32 else 64) else 3)  # with a sum
        true_core, true_h = wide(middle, dtype), h.double()
        expected_h, _ = reference.project_core(x.double(), [down.double()], [true_core], 0.5, 0.25, SEED)
        eager_h, eager_t = reference.project_core(x, [down], [middle], 0.5, 0.25, SEED)
        assert_as_good_as_eager(h, eager_h, expected_h)
        assert_as_good_as_eager(t, eager_t, expected_h @ true_core.T)
        true_g, true_dcore = reference.project_core_outer(dy.double(), up.double(), true_core, true_h, 0.5)
        eager_g, eager_dcore = reference.project_core_outer(dy, up, middle, h, 0.5, torch.float32)
        assert_as_good_as_eager(g, eager_g, true_g)
        assert_as_good_as_eager(dcore, eager_dcore, true_dcore)
        assert dcore.dtype == torch.float32 and dcore.shape == (R, R)
        again, nothing = fused.project_core_outer(dy, up, middle, None, 0.5)
        assert_as_good_as_eager(again, eager_g, true_g)
        assert nothing is None


@pytest.mark.parametrize("ranks", [(8,), (3, 16, 5), (40, 60), (100, 60)])
def test_siblings(ranks, launches):
    """Each has its own ranks' core."""
    x, downs = draw(70, 40, dtype=torch.bfloat16), [draw(R, 40, seed=i) for i, R in enumerate(ranks)]
    cores = [draw(R, R, seed=9 + i) for i, R in enumerate(ranks)]
    with tiles.forced("project", **TILE):
        h, t = fused.project_core(x, downs, cores, 0.5)
        assert len(launches) == 1
    expected = reference.project_core(x, downs, cores, 0.5)
    for ours, theirs in zip((h, t), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_no_rows_and_the_same_bits_twice():
    up, middle = draw(5, 12).T, draw(5, 5)
    h, t = fused.project_core(draw(0, 8), [draw(5, 8)], [middle])
    g, dcore = fused.project_core_outer(draw(0, 12), up, middle, h)
    assert h.shape == t.shape == g.shape == (0, 5) and not dcore.any()
    dy, h = draw(700, 12), draw(700, 5)
    with tiles.forced("project", **TILE):
        first, second = (fused.project_core_outer(dy, up, middle, h)[1] for _ in range(2))
    assert torch.equal(first, second)
