"""The functional op on all three backends: values, gradients, what it computes, what it keeps."""

from __future__ import annotations

import gc
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from helpers import assert_as_good_as_eager
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from forgetless.ops import blas, reference
from forgetless.ops import dispatch as ops
from forgetless.ops.autograd import lowrank_linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("reference", "blas", "triton")
NAMES = ("x", "weight", "down", "up", "bias")
P = 0.25
SEED = torch.tensor([12345, -6789], dtype=torch.int32, device=DEVICE)

pytestmark = pytest.mark.skipif(ops.kernels is None, reason="Triton is not installed")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Any:
    with ops.backend(request.param):
        yield request.param


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    gen = torch.Generator().manual_seed(seed + sum(i * n for i, n in enumerate(shape, 1)))
    return torch.randn(shape, generator=gen, dtype=torch.float64).to(DEVICE, dtype)


def operands(
    M: int = 7,
    N: int = 6,
    K: int = 9,
    R: int = 3,
    dtype: torch.dtype = torch.float32,
    factors: torch.dtype | None = None,
) -> dict[str, Tensor]:
    return {
        "x": draw(M, K, dtype=dtype),
        "weight": draw(N, K, dtype=dtype, seed=1) / K**0.5,
        "down": draw(R, K, dtype=factors or dtype, seed=2) / K**0.5,
        "up": draw(N, R, dtype=factors or dtype, seed=3) / R**0.5,
        "bias": draw(N, dtype=dtype, seed=4),
    }


