"""The kernels of stacks of experts against float64, one expert after another; ragged, empty, of any rank and dtype."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from helpers import assert_as_good_as_eager

from forgetless.ops import reference
from forgetless.ops.grouped import Rows, sort_rows
from forgetless_kernels import fused, tiles, tl_utils

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
RANKS = (1, 4, 16, 24, 64, 128, 200)
P = 0.25
#: rows of each expert: ragged and empty ones; one has all; blocks that are just full; a single row
SPLITS = ([5, 0, 17, 1, 0], [0, 0, 40, 0], [16, 32, 16], [1], [0, 31, 33])


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen).to(DEVICE, dtype)


def rows_of(counts: list[int], tokens: int | None = None) -> Rows:
    """Rows of so many tokens, one row each or several, shared out among the experts as ``counts`` says"""
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    shuffled = experts[torch.randperm(len(experts), generator=torch.Generator().manual_seed(1))]
    return sort_rows(shuffled.view(tokens or len(experts), -1).to(DEVICE), len(counts))


def seeds_of(E: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(2)
    return torch.randint(-(1 << 31), (1 << 31) - 1, (E, 2), dtype=torch.int32, generator=gen).to(DEVICE)


def plain(function: str, rows: Rows, tensors: list[torch.Tensor | None], p: float, by_token: bool) -> torch.Tensor:
    """The formula in one dtype: eager PyTorch, or the truth when the tensors are float64"""
    seeds, E = seeds_of(len(rows.counts)), len(rows.counts)
    x = tensors[1] if function == "grouped_outer" else tensors[0]
    x = x[rows.tokens] if by_token else x
    parts = []
    for e, part in zip(range(E), torch.arange(len(rows.tokens)).split(rows.counts), strict=True):
        if function == "grouped_project":
            own = x[part] * keep(seeds[e], p, *x[part].shape) if p else x[part]
            parts.append(0.5 * (own @ tensors[1][e].to(x.dtype).T))
        elif function == "grouped_matmul_lowrank":
            _, weight, h, up, bias = tensors
            low = h[part] @ up[e].to(x.dtype).T
            low = low * keep(seeds[e], p, *low.shape) if p else low
            y = x[part] @ weight[e].to(x.dtype).T
            parts.append((y if bias is None else y + bias[e].to(x.dtype)) + low)
        else:
            own = x[part] * keep(seeds[e], p, *x[part].shape) if p else x[part]
            parts.append(tensors[0][part].T @ own)
    return torch.stack(parts) if function == "grouped_outer" else torch.cat(parts)


def keep(seed: torch.Tensor, p: float, M: int, K: int) -> torch.Tensor:
    return reference.keep_mask(seed, p, M, K)


def operands(function: str, rows: Rows, N: int, K: int, R: int, dtype: torch.dtype, by_token: bool):
    S, E = len(rows.tokens), len(rows.counts)
    x = draw(rows.size if by_token else S, K, dtype=dtype)
    if function == "grouped_project":
        return [x, draw(E, R, K) / K**0.5]
    if function == "grouped_matmul_lowrank":
        weight, bias = draw(E, N, K, dtype=dtype, seed=1), draw(E, N, dtype=dtype, seed=4)
        return [x, weight, draw(S, R, dtype=dtype, seed=2), draw(E, N, R, seed=3), bias]
    return [draw(S, R, dtype=dtype, seed=5), x]


def run(function: str, rows: Rows, tensors: list, p: float, by_token: bool, module=fused, **options) -> torch.Tensor:
    more = {"p": p, "seeds": seeds_of(len(rows.counts)) if p else None, "by_token": by_token, **options}
    if function == "grouped_project":
        return module.grouped_project(*tensors, rows, 0.5, **more)
    if function == "grouped_matmul_lowrank":
        return module.grouped_matmul_lowrank(*tensors[:4], rows, tensors[4], **more)
    return module.grouped_outer(*tensors, rows, **more)


def check(function: str, rows: Rows, tensors: list, p: float = 0.0, by_token: bool = False, **options) -> None:
    """One launcher on these tensors is as good as eager"""
    ours = run(function, rows, tensors, p, by_token, **options)
    eager = plain(function, rows, [t if t is None else t.contiguous() for t in tensors], p, by_token)
    truth = plain(function, rows, [t if t is None else t.double() for t in tensors], p, by_token)
    assert_as_good_as_eager(ours, eager.to(ours.dtype), truth)


FUNCTIONS = ("grouped_project", "grouped_matmul_lowrank", "grouped_outer")
every_function = pytest.mark.parametrize("function", FUNCTIONS)


@pytest.fixture(autouse=True)
def _small_tiles():
    """Several blocks of rows, of columns and of the sum"""
    with (
        tiles.forced("grouped_project", BLOCK_M=16, BLOCK_K=32),
        tiles.forced("grouped_matmul", BLOCK_M=16, BLOCK_N=32, BLOCK_K=32),
        tiles.forced("grouped_outer", BLOCK_M=16, BLOCK_K=32),
    ):
        yield


@every_function
@pytest.mark.parametrize("counts", SPLITS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_share_of_the_rows_and_any_dtype(function, counts, dtype):
    rows = rows_of(counts)
    check(function, rows, operands(function, rows, 50, 65, 8, dtype, False), P)


@every_function
@pytest.mark.parametrize("R", RANKS)
def test_any_rank(function, R):
    rows = rows_of([7, 0, 20, 3], tokens=15)
    check(function, rows, operands(function, rows, 40, 33, R, torch.bfloat16, True), P, by_token=True)


@every_function
@pytest.mark.parametrize("N, K", [(1, 1), (33, 17), (64, 64)])
def test_any_size_with_the_tiles_of_an_unknown_card(function, N, K):
    rows = rows_of([5, 0, 70, 1], tokens=38)
    with contextlib.ExitStack() as stack:
        for name in ("grouped_project", "grouped_matmul", "grouped_outer"):
            stack.enter_context(tiles.forced(name))
        check(function, rows, operands(function, rows, N, K, 8, torch.float32, True), by_token=True)


def test_one_row_more_or_less_is_never_lost():
    """Any share of S rows fits into S // BLOCK_M + E blocks."""
    gen = torch.Generator().manual_seed(0)
    for case in range(40):
        E = int(torch.randint(1, 9, (), generator=gen))
        sizes = torch.randint(0, [2, 18, 60][case % 3], (E,), generator=gen)
        counts = (sizes * (torch.rand(E, generator=gen) < 0.7)).tolist()
        if sum(counts):
            rows = rows_of(counts)
            h = fused.grouped_project(torch.ones(sum(counts), 1, device=DEVICE), _numbered(E), rows)
            expected = torch.repeat_interleave(torch.arange(E, dtype=torch.float32), torch.tensor(counts))
            assert torch.equal(h.cpu(), expected[:, None] + 1), counts


