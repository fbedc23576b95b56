"""The Triton kernels against float64 and against the reference; in Triton's interpreter where CUDA is absent."""

from __future__ import annotations

import contextlib
import inspect
import math
import tempfile

import pytest
import torch
from helpers import assert_as_good_as_eager
from kernel_plans import PLANS, TILES, fitted, on_kernels

from forgetless.ops import reference
from forgetless.ops.autograd import lowrank_linear
from forgetless_kernels import fused, matmul_lowrank, sums, tiles, tl_utils

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANKS = (1, 4, 8, 16, 24, 64, 128, 200)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = ((1, 1, 1), (1, 17, 33), (33, 65, 17), (64, 64, 64), (70, 50, 130))
P = 0.25


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen).to(DEVICE, dtype)


def seeds(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


SEED = (-1234567, 89)


def plain(function: str, *tensors: torch.Tensor | None, scale: float = 1.0, keep: torch.Tensor | None = None):
    """The formula in one dtype: eager PyTorch as people write it, or the truth when the tensors are float64"""
    if function == "project":
        x, down = tensors
        x = x if keep is None else x * keep
        return scale * (x @ down.to(x.dtype).T)
    if function == "matmul_lowrank":
        x, weight, h, up, bias = tensors
        low = h @ up.to(x.dtype).T
        low = low if keep is None else low * keep
        return torch.nn.functional.linear(x, weight, bias) + low
    g, x = tensors
    return g.T @ (x if keep is None else x * keep)


def check(function: str, *tensors, scale: float = 1.0, p: float = 0.0, **options) -> None:
    """One launcher on these tensors is as good as eager"""
    first, last = tensors[0], tensors[1]
    shape = {
        "project": first.shape,
        "matmul_lowrank": (first.shape[0], last.shape[0]),
        "outer": last.shape,
    }[function]
    seed = seeds(*SEED) if p else None
    keep = reference.keep_mask(seed, p, *shape) if p else None
    kwargs = {"scale": scale} if function == "project" else {}
    ours = getattr(fused, function)(*tensors, **kwargs, p=p, seed=seed, **options)
    # eager works on copies: torch's own CPU linear returns NaN when NaN surrounds a strided bfloat16 operand
    eager = plain(function, *[t if t is None else t.contiguous().clone() for t in tensors], scale=scale, keep=keep)
    truth = plain(function, *[t if t is None else t.double() for t in tensors], scale=scale, keep=keep)
    assert_as_good_as_eager(ours, eager.to(ours.dtype), truth)


def operands(function: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> list[torch.Tensor]:
    if function == "project":
        return [draw(M, K, dtype=dtype), draw(R, K) / K**0.5]
    if function == "matmul_lowrank":
        x, weight = draw(M, K, dtype=dtype), draw(N, K, dtype=dtype, seed=1)
        return [x, weight, draw(M, R, dtype=dtype, seed=2), draw(N, R, seed=3), draw(N, dtype=dtype, seed=4)]
    return [draw(M, R, dtype=dtype), draw(M, K, dtype=dtype, seed=1)]


FUNCTIONS = ("project", "matmul_lowrank", "outer")
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.mark.parametrize("function", [*FUNCTIONS, "project_outer", "linear_lowrank", "dx_and_ddown", "keep_bits"])
def test_signatures_are_the_reference_s(function):
    assert inspect.signature(getattr(fused, function)) == inspect.signature(getattr(reference, function))


@every_function
@pytest.mark.parametrize("R", RANKS)
def test_any_rank(function, R):
    check(function, *operands(function, 33, 50, 65, R, torch.bfloat16), p=P)


@every_function
@pytest.mark.parametrize("M, N, K", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_size_and_dtype(function, M, N, K, dtype):
    check(function, *operands(function, M, N, K, 8, dtype))


@every_function
def test_no_rows(function):
    ours = operands(function, 0, 20, 33, 8, torch.bfloat16)
    out = getattr(fused, function)(*ours)
    want = getattr(reference, function)(*ours)
    assert out.shape == want.shape and out.dtype == want.dtype and torch.equal(out, want)


def restride(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides"""
    if t.dim() == 1:
        return t.repeat_interleave(3)[::3]
    if how == "transposed":
        return t.T.contiguous().T
    wide = torch.full((2 * t.shape[0] + 3, 3 * t.shape[1] + 5), float("nan"), device=t.device, dtype=t.dtype)
    view = wide[2:-1:2, 4:-1:3]
    view.copy_(t)
    return view


@every_function
@pytest.mark.parametrize("how", ["transposed", "sliced"])
@pytest.mark.parametrize("which", range(5))
def test_any_strides(function, how, which):
    tensors = operands(function, 33, 50, 65, 24, torch.bfloat16)
    if which >= len(tensors):
        tensors = [restride(t, how) for t in tensors]
    else:
        tensors[which] = restride(tensors[which], how)
    check(function, *tensors, p=P)


@every_function
@pytest.mark.parametrize("axis", [0, 1])
def test_expanded_tensors(function, axis):
    tensors = operands(function, 33, 50, 65, 8, torch.float32)
    size = tensors[0].shape
    tensors[0] = tensors[0].narrow(axis, 0, 1).expand(size)
    check(function, *tensors)


@contextlib.contextmanager
def guarded(tensors, monkeypatch, contiguous=False):
    """Yields the tensors with NaN around each; then checks the sentinel around all that was allocated meanwhile.

    ``contiguous``: what is allocated has guards before and after it only, as the kernels of a whole pass need.
    """
    buffers, guard = [], 39

    def padded(shape: tuple[int, ...], fill: float, dtype: torch.dtype) -> torch.Tensor:
        buffer = torch.full([guard + n + guard for n in shape], fill, dtype=dtype, device=DEVICE)
        buffers.append((buffer, shape))
        return buffer[tuple(slice(guard, guard + n) for n in shape)]

    def empty(shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        if contiguous:
            nonlocal guard
            guard = 1 << 14  # elements, more than any tile has
            return padded((math.prod(shape),), -77.0, dtype).view(shape)
        return padded(tuple(shape), -77.0, dtype)

    tensors = [padded(tuple(t.shape), float("nan"), t.dtype).copy_(t) for t in tensors]
    del buffers[:]
    monkeypatch.setattr(tl_utils, "empty", empty)
    yield tensors
    assert buffers
    for buffer, shape in buffers:
        inside = torch.zeros_like(buffer, dtype=torch.bool)
        inside[tuple(slice(guard, guard + n) for n in shape)] = True
        assert (buffer[~inside] == -77.0).all()


@every_function
def test_nothing_beside_the_operands_is_touched(function, monkeypatch):
    """Guard pages: NaN around what is read, a sentinel around what is written."""
    with guarded(operands(function, 33, 50, 65, 24, torch.bfloat16), monkeypatch) as tensors:
        with tiles.forced(function, BLOCK_M=16):  # several strips
            check(function, *tensors, p=P)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("plan", ["project_outer", *fused.PLANS])
def test_nothing_beside_the_operands_of_a_whole_pass_is_touched(plan, dtype, monkeypatch):
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    x, weight, h, up, bias = operands("matmul_lowrank", 33, 50, 65, 24, dtype)
    down = draw(24, 65) / 65**0.5
    sweep = plan == "project_outer"
    with guarded(
        [x, draw(65, 24), h] if sweep else [x, weight, down, up, bias], monkeypatch, contiguous=True
    ) as tensors:
        if sweep:
            results = fused.project_outer(*tensors)
        else:
            results = fused.linear_lowrank(*tensors, 0.5, P, seeds(*SEED), plan=plan)
        assert all(t.isfinite().all() for t in results)


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("M, K", [(1, 1), (33, 65)])
def test_masks_are_bit_exact(p, M, K):
    for values in ((0, 0), SEED, (2**31 - 1, -(2**31))):
        seed = seeds(*values)
        want = reference.keep_mask(seed, p, M, K).float()
        ones = torch.ones(M, K, device=DEVICE)
        assert torch.equal(fused.project(ones, torch.eye(K, device=DEVICE), p=p, seed=seed), want)
        assert torch.equal(fused.outer(torch.eye(M, device=DEVICE), ones, p=p, seed=seed), want)
        col = torch.ones(M, 1, device=DEVICE), torch.ones(K, 1, device=DEVICE)
        zero = torch.zeros(M, 3, device=DEVICE), torch.zeros(K, 3, device=DEVICE)
        assert torch.equal(fused.matmul_lowrank(*zero, *col, p=p, seed=seed), want)


def test_low_precision_factors_gradients_come_in_the_dtype_asked_for():
    g, x = operands("outer", 70, 0, 65, 8, torch.bfloat16)
    out = fused.outer(g, x, dtype=torch.float32)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, (g.double().T @ x.double()).float(), rtol=1e-5, atol=1e-5)


def test_a_large_bias_costs_no_precision():
    x, weight, h, up, bias = operands("matmul_lowrank", 33, 50, 65, 8, torch.bfloat16)
    check("matmul_lowrank", x, weight, h, up, bias + 50)
    check("matmul_lowrank", x, weight, h, up, None)


@every_function
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_any_tile(function, tile):
    with tiles.forced(function, **fitted(function, **tile)):
        check(function, *operands(function, 70, 50, 90, 24, torch.float32), p=P)


def test_a_forced_tile_ends_with_its_block():
    before = tiles.tile_for("outer", torch.device(DEVICE), 2, 16)
    with tiles.forced("outer", BLOCK_M=16), tiles.forced("project", BLOCK_M=128):
        assert tiles.tile_for("outer", torch.device(DEVICE), 2, 16)["BLOCK_M"] == 16
    assert tiles.tile_for("outer", torch.device(DEVICE), 2, 16) == before


def test_an_unknown_card_gets_a_relative_s_tile_or_the_safe_one():
    relatives = {80: 80, 87: 86, 90: 90, 103: 100, 121: 120, 75: 0, 70: 0, 110: 0}
    assert {arch: tiles.known_arch(arch) for arch in relatives} == relatives
    for kernel in tiles.TABLE:
        assert tiles.row(kernel, 75, 2).BLOCK_M <= 64


@every_function
def test_two_runs_give_the_same_bits(function):
    tensors = operands(function, 130, 50, 65, 8, torch.float32)
    with tiles.forced(function, BLOCK_M=16):
        runs = [getattr(fused, function)(*tensors, p=P, seed=seeds(*SEED)) for _ in range(2)]
    assert torch.equal(*runs)


def test_rows_sum_alike_on_every_card():
    """Strips depend on sizes alone; they cover every row once."""
    for M in (1, 63, 512, 8192, 100_000):
        for columns in (1, 8, 32, 1000):
            strips, steps = sums.strips_of(M, 64, columns)
            assert strips * steps * 64 >= M > (strips - 1) * steps * 64


@contextlib.contextmanager
def descriptors_forced(monkeypatch, **tile):
    """matmul_lowrank on descriptors, on any device; yields the calls that took that way"""
    calls = []

    plain = matmul_lowrank._matmul_lowrank_descriptor_kernel

    class Spy:
        def __getitem__(self, grid):
            calls.append(grid)
            return plain[grid]

        def __getattr__(self, name):  # what a launcher asks of a kernel that is compiled
            return getattr(plain, name)

    monkeypatch.setattr(matmul_lowrank, "_matmul_lowrank_descriptor_kernel", Spy())
    with (
        tiles.forced("matmul_lowrank_descriptor", **tile),
        tiles.forced("matmul_lowrank_t_descriptor", **tile),
    ):
        yield calls


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(1, 8, 16, 1), (70, 56, 88, 24), (33, 128, 64, 128)])
@pytest.mark.parametrize("p", [0.0, P])
def test_descriptors(M, N, K, R, transposed, p, monkeypatch):
    x, weight, h, up, bias = operands("matmul_lowrank", M, N, K, R, torch.bfloat16)
    weight = restride(weight, "transposed") if transposed else weight
    with descriptors_forced(monkeypatch, BLOCK_M=32, BLOCK_N=32, BLOCK_K=32) as calls:
        check("matmul_lowrank", x, weight, h, up, bias, p=p)
    assert len(calls) == 1


@pytest.mark.parametrize("which", range(2))
def test_what_no_descriptor_can_name_takes_the_pointer_kernel(which, monkeypatch):
    tensors = operands("matmul_lowrank", 33, 48, 64, 8, torch.bfloat16)
    tensors[which] = restride(tensors[which], "sliced")
    with descriptors_forced(monkeypatch) as calls:
        check("matmul_lowrank", *tensors)
        check("matmul_lowrank", *operands("matmul_lowrank", 33, 50, 65, 8, torch.bfloat16))
        check("matmul_lowrank", *operands("matmul_lowrank", 33, 48, 64, 8, torch.float32))
        check("matmul_lowrank", *operands("matmul_lowrank", 33, 48, 64, 200, torch.bfloat16))
    assert not calls


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_sweep_projects_and_sums(R, dtype, monkeypatch):
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    dy, up, h = draw(70, 50, dtype=dtype), draw(50, R), draw(70, R, dtype=dtype, seed=1)
    with tiles.forced("project_outer", BLOCK_M=16, BLOCK_K=32):
        g, dup = fused.project_outer(dy, up, h, 0.5, torch.float32)
    truth = [t.double() for t in (dy, up.T, h)]
    assert_as_good_as_eager(g, plain("project", dy, up.T, scale=0.5), plain("project", *truth[:2], scale=0.5))
    exact = plain("outer", truth[2], truth[0]).T
    torch.testing.assert_close(dup, exact.float(), rtol=1e-5, atol=1e-4)
    if R <= 64:
        assert dup.is_contiguous()


@pytest.mark.parametrize("M", [0, 1, 33])
def test_a_sweep_that_does_not_pay_is_two(M):
    dy, up, h = draw(M, 40), draw(40, 8), draw(M, 8)
    g, dup = fused.project_outer(dy, up, h, 0.5)
    torch.testing.assert_close(g, reference.project(dy, up.T, 0.5), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dup, reference.outer(h, dy).T, rtol=1e-5, atol=1e-5)


def test_a_sweep_reads_strided_gradients(monkeypatch):
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    dy, up, h = draw(70, 90), draw(90, 24), draw(70, 24)
    want = reference.project(dy, up.T), reference.outer(h, dy).T
    for how in ("transposed", "sliced"):
        ours = fused.project_outer(*[restride(t, how) for t in (dy, up, h)])
        torch.testing.assert_close(ours, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", fused.PLANS)
@pytest.mark.parametrize("drop_output", [False, True])
@pytest.mark.parametrize("M, N, K, R", [(1, 1, 1, 1), (40, 50, 45, 24), (33, 70, 17, 128), (40, 20, 30, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_plan_is_the_same_layer(plan, drop_output, M, N, K, R, dtype):
    x, weight, _, up, bias = operands("matmul_lowrank", M, N, K, R, dtype)
    down, seed, scale = draw(R, K) / K**0.5, seeds(*SEED), 0.5
    with tiles.forced(plan, BLOCK_M=32, BLOCK_N=32, BLOCK_K=16) if plan != "split" else contextlib.nullcontext():
        y, h = fused.linear_lowrank(x, weight, down, up, bias, scale, P, seed, drop_output=drop_output, plan=plan)
    keep = reference.keep_mask(seed, P, M, N if drop_output else K)
    keep_x, keep_y = (None, keep) if drop_output else (keep, None)

    def layer(x, weight, down, up, bias):
        h = plain("project", x, down, scale=scale, keep=keep_x)
        return plain("matmul_lowrank", x, weight, h, up, bias, keep=keep_y), h

    eager = layer(x, weight, down, up, bias)
    truth = layer(*[t.double() for t in (x, weight, down, up, bias)])
    for ours in zip((y, h), eager, truth, strict=True):
        assert_as_good_as_eager(*ours)


@pytest.mark.parametrize("plan", fused.PLANS)
def test_every_plan_keeps_to_its_operands(plan, monkeypatch):
    """Any strides, NaN in between, no bias; twice the same bits."""
    x, weight, _, up, _ = operands("matmul_lowrank", 70, 50, 60, 24, torch.bfloat16)
    args = [restride(t, "sliced") for t in (x, weight, draw(24, 60), up)]
    runs = [fused.linear_lowrank(*args, None, 0.5, P, seeds(*SEED), plan=plan) for _ in range(2)]
    h = reference.project(x, draw(24, 60), 0.5, P, seeds(*SEED))
    torch.testing.assert_close(runs[0][0], reference.matmul_lowrank(x, weight, h, up), rtol=2e-2, atol=2e-1)
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


# ------------------------------------------------------------------------------ forward and backward, every plan


def layer(M: int, N: int, K: int, R: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Leaves x, weight, down, up, bias; the factors in float32"""
    x, weight, _, up, bias = operands("matmul_lowrank", M, N, K, R, dtype)
    down = draw(R, K, seed=5) / K**0.5
    return {"x": x, "weight": weight, "down": down, "up": up, "bias": bias}


def with_gradients(run, leaves: dict[str, torch.Tensor], dy: torch.Tensor) -> dict[str, torch.Tensor]:
    """y and the gradient of every leaf, by name"""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in leaves.items()}
    y = run(**leaves)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{f"d{name}": t.grad for name, t in leaves.items()}}


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize(
    "plan, dtype", [(p, d) for p in PLANS for d in DTYPES if p != "descriptors" or d.itemsize == 2], ids=str
)
def test_every_gradient_of_every_plan(plan, dtype, dropout, monkeypatch):
    M, N, K, R, scale, seed = 24, 64, 40, 8, 0.5, seeds(*SEED)
    leaves, dy = layer(M, N, K, R, dtype), draw(M, N, dtype=dtype, seed=6)
    keep = reference.keep_mask(seed, dropout, M, K)

    def ours(x, weight, down, up, bias):
        return lowrank_linear(x, weight, down, up, bias, scale, dropout, seed if dropout else None)

    def plainly(x, weight, down, up, bias):
        h = plain("project", x, down, scale=scale / (1 - dropout), keep=keep)
        return plain("matmul_lowrank", x, weight, h, up, bias)

    with on_kernels(plan, monkeypatch):
        found = with_gradients(ours, leaves, dy)
    eager = with_gradients(plainly, leaves, dy)
    truth = with_gradients(plainly, {name: t.double() for name, t in leaves.items()}, dy)
    for name, value in found.items():
        assert_as_good_as_eager(value, eager[name], truth[name])


@contextlib.contextmanager
def backwards(monkeypatch):
    """In the interpreter the programs of a launch run last to first; a card takes whatever order it likes"""
    if DEVICE == "cpu":
        from triton.runtime.interpreter import InterpreterBuilder

        at = InterpreterBuilder.set_grid_idx

        def from_the_end(self, x, y, z):
            at(self, *(n - 1 - i for n, i in zip(self.grid_dim, (x, y, z), strict=True)))

        monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", from_the_end)
    yield


@pytest.mark.parametrize("plan", PLANS)
def test_the_same_bits_whatever_the_order_of_programs(plan, monkeypatch):
    """Forward and backward with dropout, several strips of rows; on no plan does a sum depend on scheduling."""
    leaves, dy = layer(72, 64, 40, 8, torch.bfloat16), draw(72, 64, dtype=torch.bfloat16, seed=6)

    def run(x, weight, down, up, bias):
        return lowrank_linear(x, weight, down, up, bias, 0.5, P, seeds(*SEED))

    with on_kernels(plan, monkeypatch):
        first, again = (with_gradients(run, leaves, dy) for _ in range(2))
        with backwards(monkeypatch):
            other_way = with_gradients(run, leaves, dy)
    for name, value in first.items():
        assert torch.equal(value, again[name]) and torch.equal(value, other_way[name]), name


@pytest.mark.parametrize("plan", ["descriptors", "full", "once"])
@pytest.mark.parametrize("R", RANKS)
def test_any_rank_in_every_plan(R, plan, monkeypatch):
    M, N, K = 13, 64, 40
    x, weight, down, up, bias = layer(M, N, K, R, torch.bfloat16).values()
    with on_kernels(plan, monkeypatch):
        y, h = fused.linear_lowrank(
            x, weight, down, up, bias, 0.5, plan="split" if plan == "descriptors" else plan
        )  # fmt: skip

    def plainly(x, weight, down, up, bias):
        h = plain("project", x, down, scale=0.5)
        return plain("matmul_lowrank", x, weight, h, up, bias), h

    eager, truth = (plainly(*map(as_one, (x, weight, down, up, bias))) for as_one in (lambda t: t, torch.Tensor.double))
    for found in zip((y, h), eager, truth, strict=True):
        assert_as_good_as_eager(*found)


def far(t: torch.Tensor, axis: int, folder) -> torch.Tensor:
    """The same values 2**30 elements apart along one axis, in a file that is nearly all hole.

    It starts 2**31 elements before them, so that an offset in 32 bits reads a hole and not another's memory.
    """
    step = (1 << 30) + 8
    rows, columns = t.shape
    stride = (step, 1) if axis == 0 else (1, step)
    span = (1 << 31) + step * max(rows, columns)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.truncate(span * t.element_size())
        hole = torch.from_file(file.name, shared=True, size=span, dtype=t.dtype)
    return hole.as_strided(t.shape, stride, 1 << 31).copy_(t)


@pytest.mark.skipif(DEVICE != "cpu", reason="the matrices lie in sparse files")
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("function", [*FUNCTIONS, "project_outer", "full", "once"])
def test_offsets_beyond_32_bits(function, axis, tmp_path, monkeypatch):
    """M, N, K and R of 4: the last row, or column, starts 3 * 2**30 elements after the first."""
    from triton.runtime.interpreter import GridExecutor

    # it would copy every byte of every storage onto itself
    monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    monkeypatch.setattr(sums, "sweep_pays", lambda *sizes: True)
    x, weight, h, up, bias = operands("matmul_lowrank", 4, 4, 4, 4, torch.bfloat16)
    down = draw(4, 4)
    given = {
        "project": (x, down), "matmul_lowrank": (x, weight, h, up, bias), "outer": (h, x), "project_outer": (x, up, h)
    }.get(function, (x, weight, down, up, bias))  # fmt: skip
    options = {"plan": function} if function in fused.PLANS else {}
    name = "linear_lowrank" if options else function
    want = getattr(reference, name)(*given, **options)
    if function in FUNCTIONS:  # the others lay their results out themselves
        plain = tl_utils.empty

        def empty(shape, dtype, like):  # results are matrices; sums and counters are scratch
            return (
                far(torch.zeros(shape, dtype=dtype), axis, tmp_path) if len(shape) == 2 else plain(shape, dtype, like)
            )

        monkeypatch.setattr(tl_utils, "empty", empty)
    found = getattr(fused, name)(*[far(t, axis, tmp_path) if t.dim() == 2 else t for t in given], **options)
    torch.testing.assert_close(found, want, rtol=2e-2, atol=2e-2)


needs_cuda = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")


@needs_cuda
@every_function
def test_captured_in_a_graph(function):
    tensors = operands(function, 130, 50, 65, 8, torch.bfloat16)
    want = getattr(fused, function)(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = getattr(fused, function)(*tensors)
    graph.replay()
    assert torch.equal(out, want)


@needs_cuda
@every_function
def test_the_last_device_and_another_stream(function):
    last = f"cuda:{torch.cuda.device_count() - 1}"
    tensors = [t.to(last) for t in operands(function, 130, 50, 65, 8, torch.bfloat16)]
    want = getattr(fused, function)(*tensors)
    stream = torch.cuda.Stream(last)
    stream.wait_stream(torch.cuda.current_stream(last))
    with torch.cuda.stream(stream):
        again = getattr(fused, function)(*tensors)
    stream.synchronize()
    assert torch.equal(again, want)