def plain(
    x: Tensor,
    weight: Tensor,
    down: Tensor,
    up: Tensor,
    bias: Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y and h by the formula, for torch's own autograd, in the dtype of x."""
    dropped = x
    if seed is not None and dropout:
        p = round(dropout * reference.LEVELS) / reference.LEVELS
        keep = reference.keep_mask(seed, p, math.prod(x.shape[:-1]), x.shape[-1]).view(x.shape)
        dropped = x * keep / (1 - p)
    h = scale * linear(dropped, down.to(x.dtype))
    return linear(x, weight, bias) + linear(h, up.to(x.dtype)), h


def run(
    function: Any, tensors: dict[str, Tensor | None], dy: Tensor | None = None, only: Any = NAMES, **options: Any
) -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the gradients of the tensors named in ``only``, x among them always a leaf behind no copy."""
    leaves = {k: t if t is None else t.detach().requires_grad_(k in only) for k, t in tensors.items()}
    y = function(**leaves, **options)
    y = y[0] if isinstance(y, tuple) else y
    if not any(t is not None and t.requires_grad for t in leaves.values()):
        assert not y.requires_grad
        return y, {}
    y.backward(torch.ones_like(y) if dy is None else dy)
    return y.detach(), {k: t.grad for k, t in leaves.items() if t is not None and t.grad is not None}


def double(tensors: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {k: t if t is None else t.double() for k, t in tensors.items()}


def agree(tensors: dict[str, Tensor | None], dy: Tensor | None = None, tol: float = 2e-5, **options: Any) -> None:
    """Output and every gradient equal those of the formula in float64."""
    given = {k for k, t in tensors.items() if t is not None}
    y, grads = run(lowrank_linear, tensors, dy, **options)
    want, wants = run(plain, double(tensors), None if dy is None else dy.double(), **options)
    torch.testing.assert_close(y.double(), want, rtol=tol, atol=tol)
    assert grads.keys() == wants.keys() == given
    for name in given:
        assert grads[name].shape == tensors[name].shape and grads[name].dtype == tensors[name].dtype
        torch.testing.assert_close(
            grads[name].double(), wants[name], rtol=tol, atol=tol, msg=lambda m, n=name: f"{n}: {m}"
        )


# ------------------------------------------------------------------------------------ correctness


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("path", ["eager", "compiled"])
@pytest.mark.parametrize("name", ["reference", "blas"])
def test_gradcheck_in_double(name, path, dropout):
    """All five tensors, both outputs, outputs that get no gradient included."""

    def function(*t: Tensor) -> tuple[Tensor, Tensor]:
        if path == "eager":
            return lowrank_linear(*t, scale=0.7, dropout=dropout, seed=SEED, return_h=True)
        p = round(dropout * reference.LEVELS) / reference.LEVELS
        return torch.ops.forgetless.lowrank_linear(*t, SEED if dropout else None, [0.7 / (1 - p), 1.0, p])

    tensors = [t.requires_grad_() for t in operands(3, 4, 5, 2, torch.float64).values()]
    with ops.backend(name):
        assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_every_gradient_is_the_formula_s(backend, bias, dropout):
    tensors = operands()
    tensors["bias"] = tensors["bias"] if bias else None
    agree(tensors, draw(7, 6, seed=9), scale=1.7, dropout=dropout, seed=SEED)


@pytest.mark.parametrize("dropout", [0.0, P])
def test_h_is_returned_and_differentiable(backend, dropout):
    options = {"scale": 0.6, "dropout": dropout, "seed": SEED}
    got, want = [], []
    for function, tensors, results in ((lowrank_linear, operands(), got), (plain, double(operands()), want)):
        leaves = {k: t.requires_grad_() for k, t in tensors.items()}
        extra = {"return_h": True} if function is lowrank_linear else {}
        y, h = function(**leaves, **options, **extra)
        (y.square().sum() + 3 * h.square().sum()).backward()
        results += [h.detach(), *[t.grad for t in leaves.values()]]
        (only_h,) = torch.autograd.grad(function(**leaves, **options, **extra)[1].sum(), [leaves["down"]])
        results.append(only_h)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, P])
def test_as_good_as_eager(backend, dtype, dropout):
    """The numeric contract with float32 factors: the output and every gradient."""
    tensors = operands(64, 48, 65, 8, dtype, torch.float32)
    dy = draw(64, 48, dtype=dtype, seed=9)
    options = {"scale": 2.0, "dropout": dropout, "seed": SEED}
    y, grads = run(lowrank_linear, tensors, dy, **options)
    eager, eager_grads = run(plain, tensors, dy, **options)
    truth, true_grads = run(plain, double(tensors), dy.double(), **options)
    assert_as_good_as_eager(y, eager, truth)
    for name in NAMES:
        assert grads[name].dtype == tensors[name].dtype
        assert_as_good_as_eager(grads[name], eager_grads[name], true_grads[name])


@pytest.mark.parametrize("name", ["reference", "blas"])
def test_float64_is_not_rounded(name):
    with ops.backend(name):
        agree(operands(dtype=torch.float64), draw(7, 6, dtype=torch.float64), tol=1e-13, dropout=P, seed=SEED)


def test_float64_runs_where_the_kernels_do_not():
    with ops.backend("triton"):
        agree(operands(dtype=torch.float64), tol=1e-13)


@pytest.mark.parametrize("rank", [1, 3, 16, 200])
def test_any_rank(backend, rank):
    agree(operands(7, 10, 12, rank), draw(7, 10, seed=9), tol=5e-5, dropout=P, seed=SEED)


@pytest.mark.parametrize("shape", [(9,), (1, 9), (2, 3, 9), (2, 1, 3, 9)], ids=str)
def test_any_leading_shape(backend, shape):
    tensors = {**operands(), "x": draw(*shape)}
    agree(tensors, draw(*shape[:-1], 6, seed=9), scale=0.5)
    y, h = lowrank_linear(**tensors, return_h=True)
    assert y.shape == (*shape[:-1], 6) and h.shape == (*shape[:-1], 3)


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("shape", [(0, 9), (2, 0, 9), (0, 3, 9)], ids=str)
def test_no_tokens(backend, shape, dropout):
    y, grads = run(lowrank_linear, {**operands(), "x": draw(*shape)}, dropout=dropout)
    assert y.shape == (*shape[:-1], 6)
    assert grads["x"].shape == shape
    for name, t in operands().items():
        if name != "x":
            assert grads[name].shape == t.shape and not grads[name].any()


def view_of(t: Tensor, how: str) -> Tensor:
    """The same numbers, laid out otherwise; ``expanded`` repeats the first row with stride 0."""
    if how == "transposed":
        return t.mT.contiguous().mT
    if how == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 7.0, dtype=t.dtype, device=t.device)
        wide[..., 1:-2:2] = t
        return wide[..., 1:-2:2]
    if how == "permuted":
        return t.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    return t[:1].expand_as(t)


@pytest.mark.parametrize("how", ["transposed", "strided", "expanded", "permuted"])
def test_x_may_have_any_strides(backend, how):
    x = view_of(draw(2, 3, 2, 9) if how == "permuted" else draw(7, 9), how)
    assert not x.is_contiguous()
    agree({**operands(), "x": x}, draw(*x.shape[:-1], 6, seed=9), dropout=P, seed=SEED)


@pytest.mark.parametrize("how", ["transposed", "strided", "expanded", "all one"])
def test_the_incoming_gradient_may_have_any_strides(backend, how):
    dy = draw(7, 6, seed=9)
    dy = torch.ones((), device=DEVICE).expand(7, 6) if how == "all one" else view_of(dy, how)
    agree(operands(), dy, dropout=P, seed=SEED)


def test_half_precision_takes_odd_strides_too(backend):
    tensors = operands(dtype=torch.bfloat16, factors=torch.float32)
    want = run(lowrank_linear, tensors, draw(7, 6, dtype=torch.bfloat16), dropout=P, seed=SEED)
    tensors["x"] = view_of(tensors["x"], "transposed")
    dy = view_of(draw(7, 6, dtype=torch.bfloat16), "strided")
    got = run(lowrank_linear, tensors, dy, dropout=P, seed=SEED)
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_the_factors_may_be_views_and_the_weight_a_conv1d_s(backend):
    tensors = operands()
    agree({k: view_of(t, "transposed") if t.dim() == 2 else t for k, t in tensors.items()}, dropout=P, seed=SEED)


@pytest.mark.parametrize("factors", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_factors_gradients_come_in_the_factors_dtype(factors):
    tensors = operands(dtype=torch.bfloat16, factors=factors)
    y, grads = run(lowrank_linear, tensors)
    assert y.dtype == torch.bfloat16
    assert grads["down"].dtype == grads["up"].dtype == factors
    assert grads["x"].dtype == torch.bfloat16


def test_two_runs_give_the_same_bits(backend):
    tensors = operands(33, 20, 34, 8, torch.bfloat16, torch.float32)
    first, second = (run(lowrank_linear, tensors, dropout=P, seed=SEED) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(first[1][name], second[1][name]) for name in NAMES)


# --------------------------------------------------------------------------- only what is asked for


@pytest.mark.parametrize("only", [s for n in range(6) for s in itertools.combinations(NAMES, n)], ids=",".join)
def test_only_the_requested_gradients_are_computed(only, monkeypatch):
    calls: Counter[str] = Counter()

    def counted(name: str, function: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Tensor:
            calls[name] += 1
            calls["dx"] += kwargs.get("need_dx", False)
            return function(*args, **kwargs)

        return wrapper

    for name in ("project", "matmul_lowrank", "outer", "dx_and_ddown"):
        monkeypatch.setattr(reference, name, counted(name, getattr(reference, name)))
    tensors, dy = operands(), draw(7, 6, seed=9)
    with ops.backend("reference"):
        _, grads = run(lowrank_linear, tensors, dy, only, dropout=P, seed=SEED)
    assert grads.keys() == set(only)
    _, wants = run(plain, double(tensors), dy.double(), only, dropout=P, seed=SEED)
    for name in only:
        torch.testing.assert_close(grads[name].double(), wants[name], rtol=2e-5, atol=2e-5)
    assert calls["project"] == 1 + bool({"x", "down"} & set(only))
    assert calls["matmul_lowrank"] == 1 and calls["dx"] == ("x" in only)
    assert calls["outer"] == ("down" in only) + ("up" in only)


class Products(TorchDispatchMode):
    """Counts multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_", "linear"):
            left, right = args[1:3] if name.startswith("addmm") else args[:2]
            self.total += left.shape[0] * left.shape[1] * right.numel() // left.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("only", [("x",), ("down",), ("up",), ("x", "down", "up"), ("x", "up")], ids=",".join)
@pytest.mark.parametrize("dropout", [0.0, P])
def test_blas_multiplies_no_more_than_the_formula(only, dropout):
    M, N, K, R = 32, 24, 28, 4
    with Products() as products:
        run(lowrank_linear, operands(M, N, K, R), None, only, dropout=dropout)
    forward = M * N * K + M * R * (K + N)
    backward = M * R * N * bool({"x", "down"} & set(only))
    backward += ("x" in only) * (M * N * K + M * R * K) + ("down" in only) * M * R * K + ("up" in only) * M * R * N
    assert 0 < products.total <= forward + backward


class Saved:
    """Bytes kept for backward that are not parameters."""

    def __init__(self, parameters: list[Tensor]):
        self.known = {p.untyped_storage().data_ptr() for p in parameters}
        self.storages: dict[int, int] = {}

    def pack(self, t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return t

    @property
    def total(self) -> int:
        return sum(self.storages.values())


@pytest.mark.parametrize("only, keeps_x", [(("x", "down", "up"), True), (("x", "up"), False), (("x",), False)], ids=str)
@pytest.mark.parametrize("dropout", [0.0, P])
def test_x_and_h_are_saved_and_nothing_else(backend, only, keeps_x, dropout):
    """But the factors, where they had to be cast."""
    M, N, K, R = 64, 24, 40, 4
    tensors = operands(M, N, K, R, torch.bfloat16, torch.float32)
    leaves = {k: t.requires_grad_(k in only) for k, t in tensors.items()}
    saved = Saved([t for k, t in leaves.items() if k != "x"])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda t: t):
        y = lowrank_linear(**leaves, dropout=dropout)
    limit = keeps_x * M * K * 2 + ("up" in only) * M * R * 2 + R * (N + K) * 2 + (dropout > 0) * 8
    assert saved.total <= limit
    y.sum().backward()


@pytest.mark.parametrize("only", [("x", "down", "up"), ("x",)], ids=",".join)
def test_no_mask_outlives_the_backward_pass(only):
    M, K = 61, 67
    with ops.backend("blas"):
        tensors = operands(M, 6, K, 3)
        run(lowrank_linear, tensors, None, only, dropout=P)
        known = {tensors["x"].data_ptr()}
        alive = [t for t in gc.get_objects() if issubclass(type(t), Tensor) and t.shape == (M, K)]
    assert not [t for t in alive if t.data_ptr() not in known]
    last = getattr(blas, "_last", None)  # what blas keeps between two calls of one backward pass
    assert not any(getattr(last, "__dict__", {}).values())


# ---------------------------------------------------------------------------------------- dropout


def mask_of(seed: Tensor | None = None, dropout: float = P, M: int = 64, K: int = 66) -> Tensor:
    """The mask that the op really applies, read off an identity."""
    eye, zero = torch.eye(K, device=DEVICE), torch.zeros(K, K, device=DEVICE)
    return lowrank_linear(torch.ones(M, K, device=DEVICE), zero, eye, eye, dropout=dropout, seed=seed) != 0


def test_the_mask_is_the_reference_s(backend):
    assert torch.equal(mask_of(SEED, M=16, K=18), reference.keep_mask(SEED, P, 16, 18))


@pytest.mark.parametrize("dropout", [0.05, 0.1, 0.5, 0.9])
def test_the_keep_rate_is_right_everywhere(dropout):
    M, K = 512, 510
    keep = reference.keep_mask(SEED, dropout, M, K).double()
    sigma = (dropout * (1 - dropout)) ** 0.5
    assert abs(keep.mean() - (1 - dropout)) < 4 * sigma / (M * K) ** 0.5 + 2**-15
    for axis, n in ((0, M), (1, K)):  # 5.5 sigma over a thousand rows or columns
        assert (keep.mean(axis) - (1 - dropout)).abs().max() < 5.5 * sigma / n**0.5


def test_the_mask_s_elements_are_independent():
    M, K = 512, 512
    keep = reference.keep_mask(SEED, 0.5, M, K).double() * 2 - 1
    other = reference.keep_mask(SEED + 1, 0.5, M, K).double() * 2 - 1
    swapped = reference.keep_mask(SEED.flip(0), 0.5, M, K).double() * 2 - 1
    pairs = [keep[:, ::2] * keep[:, 1::2], keep[:, 1:] * keep[:, :-1], keep[1:] * keep[:-1]]
    pairs += [keep * other, keep * swapped, keep * keep.T.contiguous(), keep[: M // 2] * keep[M // 2 :]]
    for product in pairs:
        n = product.numel() / (2 if product.shape == (M, K) else 1)  # a transpose counts every pair twice
        assert abs(product[~torch.eye(*product.shape, dtype=torch.bool, device=DEVICE)].mean()) < 4.5 / n**0.5


def test_survivors_are_scaled_so_that_the_mean_stays():
    M, K = 256, 256
    eye, zero = torch.eye(K, device=DEVICE), torch.zeros(K, K, device=DEVICE)
    y = lowrank_linear(torch.ones(M, K, device=DEVICE), zero, eye, eye, dropout=0.5, seed=SEED)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert abs(y.mean() - 1) < 0.02


def test_the_seed_decides_the_mask():
    assert torch.equal(mask_of(SEED), mask_of(SEED.clone()))
    assert not torch.equal(mask_of(SEED), mask_of(SEED + 1))


def test_dropout_follows_manual_seed(backend):
    torch.manual_seed(3)
    first, second = mask_of(M=8, K=10), mask_of(M=8, K=10)
    torch.manual_seed(3)
    assert torch.equal(mask_of(M=8, K=10), first)
    assert not torch.equal(first, second)


def test_without_dropout_no_random_number_is_drawn():
    state = torch.get_rng_state()
    run(lowrank_linear, operands())
    run(lowrank_linear, operands(), dropout=P, seed=SEED)
    assert torch.equal(torch.get_rng_state(), state)


def test_forward_and_backward_drop_the_same_elements(backend):
    """Where the mask is zero the low-rank path passes neither value nor gradient."""
    K = 18
    x = torch.ones(16, K, device=DEVICE, requires_grad=True)
    eye, zero = torch.eye(K, device=DEVICE), torch.zeros(K, K, device=DEVICE)
    down = eye.clone().requires_grad_()
    y = lowrank_linear(x, zero, down, eye, dropout=0.5)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, y != 0)
    torch.testing.assert_close(down.grad[0], 2.0 * (y != 0).float().sum(0))


@pytest.mark.parametrize("dropout", [1e-6, 0.99999])
def test_a_probability_near_the_ends_gives_finite_numbers(dropout):
    y, grads = run(lowrank_linear, operands(), dropout=dropout)
    assert all(t.isfinite().all() for t in (y, *grads.values()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_reproduces_the_mask(backend, reentrant):
    def loss(recompute: bool) -> tuple[Tensor, dict[str, Tensor]]:
        def body(x: Tensor, **rest: Tensor) -> Tensor:
            return lowrank_linear(x.tanh(), **rest, dropout=0.5).tanh()

        def wrapped(**t: Tensor) -> Tensor:
            x, rest = t.pop("x"), t
            return checkpoint(lambda x: body(x, **rest), x, use_reentrant=reentrant) if recompute else body(x, **rest)

        torch.manual_seed(5)
        return run(wrapped, operands(), draw(7, 6, seed=9))

    torch.testing.assert_close(loss(True), loss(False), rtol=0, atol=0)


# --------------------------------------------------------------------------------------- autocast


def test_autocast_computes_in_half_and_keeps_float32_gradients(backend):
    tensors = operands(33, 20, 34, 8)
    with torch.autocast(DEVICE, torch.bfloat16):
        leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        y, h = lowrank_linear(**leaves, return_h=True)
        eager_leaves = {k: t.clone().requires_grad_() for k, t in tensors.items()}
        eager = plain(**eager_leaves)[0]
    assert y.dtype == h.dtype == eager.dtype == torch.bfloat16
    dy = draw(33, 20, dtype=torch.bfloat16, seed=9)
    y.backward(dy)
    eager.backward(dy)
    truth, truths = run(plain, double(tensors), dy.double())
    assert_as_good_as_eager(y.detach(), eager.detach(), truth)
    for name in NAMES:
        assert leaves[name].grad.dtype == torch.float32
        assert_as_good_as_eager(leaves[name].grad, eager_leaves[name].grad, truths[name])


def test_autocast_leaves_the_reference_its_wide_products():
    """Within autocast the op rounds as it does outside."""
    tensors = operands(64, 20, 64, 8, torch.bfloat16, torch.float32)
    for name in ("reference", "blas"):
        with ops.backend(name):
            want = lowrank_linear(**tensors)
            with torch.autocast(DEVICE, torch.bfloat16):
                assert torch.equal(lowrank_linear(**tensors), want), name


def test_autocast_leaves_float64_alone():
    with torch.autocast(DEVICE, torch.bfloat16):
        agree(operands(dtype=torch.float64), tol=1e-13)


def test_backward_outside_the_autocast_block_and_mixed_inputs():
    tensors = {**operands(), "x": draw(7, 9, dtype=torch.bfloat16)}
    with torch.autocast(DEVICE, torch.bfloat16):
        y, grads = run(lowrank_linear, tensors)
    assert y.dtype == torch.bfloat16 and grads["x"].dtype == torch.bfloat16
    assert grads["weight"].dtype == grads["down"].dtype == torch.float32


# ---------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("dropout", [0.0, P])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_opcheck(bias, dropout):
    tensors = operands(5, 4, 6, 2)
    tensors["bias"] = tensors["bias"] if bias else None
    leaves = [t if t is None else t.requires_grad_() for t in tensors.values()]
    seed = SEED if dropout else None
    torch.library.opcheck(torch.ops.forgetless.lowrank_linear.default, (*leaves, seed, [1.5, 1.0, dropout]))


@pytest.mark.parametrize("core", [False, True], ids=["factors", "core"])
@pytest.mark.parametrize("need", itertools.product([True, False], repeat=5), ids=str)
def test_opcheck_of_the_backward(need, core):
    """Beside a core up is frozen: the last need is the core's then."""
    tensors = operands(5, 4, 6, 2, torch.bfloat16, torch.float32)
    values: dict[str, Any] = {"need": [*need[:4], False, need[4]] if core else [*need, False]}
    values |= {"factors": [1.5, 1.0, P]}
    values |= {name: draw(5, n, dtype=torch.bfloat16, seed=7) for name, n in (("dy", 4), ("dh", 2))}
    x = tensors["x"] if need[1] or need[3] else None
    h = draw(5, 2, dtype=torch.bfloat16, seed=7) if need[4] else None
    given = draw(2, 2, seed=8) if core else None
    values["saved"] = [x, h, SEED, tensors["weight"], tensors["down"], tensors["up"], given]
    op = torch.ops.forgetless.lowrank_linear_backward.default
    args = tuple(values[argument.name] for argument in op._schema.arguments)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("only", [NAMES, ("x", "down", "up"), ("up",)], ids=",".join)
def test_compiles_whole(backend, only):
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda **t: lowrank_linear(**t, scale=0.5, dropout=P, seed=SEED), fullgraph=True, backend="aot_eager"
    )
    tensors = {**operands(), "x": draw(2, 3, 9)}
    dy = draw(2, 3, 6, seed=9)
    got = run(compiled, tensors, dy, only)
    want = run(lowrank_linear, tensors, dy, only, scale=0.5, dropout=P, seed=SEED)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_compiled_dropout_draws_anew_and_follows_manual_seed():
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: lowrank_linear(**t, dropout=0.5), fullgraph=True, backend="aot_eager")
    torch.manual_seed(1)
    first, second = (run(compiled, operands()) for _ in range(2))
    torch.manual_seed(1)
    torch.testing.assert_close(run(compiled, operands()), first, rtol=0, atol=0)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("dropout", [0.0, P])
def test_a_new_length_does_not_compile_again(dropout):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda **t: lowrank_linear(**t, dropout=dropout, seed=SEED), fullgraph=True, backend=counter
    )
    for length in (5, 8, 13, 21, 34, 130):
        tensors = {**operands(), "x": draw(2, length, 9)}
        got = run(compiled, tensors)
        torch.testing.assert_close(got, run(lowrank_linear, tensors, dropout=dropout, seed=SEED), rtol=1e-6, atol=1e-5)
    assert counter.frame_count <= 2


# ----------------------------------------------------------------------------------------- errors


def test_a_second_derivative_is_refused():
    leaves = {k: t.requires_grad_() for k, t in operands(dtype=torch.float64).items()}
    y = lowrank_linear(**leaves)
    with pytest.raises(RuntimeError, match="twice|second"):
        (dx,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        dx.square().sum().backward()


def test_a_second_derivative_is_refused_where_the_incoming_gradient_is_constant():
    """Else a gradient penalty would silently count as zero."""
    leaves = {k: t.requires_grad_() for k, t in operands(dtype=torch.float64).items()}
    y = lowrank_linear(**leaves)
    with pytest.raises(RuntimeError, match="twice|second"):
        (dx,) = torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
        (dx.square().sum() + y.sum()).backward()


def test_a_second_derivative_of_the_compiled_op_is_refused():
    leaves = [t.requires_grad_() for t in operands(dtype=torch.float64).values()]
    y, _ = torch.ops.forgetless.lowrank_linear(*leaves, None, [1.0, 1.0, 0.0])
    with pytest.raises(RuntimeError, match="no autograd formula|twice|second"):
        (dx,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
        dx.square().sum().backward()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap"])
def test_function_transforms_are_refused(transform):
    t = operands()

    def f(x: Tensor) -> Tensor:
        return lowrank_linear(x, t["weight"], t["down"], t["up"])

    with pytest.raises((RuntimeError, NotImplementedError)):
        if transform == "grad":
            torch.func.grad(lambda x: f(x).sum())(t["x"])
        elif transform == "jvp":
            torch.func.jvp(f, (t["x"],), (t["x"],))
        else:
            torch.func.vmap(f)(draw(2, 7, 9))


half, meta = {"dtype": torch.bfloat16}, torch.device("meta")
ERRORS = {
    "integers": ({"x": lambda x: x.long()}, r"x has dtype int64, wants a floating-point dtype"),
    "flat weight": ({"weight": lambda w: w[0]}, r"weight has shape \(9,\), wants \(out_features, in_features\)"),
    "features": ({"x": lambda x: x[:, :8]}, r"x has shape \(7, 8\), weight \(6, 9\) wants \(\.\.\., 9\)"),
    "scalar x": ({"x": lambda x: x[0, 0]}, r"x has shape \(\), weight \(6, 9\) wants \(\.\.\., 9\)"),
    "down's columns": ({"down": lambda d: d[:, :5]}, r"down has shape \(3, 5\), weight \(6, 9\) wants \(rank, 9\)"),
    "down's dimensions": ({"down": lambda d: d[0]}, r"down has shape \(9,\), weight \(6, 9\) wants \(rank, 9\)"),
    "rank 0": ({"down": lambda d: d[:0]}, r"down has shape \(0, 9\), weight \(6, 9\) wants \(rank, 9\)"),
    "up's rank": ({"up": lambda u: u[:, :2]}, r"up has shape \(6, 2\), weight and down want \(6, 3\)"),
    "up's rows": ({"up": lambda u: u[:5]}, r"up has shape \(5, 3\), weight and down want \(6, 3\)"),
    "bias's size": ({"bias": lambda b: b[:5]}, r"bias has shape \(5,\), weight \(6, 9\) wants \(6,\)"),
    "weight's dtype": ({"weight": lambda w: w.to(**half)}, r"weight has dtype bfloat16, x wants float32"),
    "bias's dtype": ({"bias": lambda b: b.to(**half)}, r"bias has dtype bfloat16, x wants float32"),
    "down's dtype": ({"down": lambda d: d.int()}, r"down has dtype int32, wants a floating-point dtype"),
    "up's dtype": ({"up": lambda u: u.bool()}, r"up has dtype bool, wants a floating-point dtype"),
    "weight's device": ({"weight": lambda w: w.to(meta)}, r"weight is on meta, x on \w+.*one device"),
    "down's device": ({"down": lambda d: d.to(meta)}, r"down is on meta, x on \w+.*one device"),
    "up's device": ({"up": lambda u: u.to(meta)}, r"up is on meta, x on \w+.*one device"),
    "bias's device": ({"bias": lambda b: b.to(meta)}, r"bias is on meta, x on \w+.*one device"),
    "infinite scale": ({"scale": float("inf")}, r"scale is inf, wants a finite number"),
    "no scale": ({"scale": float("nan")}, r"scale is nan, wants a finite number"),
    "dropout 1": ({"dropout": 1.0}, r"dropout is 1\.0, wants a probability in \[0, 1\)"),
    "negative dropout": ({"dropout": -0.1}, r"dropout is -0\.1, wants a probability in \[0, 1\)"),
    "no dropout": ({"dropout": float("nan")}, r"dropout is nan, wants a probability in \[0, 1\)"),
    "seed's shape": ({"seed": torch.zeros(3, dtype=torch.int32)}, r"seed has shape \(3,\).*wants \(2,\) int32"),
    "seed's dtype": ({"seed": torch.zeros(2, dtype=torch.int64)}, r"seed has .*int64.*wants \(2,\) int32"),
    "seed's device": ({"seed": torch.zeros(2, dtype=torch.int32, device=meta)}, r"seed has .*meta.*wants \(2,\) int32"),
}


@pytest.mark.parametrize("change, message", ERRORS.values(), ids=ERRORS)
def test_what_does_not_fit_is_named(change, message):
    tensors: dict[str, Any] = {"dropout": 0.1, **operands()}
    for name, value in change.items():
        tensors[name] = value(tensors[name]) if callable(value) else value
    with pytest.raises(ValueError, match=message):
        lowrank_linear(**tensors)


def test_an_unknown_backend_is_named_and_the_old_one_stays():
    with pytest.raises(ValueError, match="backend is 'cublas', wants one of .*'blas'"), ops.backend("cublas"):
        pass
    with pytest.raises(KeyError), ops.backend("reference"):
        assert ops.asked_module() is reference
        raise KeyError
    assert ops.asked_module() is None
