"""The BLAS backend against the reference: the same masks, as good as eager, nothing large beside the results."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from helpers import assert_as_good_as_eager
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from forgetless.ops import blas, reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
M, N, K, R = 50, 44, 67, 6
P = 0.25


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)


def seeds(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def operands(function: str, dtype: torch.dtype) -> dict[str, Tensor]:
    if function == "project":
        return {"x": draw(M, K, dtype=dtype), "down": draw(R, K) / K**0.5}
    if function == "matmul_lowrank":
        x, h = draw(M, K, dtype=dtype), draw(M, R, dtype=dtype, seed=2)
        return {
            "x": x,
            "weight": draw(N, K, dtype=dtype, seed=1),
            "h": h,
            "up": draw(N, R),
            "bias": draw(N, dtype=dtype),
        }
    return {"g": draw(M, R, dtype=dtype), "x": draw(M, K, dtype=dtype, seed=1)}


def eager(function: str, t: dict[str, Tensor], seed: Tensor | None) -> Tensor:
    """The formula as people write it, in the dtype of its operands."""

    def drop(a: Tensor) -> Tensor:
        return a if seed is None else a * reference.keep_mask(seed, P, *a.shape)

    if function == "project":
        return 0.7 * (drop(t["x"]) @ t["down"].to(t["x"].dtype).T)
    if function == "matmul_lowrank":
        low = drop(t["h"] @ t["up"].to(t["x"].dtype).T)
        return torch.nn.functional.linear(t["x"], t["weight"], t["bias"]) + low
    return t["g"].T @ drop(t["x"])


def call(function: str, t: dict[str, Tensor], seed: Tensor | None = None, **options: Any) -> Tensor:
    scale = {"scale": 0.7} if function == "project" else {}
    return getattr(blas, function)(**t, **scale, p=P if seed is not None else 0.0, seed=seed, **options)


every_function = pytest.mark.parametrize("function", ["project", "matmul_lowrank", "outer"])
dropout = pytest.mark.parametrize("seed", [None, (-5, 7)], ids=["no dropout", "dropout"])


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@dropout
def test_as_good_as_eager(function, dtype, seed):
    seed = seed and seeds(*seed)
    t = operands(function, dtype)
    truth = eager(function, {name: value.double() for name, value in t.items()}, seed)
    assert_as_good_as_eager(call(function, t, seed), eager(function, t, seed), truth)


@every_function
@dropout
def test_as_the_reference_in_double(function, seed):
    seed = seed and seeds(*seed)
    t = operands(function, torch.float64)
    scale = {"scale": 0.7} if function == "project" else {}
    want = getattr(reference, function)(**t, **scale, p=P if seed is not None else 0.0, seed=seed)
    torch.testing.assert_close(call(function, t, seed), want, rtol=1e-12, atol=1e-12)


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("how", ["transposed", "strided", "expanded"])
@dropout
def test_any_strides(function, dtype, how, seed):
    seed, plain = seed and seeds(*seed), operands(function, dtype)

    def restride(t: Tensor) -> Tensor:
        if t.dim() == 1 or how == "transposed":
            return t.mT.contiguous().mT if t.dim() == 2 else t
        if how == "expanded":
            return t[:1].expand_as(t)
        wide = t.new_full((2 * t.shape[0], 2 * t.shape[1] + 1), 7.0)
        wide[1::2, 1::2] = t
        return wide[1::2, 1::2]

    t = {name: restride(value) for name, value in plain.items()}
    want = call(function, {name: value.clone(memory_format=torch.contiguous_format) for name, value in t.items()}, seed)
    tol = 1e-12 if dtype == torch.float64 else 3e-2
    torch.testing.assert_close(call(function, t, seed), want, rtol=tol, atol=10 * tol)


@every_function
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@dropout
def test_operands_are_not_written(function, dtype, seed):
    t = operands(function, dtype)
    before = {name: value.clone() for name, value in t.items()}
    call(function, t, seed and seeds(*seed))
    assert all(torch.equal(t[name], value) for name, value in before.items())


@every_function
@dropout
def test_no_rows(function, seed):
    t = {name: v[:0] if name in ("x", "h", "g") else v for name, v in operands(function, torch.bfloat16).items()}
    out = call(function, t, seed and seeds(*seed))
    assert out.shape == {"project": (0, R), "matmul_lowrank": (0, N), "outer": (R, K)}[function]
    assert out.dtype == torch.bfloat16 and not out.any()


def test_outer_gives_the_dtype_asked_for():
    t = operands("outer", torch.bfloat16)
    for dtype in DTYPES:
        assert call("outer", t, dtype=dtype).dtype == dtype


class Allocations(TorchDispatchMode):
    """Bytes of every new storage that an operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in known:
                self.made.append(t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("bias", [True, False])
def test_one_large_tensor_is_made_and_it_is_the_result(bias):
    t = operands("matmul_lowrank", torch.float32)
    t["bias"] = t["bias"] if bias else None
    with Allocations() as allocations:
        call("matmul_lowrank", t)
    assert sum(size >= M * N * 4 for size in allocations.made) == 1
    for function in ("project", "outer"):
        t = operands(function, torch.float32)
        with Allocations() as allocations:
            call(function, t)
        assert not [size for size in allocations.made if size >= M * K * 4]


# ----------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("p", [0.0, 1e-5, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (33, 65), (700, 401), (2, 300_001)], ids=str)
def test_bits_are_the_reference_s_mask(p, shape):
    """Of odd widths and of more words than are made at a time, too."""
    for values in ((0, 0), (-5, 7), (2**31 - 1, -(2**31))):
        bits = blas.keep_bits(seeds(*values), p, *shape)
        assert bits.shape == shape
        assert torch.equal(bits, -reference.keep_mask(seeds(*values), p, *shape).to(bits.dtype))


def test_no_bits_for_no_rows():
    assert blas.keep_bits(seeds(1, 2), 0.5, 0, 7).shape == (0, 7)


@pytest.mark.parametrize("change", ["nothing", "seed", "p", "shape", "thread"])
def test_a_mask_is_reused_only_where_it_fits(change):
    """``matmul_lowrank`` leaves its mask to ``outer``: another seed, rate or shape makes another."""
    seed, p, width = seeds(3, 4), P, N
    t = operands("matmul_lowrank", torch.float64)
    blas.matmul_lowrank(**t, p=p, seed=seed)
    if change == "seed":
        seed = seeds(5, 6)
    elif change == "p":
        p = 0.5
    elif change == "shape":
        width = N - 3
    g, x = draw(M, R, dtype=torch.float64), draw(M, width, dtype=torch.float64)
    results: list[Tensor] = []
    if change == "thread":
        thread = threading.Thread(target=lambda: results.append(blas.outer(g, x, p, seed)))
        thread.start()
        thread.join()
    else:
        results.append(blas.outer(g, x, p, seed))
    torch.testing.assert_close(results[0], reference.outer(g, x, p, seed), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blas.outer(g, x, p, seed), results[0], rtol=1e-12, atol=1e-12)


def test_a_seed_changed_in_place_makes_another_mask():
    seed, t = seeds(3, 4), operands("matmul_lowrank", torch.float64)
    blas.matmul_lowrank(**t, p=P, seed=seed)
    seed.add_(1)
    g, x = draw(M, R, dtype=torch.float64), draw(M, N, dtype=torch.float64)
    torch.testing.assert_close(blas.outer(g, x, P, seed), reference.outer(g, x, P, seed), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_update_is_added_before_rounding(dtype):
    """The result is as good as the exact one rounded once; rounding the frozen part first is not."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 96).to(dtype), torch.randn(80, 96).to(dtype)
    h, up = torch.randn(64, 4).to(dtype), (0.01 * torch.randn(80, 4)).to(dtype)
    exact = x.double() @ weight.double().T + h.double() @ up.double().T
    added_after = torch.nn.functional.linear(x, weight) + h @ up.T

    def error(y):
        return (y.double() - exact).square().mean()

    once = error(exact.to(dtype))
    assert error(blas.matmul_lowrank(x, weight, h, up)) < 1.02 * once
    assert error(added_after) > 1.3 * once
