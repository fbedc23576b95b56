"""A frozen layer by its own forward with a low-rank product on top: right, in place, and only where nobody looks."""

import pytest
import torch
from helpers import assert_as_good_as_eager
from torch import nn
from torch.nn import functional as F

from forgetless.ops import dispatch as ops
from forgetless.ops import reference
from forgetless.ops.add_lowrank import Term, add_terms
from forgetless.ops.bodies import draw_seed

K, N, R = 24, 16, 4


class Int8Linear(nn.Module):
    """Weight-only int8: whoever wants x @ W.T must call it, and a copy of the weight is made by it alone."""

    def __init__(self, bias=True):
        super().__init__()
        weight = torch.randn(N, K)
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))
        self.bias = nn.Parameter(torch.randn(N), requires_grad=False) if bias else None

    def forward(self, x):
        weight = self.packed.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def factors(dtype=torch.float64, seed=0, bias=False):
    gen = torch.Generator().manual_seed(seed)
    down, up = torch.randn(R, K, generator=gen), torch.randn(N, R, generator=gen)
    extra = torch.randn(N, generator=gen).to(dtype).requires_grad_(True) if bias else None
    return down.to(dtype).requires_grad_(True), up.to(dtype).requires_grad_(True), extra


def formula(base, x, terms):
    y = base(x)
    for t in terms:
        y = y + F.linear(F.linear(x, t.down.to(x.dtype)), t.up.to(x.dtype)) * t.scale
        y = y if t.bias is None else y + t.bias.to(x.dtype)
    return y


