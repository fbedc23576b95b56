"""How many launches a pass takes, and that sums ended by whoever comes last are those of the formula."""

from __future__ import annotations

import os

import pytest
import torch

from forgetless.ops import blas, dispatch, reference
from forgetless.ops.bodies import Call, Saved, gradients
from forgetless_kernels import fused, launcher, matmul_lowrank, sums, tiles, tl_utils

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
SEED = torch.tensor([-77, 5], dtype=torch.int32)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels as they are launched"""
    names: list[str] = []
    plain = launcher.Launch.__call__

    def noted(self, *arguments):
        names.append(self.kernel.__name__.strip("_").removesuffix("_kernel"))
        return plain(self, *arguments)

    monkeypatch.setattr(launcher.Launch, "__call__", noted)
    return names


def siblings(M: int, K: int, R: int, Ns: tuple[int, ...], dtype: torch.dtype, by_rows: bool = True):
    """dys, weights, g, downs of layers that share x"""
    weights = [draw(N, K, seed=N, dtype=dtype) for N in Ns]
    if not by_rows:
        weights = [weight.T.contiguous().T for weight in weights]
    dys = [draw(M, N, seed=N + 1, dtype=dtype) for N in Ns]
    return dys, weights, draw(M, R * len(Ns), seed=3, dtype=dtype), [draw(R, K, seed=4 + i) for i in range(len(Ns))]


@pytest.mark.parametrize("Ns, R, count", [((8, 24), 4, 1), ((16, 8, 8), 8, 1), ((8,) * 5, 2, 2), ((8, 8, 8), 64, 2)])
@pytest.mark.parametrize("by_rows", [True, False])
@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("descriptors", [False, True])
def test_siblings_share_an_accumulator(Ns, R, count, by_rows, p, descriptors, launches):
    """One launch for three products of at most 128 ranks; the sum is that of float64 rounded once."""
    operands = siblings(21, 40, R, Ns, torch.bfloat16, by_rows)
    wide = [[t.double() for t in part] if isinstance(part, list) else part.double() for part in operands]
    expected, _ = reference.dx_and_ddown(*wide, None, p, SEED)
    row = "matmul_lowrank" + ("_t" if by_rows else "") + ("_descriptor" if descriptors else "")
    with tiles.forced(row, BLOCK_M=16, BLOCK_N=32, BLOCK_K=16):
        dx, _ = fused.dx_and_ddown(*operands, None, p, SEED)
    assert launches == ["matmul_lowrank_descriptor" if descriptors else "matmul_lowrank"] * count
    slack = count * 2**-8 * expected.abs().max()  # a rounding of each launch
    assert (dx.double() - expected).abs().max() <= slack


def test_siblings_some_of_which_have_no_gradient_or_another_layout():
    dys, weights, g, downs = siblings(9, 12, 4, (8, 16, 8), torch.float32)
    for absent in ((0,), (1,), (0, 1, 2), ()):
        some = [None if i in absent else dy for i, dy in enumerate(dys)]
        mixed = [weight if i else weight.T.contiguous().T for i, weight in enumerate(weights)]
        for given in (weights, mixed):
            dx, _ = fused.dx_and_ddown(some, given, g, downs, None)
            expected, _ = reference.dx_and_ddown(some, given, g, downs, None)
            torch.testing.assert_close(dx, expected, rtol=1e-5, atol=1e-4)


def test_sm_100_adds_up_one_product_a_launch(monkeypatch):
    """Of a second loop Triton drops the stores there."""
    most = {}
    for arch in (80, 90, 100, 103, 120):
        monkeypatch.setattr(tiles, "arch_of", lambda device, arch=arch: arch)
        most[arch] = matmul_lowrank.most_pairs(torch.device("cpu"))
    assert most == {80: 3, 90: 3, 100: 1, 103: 1, 120: 3}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_launches_of_a_backward_pass(count, p, launches, monkeypatch):
    """Of n siblings: n sweeps, dx, ddown; no sum and no mask has a launch of its own."""
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    M, K, N, R = 300, 40, 24, 4
    x, h = draw(M, K, dtype=torch.bfloat16), draw(M, R * count, dtype=torch.bfloat16)
    dys, weights, _, downs = siblings(M, K, R, (N,) * count, torch.bfloat16)
    ups = [draw(N, R, seed=i) for i in range(count)]
    dtypes = [torch.float32] * (2 * count)
    saved = Saved(x, h, SEED if p else None, weights, downs, ups, dtypes)
    need = [True] + [False] * (2 * count) + [True] * (2 * count)
    with tiles.forced("outer", BLOCK_M=16, BLOCK_K=32), tiles.forced("project_outer", BLOCK_M=16, BLOCK_K=32):
        gradients(Call(count, p=p), saved, need, dys, None, dispatch.Route(fused))
    assert launches == ["project_outer"] * count + ["matmul_lowrank", "outer"]


@pytest.mark.parametrize("M, K", [(1, 7), (300, 66), (513, 40)])
def test_tickets_are_left_as_they_were(M, K, monkeypatch):
    """Zero, for the next launch of the stream; and the sums are the strips' in their order, to the bit."""
    counters: list[torch.Tensor] = []

    def tickets(count, like):
        counters.append(torch.zeros(count, dtype=torch.int32))
        return counters[-1]

    monkeypatch.setattr(tl_utils, "tickets", tickets)
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    x, up, h = draw(M, K), draw(K, 8, seed=1), draw(M, 8, seed=2)
    with tiles.forced("outer", BLOCK_M=16, BLOCK_K=16), tiles.forced("project_outer", BLOCK_M=16, BLOCK_K=16):
        out, (g, swept) = fused.outer(h, x), fused.project_outer(x, up, h, 0.5)
        strips, steps = sums.strips_of(M, 16, -(-K // 16))
        parts = [fused.outer(h[i : i + 16 * steps], x[i : i + 16 * steps]) for i in range(0, M, 16 * steps)]
    assert len(parts) == strips and counters and not any(each.any() for each in counters)
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    assert torch.equal(out, total)
    torch.testing.assert_close(swept, reference.outer(h, x).T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(g, reference.project(x, up.T, 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("M, K", [(0, 4), (3, 0), (1, 1), (17, 131), (40, 128)])
@pytest.mark.parametrize("p", [2**-15, 0.25, 1 - 2**-15])
def test_the_mask_is_one_launch_and_the_reference_s(M, K, p, launches):
    bits = fused.keep_bits(SEED, p, M, K)
    assert bits.dtype == torch.int16 and torch.equal(bits, reference.keep_bits(SEED, p, M, K))
    assert launches == ["keep_bits"] * bool(M * K)


def test_blas_takes_the_mask_from_the_kernel_and_makes_it_itself_where_that_fails(launches, monkeypatch):
    monkeypatch.setitem(blas.MASK_MAKERS, "cpu", dispatch.keep_bits)
    x, down = draw(9, 12), draw(4, 12, seed=1)
    expected = reference.project(x, down, 1.0, 0.25, SEED)
    torch.testing.assert_close(blas.project(x, down, 1.0, 0.25, SEED), expected)
    assert launches == ["keep_bits"]

    def broken(*_):
        raise tl_utils.LaunchError("keep_bits")

    monkeypatch.setattr(dispatch.kernels, "keep_bits", broken)
    monkeypatch.setattr(blas, "MASK_MAKERS", dict(blas.MASK_MAKERS))
    with pytest.warns(UserWarning, match="masks is not used any more: keep_bits"):
        torch.testing.assert_close(blas.project(x, down, 1.0, 0.25, SEED), expected)
    assert not blas.MASK_MAKERS