def _numbered(E: int) -> torch.Tensor:  # (E, 1, 1)
    return torch.arange(1.0, E + 1, device=DEVICE)[:, None, None]


@every_function
def test_any_strides(function):
    rows = rows_of([9, 0, 21, 4])
    tensors = operands(function, rows, 50, 65, 24, torch.bfloat16, False)
    for how in ("transposed", "sliced"):
        check(function, rows, [restride(t, how) for t in tensors], P)


def restride(t: torch.Tensor, how: str) -> torch.Tensor:
    """The same values with other strides, NaN in between"""
    if how == "transposed":
        return t.mT.contiguous().mT
    wide = torch.full([2 * n + 3 for n in t.shape], float("nan"), device=t.device, dtype=t.dtype)
    view = wide[tuple(slice(2, 2 + 2 * n, 2) for n in t.shape)]
    return view.copy_(t)


def test_no_product_no_rank_no_bias():
    """What the backward pass asks for: the frozen product alone, the low-rank product alone."""
    rows = rows_of([7, 0, 20, 3])
    x, weight, h, up, _ = operands("grouped_matmul_lowrank", rows, 40, 33, 8, torch.bfloat16, False)
    check("grouped_matmul_lowrank", rows, [x, weight, h[:, :0], up[..., :0], None])
    check("grouped_matmul_lowrank", rows, [x[:, :0], weight[..., :0], h, up, None], P)


def test_a_stack_in_float32_is_read_in_the_dtype_of_x():
    rows = rows_of([7, 0, 20, 3])
    tensors = operands("grouped_matmul_lowrank", rows, 40, 33, 8, torch.bfloat16, False)
    wide = [t.float() if i in (1, 4) else t for i, t in enumerate(tensors)]
    results = [run("grouped_matmul_lowrank", rows, some, 0.0, False) for some in (wide, tensors)]
    assert torch.equal(*results)


@every_function
def test_no_rows(function):
    rows = sort_rows(torch.empty(0, 2, dtype=torch.int64, device=DEVICE), 3)
    tensors = operands(function, rows, 20, 33, 8, torch.bfloat16, True)
    ours, twin = (run(function, rows, tensors, 0.0, True, module) for module in (fused, reference))
    assert ours.shape == twin.shape and ours.dtype == twin.dtype and torch.equal(ours, twin)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighed", [True, False])