SHAPES = [(5, K), (2, 3, K), (K,), (0, K), (2, 0, K)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("count", [1, 2])
def test_values_and_gradients(shape, bias, count):
    base = Int8Linear(bias).double()
    terms = [Term(*factors(seed=i)[:2], 0.7 + i, 0.0, factors(seed=i, bias=bias)[2]) for i in range(count)]
    leaves = [t for term in terms for t in (term.down, term.up, term.bias) if t is not None]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    ours, hidden = add_terms(base, x, terms)
    theirs = formula(base, x, terms)
    torch.testing.assert_close(ours, theirs)
    dy = torch.randn_like(theirs)
    for a, b in zip(
        torch.autograd.grad(ours, [x, *leaves], dy), torch.autograd.grad(theirs, [x, *leaves], dy), strict=True
    ):
        torch.testing.assert_close(a, b)
    assert len(hidden) == count and hidden[0].shape == (x.numel() // K, R)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_gradcheck(p):
    base = Int8Linear().double()
    down, up, bias = factors(bias=True)
    x = torch.randn(3, K, dtype=torch.float64, requires_grad=True)

    def run(x, down, up, bias):
        torch.manual_seed(1)  # one mask for all calls
        y, (h,) = add_terms(base, x, [Term(down, up, 0.5, p, bias)])
        return y, h

    assert torch.autograd.gradcheck(run, (x, down, up, bias))


def test_dropout_is_the_ops():
    base = Int8Linear().double()
    down, up, _ = factors()
    x = torch.randn(6, K, dtype=torch.float64)
    torch.manual_seed(3)
    y, _ = add_terms(base, x, [Term(down, up, 2.0, 0.25)])
    torch.manual_seed(3)
    seed = draw_seed(x.device)
    kept = reference.keep_mask(seed, 0.25, 6, K)
    torch.testing.assert_close(y, base(x) + 2.0 / 0.75 * (x * kept) @ down.T @ up.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_numeric_contract(dtype, autocast):
    torch.manual_seed(0)
    base = Int8Linear()
    terms = [Term(*factors(torch.float32)[:2], 0.5)]
    x = torch.randn(3, 40, K).to(dtype).requires_grad_(True)
    x64 = x.detach().double().requires_grad_(True)
    terms64 = [Term(*(t.detach().double().requires_grad_(True) for t in terms[0][:2]), 0.5)]
    dy = torch.randn(3, 40, N)
    got = []
    for run, inputs, these in ((add_terms, x, terms), (formula, x, terms), (formula, x64, terms64)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and inputs is x):
            out = run(base, inputs, these)
        y = out[0] if isinstance(out, tuple) else out
        grads = torch.autograd.grad(y, [inputs, these[0].down, these[0].up], dy.to(y.dtype))
        got.append([y.detach(), *grads])
    assert got[0][0].dtype == (torch.bfloat16 if autocast else dtype)
    for ours, eager, truth in zip(*got, strict=True):
        assert_as_good_as_eager(ours, eager, truth)


def test_the_kernels_give_the_same():
    pytest.importorskip("triton")
    base = Int8Linear()
    results = []
    for name in ("blas", "triton"):
        down, up, _ = factors(torch.float32)
        x = torch.ones(6, K).cumsum(1).mul(0.1).requires_grad_(True)
        with ops.backend(name):
            torch.manual_seed(0)
            y, _ = add_terms(base, x, [Term(down, up, 0.5, 0.3)])
            results.append([y.detach(), *torch.autograd.grad(y.square().sum(), [x, down, up])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, K), (2, 3, K)], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_only_fresh_memory_is_written_in_place(shape, bias):
    """The result lies where the frozen layer put its own only if the caller says that nothing else holds it."""
    base = Int8Linear(bias)
    down, up, _ = factors(torch.float32)
    made = {}

    def watched(x):
        y = base(x)
        made["y"], made["view"] = y.data_ptr(), y._is_view()  # autograd lets nobody write to some views
        return y

    x = torch.randn(shape, requires_grad=True)
    y, _ = add_terms(watched, x, [Term(down, up, 0.5)], fresh=True)
    assert (y.data_ptr() == made["y"]) == (not made["view"])
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    again, _ = add_terms(watched, x, [Term(down, up, 0.5)])
    assert again.data_ptr() != made["y"]
    torch.testing.assert_close(y, again)
    torch.testing.assert_close(torch.autograd.grad(again.square().sum(), x)[0], dx)


def test_memory_that_is_not_fresh_after_all_is_an_error():
    """Autograd sees that what it saved was written to."""
    linear = nn.Linear(K, N).double()
    down, up, _ = factors()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    y, _ = add_terms(lambda x: torch.tanh(linear(x)), x, [Term(down, up, 0.5)], fresh=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.square().sum().backward()


class Keeps(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class KeepsView(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        self.last = y.view(-1)
        return y


class KeepsDetached(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        self.last = y.detach()
        return y


class KeepsRoot(nn.Linear):
    def forward(self, x):
        self.last = super().forward(x).reshape(-1)
        return self.last.view(*x.shape[:-1], N)


@pytest.mark.parametrize("kind", [Keeps, KeepsView, KeepsDetached, KeepsRoot])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_what_the_layer_keeps_is_not_written_to(kind, grad):
    base = kind(K, N).requires_grad_(False)
    down, up, _ = factors(torch.float32)
    x = torch.randn(5, K, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        add_terms(base, x, [Term(down, up, 0.5)])
    torch.testing.assert_close(base.last.reshape(5, N), F.linear(x, base.weight, base.bias))


@pytest.mark.parametrize(
    "last",
    [torch.tanh, lambda y: y * y, lambda y: y.exp(), lambda y: F.relu(y), lambda y: y.view(-1, 4).sigmoid().view_as(y)],
    ids=["tanh", "square", "exp", "relu", "sigmoid of a view"],
)
def test_what_the_layers_backward_needs_is_not_written_to(last):
    linear = nn.Linear(K, N).double()
    down, up, _ = factors()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)

    def base(x):
        return last(linear(x))

    ours = torch.autograd.grad(add_terms(base, x, [Term(down, up, 0.5)])[0].square().sum(), [x, linear.weight, up])
    theirs = torch.autograd.grad(formula(base, x, [Term(down, up, 0.5)]).square().sum(), [x, linear.weight, up])
    torch.testing.assert_close(ours, theirs)


def test_a_layer_that_returns_its_input_keeps_it():
    base = nn.Identity()
    down = torch.randn(R, K, dtype=torch.float64, requires_grad=True)
    up = torch.randn(K, R, dtype=torch.float64, requires_grad=True)
    for grad in (True, False):
        x = torch.randn(5, K, dtype=torch.float64, requires_grad=grad)
        before = x.detach().clone()
        y, _ = add_terms(base, x, [Term(down, up, 0.5)])
        assert torch.equal(x, before) and not torch.equal(y, before)
        leaves = [x, down, up] if grad else [down, up]
        theirs = torch.autograd.grad(formula(base, x, [Term(down, up, 0.5)]).square().sum(), leaves)
        torch.testing.assert_close(torch.autograd.grad(y.square().sum(), leaves), theirs)


def test_a_gradient_that_others_hold_is_not_written_to():
    """The frozen layer's gradient of x may be a tensor that somebody else got as well."""
    held = []

    class Shares(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, dy):
            held.append(dy * 2)
            return held[-1]

    down = torch.randn(R, K, dtype=torch.float64, requires_grad=True)
    up = torch.randn(K, R, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    y, _ = add_terms(Shares.apply, x, [Term(down, up, 0.5)])
    dy = torch.randn_like(y)
    (dx,) = torch.autograd.grad(y, x, dy)
    torch.testing.assert_close(held[0], dy * 2)
    torch.testing.assert_close(dx, dy * 2 + 0.5 * dy @ up @ down)


def test_only_wanted_gradients_and_saved_bytes():
    base = Int8Linear()
    down, up, _ = factors(torch.float32)
    x = torch.randn(50, K)
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = add_terms(base, x, [Term(down, up, 0.5)])
    assert sum(sizes) == x.numel() + 50 * R + down.numel() + up.numel()  # nothing of (M, N) or (N, K)
    up.requires_grad_(False)
    (ddown,) = torch.autograd.grad(add_terms(base, x, [Term(down, up, 0.5)])[0].sum(), [down])
    torch.testing.assert_close(ddown, 0.5 * (torch.ones(50, N) @ up).T @ x)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_gradient_checkpointing(reentrant, p):
    from torch.utils.checkpoint import checkpoint

    base = Int8Linear().double()
    down, up, _ = factors()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)

    def run(x):
        return torch.tanh(add_terms(base, x, [Term(down, up, 0.5, p)])[0])

    grads = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=reentrant)):
        torch.manual_seed(0)
        call(x).square().sum().backward()
        grads.append([x.grad, down.grad, up.grad])
        x.grad = down.grad = up.grad = None
    torch.testing.assert_close(*grads)


def test_a_second_derivative_is_refused():
    down, up, _ = factors()
    x = torch.randn(5, K, dtype=torch.float64, requires_grad=True)
    y, _ = add_terms(Int8Linear().double(), x, [Term(down, up, 0.5)])
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_a_result_of_another_shape_is_refused():
    down, up, _ = factors()
    with pytest.raises(ValueError, match=r"returned \(5, 24\), its adapter wants \(5, 16\)"):
        add_terms(nn.Identity(), torch.randn(5, K, dtype=torch.float64), [Term(down, up, 0.5)])
