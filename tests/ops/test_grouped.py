"""The op on a stack of experts, against one expert after another in plain autograd."""

import warnings

import pytest
import torch
from helpers import assert_as_good_as_eager

import forgetless as fl
from forgetless.ops import dispatch, plans, reference
from forgetless.ops.grouped import Factors, grouped_lowrank, sort_rows

T, K, N, E, R, TOP = 9, 10, 14, 5, 3, 2


@pytest.fixture(autouse=True)
def _strict(request, monkeypatch):
    """A kernel that fails is an error, but where that is tested."""
    if "no_plans" not in request.fixturenames:
        monkeypatch.setenv("FORGETLESS_PLAN", "split,strict")


SCALE = 1.5


def tensors(dtype, by_token=True, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    index = torch.rand(T, E - 1, generator=gen).argsort(1)[:, :TOP]  # nobody is routed to the last expert
    leaves = {
        "x": draw(T if by_token else T * TOP, K), "sums": draw(T * TOP), "weight": draw(E, K, N).mT,
        "bias": draw(E, N), "down": draw(E, R, K), "up": draw(E, N, R),
    }  # fmt: skip
    return {name: t.requires_grad_() for name, t in leaves.items()}, sort_rows(index, E)


def ours(leaves, rows, summed, by_token, dropout=0.0):
    factors = Factors(leaves["down"], leaves["up"], SCALE, dropout)
    sums = leaves["sums"] if summed else None
    return grouped_lowrank(leaves["x"], leaves["weight"], leaves["bias"], factors, rows, sums, by_token)


def eager(leaves, rows, summed, by_token, keep=None):
    x, weight, bias, down, up = (leaves[name] for name in ("x", "weight", "bias", "down", "up"))
    x = x[rows.tokens] if by_token else x
    experts = torch.repeat_interleave(torch.arange(E), torch.tensor(rows.counts))
    ys, hs = [], []
    for s, e in enumerate(experts):
        own = x[s] if keep is None else x[s] * keep[s]
        hs.append(SCALE * (down[e] @ own))
        ys.append(weight[e] @ x[s] + bias[e] + up[e] @ hs[-1])
    y, h = torch.stack(ys), torch.stack(hs)
    if summed:
        y = y.new_zeros(T, N).index_add(0, rows.tokens, y * leaves["sums"][:, None])
    return y, h


def gradients(run, leaves, rows, summed, by_token, **named):
    y, h = run(leaves, rows, summed, by_token, **named)
    weights = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    value = (y * weights).sum() + (h * h.detach().sin()).sum()
    used = [t for name, t in leaves.items() if name != "sums" or summed]
    return [y, h, *torch.autograd.grad(value, used)]


@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
def test_values_and_gradients_are_those_of_one_expert_after_another(backend, by_token, summed):
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaves, rows = tensors(dtype, by_token)
    with fl.ops.backend(backend):
        mine = gradients(ours, leaves, rows, summed, by_token)
    for a, b in zip(mine, gradients(eager, leaves, rows, summed, by_token), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("backend", ["blas", "triton"])
def test_errors_are_those_of_eager_pytorch(backend, dtype, summed):
    leaves, rows = tensors(dtype)
    wide = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    truth = gradients(eager, wide, rows, summed, True)
    theirs = gradients(eager, leaves, rows, summed, True)
    with fl.ops.backend(backend):
        mine = gradients(ours, leaves, rows, summed, True)
    for a, b, c in zip(mine, theirs, truth, strict=True):
        assert_as_good_as_eager(a.detach(), b.detach(), c.detach())


def test_each_expert_has_a_dropout_mask_of_its_own_and_the_gradient_has_the_same():
    leaves, rows = tensors(torch.float64)
    torch.manual_seed(3)
    mine = gradients(ours, leaves, rows, True, True, dropout=0.25)
    torch.manual_seed(3)
    seeds = torch.randint(-(1 << 31), (1 << 31) - 1, (E, 2), dtype=torch.int32)
    masks = [reference.keep_mask(seed, 0.25, count, K) for seed, count in zip(seeds, rows.counts, strict=True)]
    keep = torch.cat(masks).double() / 0.75
    assert not masks[0].all() and not torch.equal(masks[0][:3], masks[1][:3])
    for a, b in zip(mine, gradients(eager, leaves, rows, True, True, keep=keep), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("summed", [False, True])
def test_gradcheck(summed):
    leaves, rows = tensors(torch.float64)
    names = [name for name in leaves if name != "sums" or summed]

    def run(*values):
        return ours({**leaves, **dict(zip(names, values, strict=True))}, rows, summed, True)

    assert torch.autograd.gradcheck(run, [leaves[name] for name in names])


@pytest.mark.parametrize("backend", ["blas", "triton"])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_x_may_be_made_inside_and_is_not_saved(backend, dropout):
    dtype = torch.float32 if backend == "triton" else torch.float64
    leaves, rows = tensors(dtype, by_token=False)
    wide = torch.cat([leaves["x"], leaves["x"].flip(0)], 1).detach().requires_grad_()
    factors = Factors(leaves["down"], leaves["up"], SCALE, dropout)
    used = [wide, *(leaves[name] for name in ("sums", "weight", "bias", "down", "up"))]
    saved = []

    def gate(t):
        return torch.nn.functional.silu(t[:, :K]) * t[:, K:]

    def grads(x, inside):
        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            y, h = grouped_lowrank(x, leaves["weight"], leaves["bias"], factors, rows, leaves["sums"], False, inside)
        return [y, *torch.autograd.grad(y.sum() + h.sin().sum(), used)]

    with fl.ops.backend(backend):
        mine = grads(wide, gate)
        assert {t.shape for t in saved if t.shape[:1] == wide.shape[:1]} == {wide.shape, (T * TOP, R), (T * TOP,)}
        for a, b in zip(mine, grads(gate(wide), None), strict=True):
            assert torch.equal(a, b)


def test_what_inside_makes_has_to_fit():
    leaves, rows = tensors(torch.float32)
    factors = Factors(leaves["down"], leaves["up"])
    with pytest.raises(ValueError, match=r"inside makes \(9, 5\), the stack \(5, 14, 10\) wants 10"):
        grouped_lowrank(leaves["x"], leaves["weight"], None, factors, rows, inside=lambda t: t[:, :5])


def test_a_kernel_that_fails_is_replaced_with_one_warning(no_plans, monkeypatch):
    def broken(*args, **kwargs):
        raise dispatch.LaunchError("it does not compile")

    leaves, rows = tensors(torch.float32)
    expected = gradients(ours, leaves, rows, True, True)
    monkeypatch.setattr(dispatch.kernels, "grouped_matmul_lowrank", broken)
    with fl.ops.backend("triton"):
        with pytest.warns(UserWarning, match="of 5 experts .* it does not compile"):
            first = gradients(ours, leaves, rows, True, True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = gradients(ours, leaves, rows, True, True)
    for a, b, c in zip(expected, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    monkeypatch.setenv("FORGETLESS_PLAN", "strict")
    plans.forget()
    with fl.ops.backend("triton"), pytest.raises(dispatch.LaunchError):
        gradients(ours, leaves, rows, True, True)


def test_no_token_and_no_rank():
    leaves, _ = tensors(torch.float64)
    rows = sort_rows(torch.empty(0, TOP, dtype=torch.int64), E)
    empty = {**leaves, "x": leaves["x"][:0], "sums": leaves["sums"][:0]}
    y, h = ours(empty, rows, True, True)
    assert y.shape == (0, N) and h.shape == (0, R)
    (y.sum() + h.sum()).backward()
    assert not leaves["down"].grad.any()
    leaves, rows = tensors(torch.float64)
    none = {**leaves, "down": leaves["down"][:, :0], "up": leaves["up"][..., :0]}
    for a, b in zip(gradients(ours, none, rows, True, True), gradients(eager, none, rows, True, True), strict=True):
        torch.testing.assert_close(a, b)


def test_under_autocast_products_are_taken_in_its_dtype():
    leaves, rows = tensors(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, h = ours(leaves, rows, True, True)
    assert y.dtype == h.dtype == torch.bfloat16
    y.sum().backward()
    assert leaves["x"].grad.dtype == leaves["down"].grad.dtype == torch.float32


@pytest.mark.parametrize(
    "change, says",
    [
        ({"x": (T, K + 1)}, r"x has shape \(9, 11\), the stack \(5, 14, 10\) wants \(9, 10\)"),
        ({"down": (E, R, N)}, r"down has shape"),
        ({"up": (E - 1, N, R)}, r"up has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, says):
    leaves, rows = tensors(torch.float32)
    with pytest.raises(ValueError, match=says):
        ours({**leaves, **{name: torch.zeros(shape) for name, shape in change.items()}}, rows, False, True)


@pytest.mark.parametrize("chosen", [5, -1])
def test_a_router_that_chooses_an_expert_that_there_is_not_is_refused(chosen):
    with pytest.raises(ValueError, match=f"chose expert {chosen}, there are 5"):
        sort_rows(torch.tensor([[0, chosen]]), 5)


def test_rows_are_sorted_by_expert_and_known_by_their_ends():
    rows = sort_rows(torch.tensor([[3, 0], [0, 1], [3, 1]]), 5)
    assert rows.ends.tolist() == [2, 4, 4, 6, 6] and rows.counts == [2, 2, 0, 2, 0]
    assert rows.tokens.tolist() == [0, 1, 1, 2, 0, 2] and rows.experts().tolist() == [0, 0, 1, 1, 3, 3]
    assert torch.equal(rows.order[rows.places], torch.arange(6))


def test_there_is_no_second_derivative():
    leaves, rows = tensors(torch.float64)
    y, _ = ours(leaves, rows, False, True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), leaves["x"], create_graph=True)