@pytest.mark.parametrize("T, k, N", [(1, 1, 1), (9, 4, 300), (6, 3, 64)])
def test_the_rows_of_a_token_are_summed(T, k, N, weighed, dtype):
    index = torch.rand(T, 7, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :k].to(DEVICE)
    rows = sort_rows(index, 7)
    y, w = draw(T * k, N, dtype=dtype), draw(T * k, dtype=dtype, seed=1) if weighed else None
    out = fused.grouped_sum(y, rows, w)
    ordered = y.double() if w is None else y.double() * w.double()[:, None]
    truth = torch.zeros(T, N, dtype=torch.float64, device=DEVICE).index_add_(0, rows.tokens, ordered)
    eager = torch.zeros(T, N, dtype=dtype, device=DEVICE).index_add_(0, rows.tokens, y if w is None else y * w[:, None])
    assert_as_good_as_eager(out, eager, truth)
    torch.testing.assert_close(out, reference.grouped_sum(y, rows, w))


@every_function
def test_nothing_beside_the_operands_is_touched(function, monkeypatch):
    """Guard pages: NaN around what is read, a sentinel around what is written."""
    buffers, guard = [], 1 << 12

    def padded(shape, fill, dtype):
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * guard,), fill, dtype=dtype, device=DEVICE)
        buffers.append((buffer, count))
        return buffer[guard : guard + count].view(shape)

    rows = rows_of([7, 0, 20, 3])
    tensors = [
        padded(t.shape, float("nan"), t.dtype).copy_(t)
        for t in operands(function, rows, 50, 65, 24, torch.bfloat16, False)
    ]
    del buffers[:]
    monkeypatch.setattr(tl_utils, "empty", lambda shape, dtype, like: padded(shape, -77.0, dtype))
    check(function, rows, tensors, P)
    for buffer, count in buffers:
        assert (buffer[:guard] == -77.0).all() and (buffer[guard + count :] == -77.0).all()
    assert buffers


@every_function
def test_masks_are_bit_exact_and_each_expert_has_its_own(function):
    rows, E = rows_of([17, 0, 33, 1]), 4
    S, K = len(rows.tokens), 20
    masks = [keep(seed, P, n, K) for seed, n in zip(seeds_of(E), rows.counts, strict=True)]
    ones, eye = torch.ones(S, K, device=DEVICE), torch.eye(K, device=DEVICE).expand(E, K, K)
    if function == "grouped_project":
        made = 2 * run(function, rows, [ones, eye], P, False)
    elif function == "grouped_matmul_lowrank":
        column = torch.ones(S, 1, device=DEVICE), torch.ones(E, K, 1, device=DEVICE)
        made = run(function, rows, [ones[:, :0], eye[..., :0], *column, None], P, False)
    else:
        made = run(function, rows, [torch.ones(S, 1, device=DEVICE), ones], P, False)[:, 0]
        masks = [mask.sum(0, keepdim=True) for mask in masks]
    assert torch.equal(made, torch.cat(masks).float())


@every_function
def test_two_runs_give_the_same_bits(function):
    rows = rows_of([70, 0, 20, 3])
    tensors = operands(function, rows, 50, 65, 8, torch.float32, False)
    assert torch.equal(run(function, rows, tensors, P, False), run(function, rows, tensors, P, False))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
@every_function
def test_rows_of_x_are_read_in_place_and_of_the_stack_what_has_rows(function, meter):
    """By token, the kernel looks rows up: nothing is made but the result. Bytes are those of the formula."""
    counts, N, K, R, tile = [6, 0, 20, 4], 64, 32, 8, 16
    rows = rows_of(counts, tokens=15)
    blocks, S, E = sum(-(-count // tile) for count in counts), sum(counts), len(counts)
    tensors = operands(function, rows, N, K, R, torch.bfloat16, True)
    result = run(function, rows, tensors, 0.0, True)
    assert [t.shape for t in meter.made] == [result.shape] and len(meter.launches) == 1
    names = {
        "grouped_project": ("x", "down"),
        "grouped_matmul_lowrank": ("x", "weight", "h", "up", "bias"),
        "grouped_outer": ("g", "x"),
    }[function]
    named = {**dict(zip(names, tensors, strict=True)), "tokens": rows.tokens, "ends": rows.ends}
    loads, stores = meter.total(named, ["result"])
    columns = N // 32 if function == "grouped_matmul_lowrank" else 1  # of tiles
    padded = S if function == "grouped_outer" else blocks * tile
    assert loads["x"] == padded * K * 2 * columns and loads["tokens"] == padded * 8 * columns
    if function == "grouped_matmul_lowrank":
        assert loads["weight"] == blocks * N * K * 2 and stores == {"result": S * N * 2}
    elif function == "grouped_project":
        assert loads["down"] == blocks * 16 * K * 4 and stores == {"result": S * R * 2}
    else:
        assert loads["g"] == S * 16 * 2 and stores == {"result": E * R * K * 2}


def test_what_does_not_fit_is_refused_before_a_launch():
    rows = rows_of([6, 2])
    x, down = operands("grouped_project", rows, 16, 32, 8, torch.float32, False)
    for tensors in ([x[:-1], down], [x, down[..., 1:]], [x.double(), down]):
        with pytest.raises(tl_utils.LaunchError):
            fused.grouped_project(*tensors, rows)
