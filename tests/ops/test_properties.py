"""Properties of the op and of adapt, save, load and merge over drawn shapes, strides, dtypes and values.

A bounded number of examples, always the same; ``FORGETLESS_EXAMPLES=2000`` draws that many new ones per property.
"""

from __future__ import annotations

import math
import os
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import forgetless as fl
from forgetless.ops import dispatch as ops
from forgetless.ops import reference
from forgetless.ops.autograd import lowrank_linear
from forgetless.ops.bodies import quantized_rate

EXAMPLES = int(os.environ.get("FORGETLESS_EXAMPLES", "0"))
common = settings(
    max_examples=EXAMPLES or 60,
    derandomize=not EXAMPLES,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
NAMES = ("x", "weight", "down", "up", "bias")
ODD = (math.nan, math.inf, -math.inf)
HALF = (torch.float16, torch.bfloat16)
BACKENDS = ["blas", "triton"] if ops.kernels is not None else ["blas"]
SEED = torch.tensor([77, -5], dtype=torch.int32)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True, scope="module")
def strict():
    """A kernel that gives way to BLAS is an error here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORGETLESS_PLAN", "split,strict")
        yield


def lay_out(t: Tensor, how: str) -> Tensor:
    """The same values (of the first row alone, if expanded) with other strides"""
    if how == "transposed" and t.dim() >= 2:
        return t.mT.contiguous().mT
    if how == "strided":
        wide = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 3), 7.0, dtype=t.dtype, device=t.device)
        view = wide[..., 1 : 1 + 2 * t.shape[-1] : 2]
        return view.copy_(t)
    if how == "far apart" and t.dim() >= 2:
        return torch.full((*t.shape[:-1], t.shape[-1] + 1000), 7.0, dtype=t.dtype, device=t.device)[
            ..., : t.shape[-1]
        ].copy_(t)
    if how == "expanded" and t.shape[0]:
        return t[:1].expand_as(t)
    return t


layouts = st.sampled_from(["contiguous", "transposed", "strided", "far apart", "expanded"])


@st.composite
def layers(draw: Any, largest: int = 9, dtypes: Any = (torch.float32, torch.float64, *HALF)) -> dict[str, Any]:
    """Operands of the op, the incoming gradient, and what wants a gradient."""
    sizes = st.integers(0, largest) | st.sampled_from([0, 1, largest])
    N, K, R = draw(sizes), draw(sizes), draw(st.integers(1, largest))
    lead = draw(st.lists(sizes, min_size=0, max_size=3))
    dtype = draw(st.sampled_from(dtypes))
    factors = draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)]))
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def tensor(*shape: int, of: torch.dtype = dtype) -> Tensor:
        made = torch.randn(shape, generator=gen, dtype=torch.float64).to(DEVICE, of)
        return lay_out(made, draw(layouts)) if shape else made

    tensors = {
        "x": tensor(*lead, K),
        "weight": tensor(N, K),
        "down": tensor(R, K, of=factors),
        "up": tensor(N, R, of=factors),
        "bias": tensor(N) if draw(st.booleans()) else None,
    }
    wants = {name for name in NAMES if tensors[name] is not None and draw(st.booleans())}
    return {"tensors": tensors, "dy": tensor(*lead, N), "wants": wants, "dtype": dtype}


def plain(x: Tensor, weight: Tensor, down: Tensor, up: Tensor, bias: Any, scale: float, dropout: float) -> Tensor:
    """The formula, as people write it."""
    dropped = x
    if dropout:
        p = quantized_rate(dropout)
        rows = math.prod(x.shape[:-1])
        dropped = x * reference.keep_mask(SEED.to(x.device), p, rows, x.shape[-1]).view(x.shape) * (1 / (1 - p))
    h = scale * (dropped @ down.to(x.dtype).T)
    y = x @ weight.T
    return (y if bias is None else y + bias) + h @ up.to(x.dtype).T


def run(function: Any, drawn: dict[str, Any], how: Any = lambda t: t, **options: Any) -> dict[str, Tensor]:
    """y, and the gradient of whatever wants one"""
    tensors = {k: t if t is None else how(t.detach()) for k, t in drawn["tensors"].items()}
    for name in drawn["wants"]:
        tensors[name].requires_grad_()
    y = function(**tensors, **options)
    found = {"y": y.detach()}
    if drawn["wants"]:
        leaves = sorted(drawn["wants"])
        grads = torch.autograd.grad(y, [tensors[k] for k in leaves], how(drawn["dy"]), allow_unused=True)
        found |= {k: torch.zeros_like(tensors[k]) if g is None else g for k, g in zip(leaves, grads, strict=True)}
    else:
        assert not y.requires_grad
    return found


def ours(scale: float, dropout: float) -> dict[str, Any]:
    return {"scale": scale, "dropout": dropout, "seed": SEED.to(DEVICE) if dropout else None}


def allowed(bound: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding may cost where the sum of absolute terms is ``bound``: a few roundings, and float32 sums."""
    wide = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    return (8 * torch.finfo(dtype).eps + 64 * wide) * bound + 8 * torch.finfo(dtype).smallest_normal


def within_rounding(drawn: dict[str, Any], scale: float, dropout: float) -> None:
    found = run(lowrank_linear, drawn, **ours(scale, dropout))
    truth = run(plain, drawn, torch.Tensor.double, scale=scale, dropout=dropout)
    bound = run(plain, drawn, lambda t: t.double().abs(), scale=abs(scale), dropout=dropout)
    for name, value in found.items():
        like = drawn["dy"] if name == "y" else drawn["tensors"][name]
        assert value.shape == like.shape and value.dtype == like.dtype, name
        error = (value.double() - truth[name]).abs()
        assert (error <= allowed(bound[name], drawn["dtype"])).all(), f"{name}: {error.max()}"


@pytest.mark.parametrize("backend", BACKENDS)
@common
@given(drawn=layers(), scale=st.sampled_from([0.0, 1.0, -2.5, 0.125]), dropout=st.sampled_from([0.0, 0.3]))
def test_any_shape_stride_dtype_and_gradient(backend, drawn, scale, dropout):
    event(f"{drawn['dtype']}")
    with ops.backend(backend):
        within_rounding(drawn, scale, dropout)


@pytest.mark.parametrize("backend", BACKENDS)
@common
@given(data=st.data(), drawn=layers(6, (torch.float32, *HALF)), scale=st.sampled_from([1.0, 0.5]))
def test_nan_and_inf_go_where_eager_takes_them(backend, data, drawn, scale):
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from([k for k in (*NAMES, "dy") if k == "dy" or drawn["tensors"][k] is not None]))
        t = (drawn["dy"] if name == "dy" else drawn["tensors"][name]).contiguous().clone()
        assume(t.numel())
        where, value = data.draw(st.integers(0, t.numel() - 1)), data.draw(st.sampled_from(ODD))
        t.view(-1)[where] = value
        if name == "dy":
            drawn["dy"] = t
        else:
            drawn["tensors"][name] = t
    eager = run(plain, drawn, scale=scale, dropout=0.0)
    with ops.backend(backend):
        found = run(lowrank_linear, drawn, **ours(scale, 0.0))
    for name, value in found.items():
        assert torch.equal(value.isnan(), eager[name].isnan()), name
        infinite = value.isinf()
        assert torch.equal(infinite, eager[name].isinf()), name
        assert torch.equal(value[infinite].sign(), eager[name][infinite].sign()), name


@pytest.mark.parametrize("backend", BACKENDS)
@common
@given(drawn=layers(8, (torch.float16,)), powers=st.lists(st.integers(-14, 10), min_size=5, max_size=5))
def test_float16_overflows_no_sooner_than_eager_and_never_quietly(backend, drawn, powers):
    drawn["wants"] = set()
    for (name, t), power in zip(drawn["tensors"].items(), powers, strict=True):
        if t is not None:
            drawn["tensors"][name] = t * 2.0**power
            assume(bool(drawn["tensors"][name].isfinite().all()))
    with ops.backend(backend):
        y = run(lowrank_linear, drawn, **ours(1.0, 0.0))["y"]
    t = {k: v if v is None else v.double() for k, v in drawn["tensors"].items()}
    sizes = {k: v if v is None else v.abs() for k, v in t.items()}
    bound = plain(**sizes, scale=1.0, dropout=0.0)
    inner = (sizes["x"] @ sizes["down"].T).amax(-1, keepdim=True) if t["x"].numel() else bound
    safe = (bound < 6e4) & (inner < 6e4)
    assert y[safe].isfinite().all()
    truth = plain(**t, scale=1.0, dropout=0.0)
    lost = 65536.0 * 2.0**-24 * sum(s.amax().item() if s is not None and s.numel() else 0 for s in sizes.values()) * 8
    slack = allowed(bound, torch.float16) + lost  # factors below float16's normal range are coarser
    assert ((y.double() - truth).abs() <= slack)[safe].all()
    assert not y[truth.abs() > 1.1 * 65504 + slack].isfinite().any()
    eager = run(plain, drawn, scale=1.0, dropout=0.0)["y"]
    assert not (y.isnan() & eager.isfinite()).any()


# ---------------------------------------------------------------------------------- whole models


class Block(nn.Module):
    """Siblings, a shared layer and a plain one."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        self.out = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.out(self.q_proj(x) * self.k_proj(x).tanh() + self.v_proj(x)))
        return x


@st.composite
def adapted(draw: Any) -> dict[str, Any]:
    width, inner = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rank = draw(st.integers(1, min(width, inner)))
    alpha = draw(st.sampled_from([0.5, 1.0, 16.0]))
    method = draw(
        st.sampled_from(
            [
                fl.LoRA(rank=rank, alpha=alpha, rslora=draw(st.booleans())),
                fl.LoRA(rank=rank, alpha=alpha, penalties=(fl.Decay(0.1), fl.WeightDeviation(0.1))),
                fl.CLoRA(rank=rank, alpha=alpha, k=draw(st.integers(1, 12))),
                fl.CURLoRA(rank=rank, alpha=alpha),
                fl.LaLoRA(rank=rank, alpha=alpha),
            ]
        )
    )
    seed, bias = draw(st.integers(0, 999)), draw(st.booleans())
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    targets = draw(st.sampled_from(["all-linear", ["q_proj", "v_proj"], "out", "[qk]_proj"]))

    def make() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return Block(width, inner, bias).to(dtype)

    gen = torch.Generator().manual_seed(seed)
    x = torch.randn(draw(st.integers(0, 4)), draw(st.integers(0, 3)), width, generator=gen).to(dtype)
    return {"make": make, "method": method, "targets": targets, "x": x, "gen": gen, "dtype": dtype}


def stirred(drawn: dict[str, Any]) -> nn.Module:
    try:
        model = fl.adapt(drawn["make"](), drawn["method"], drawn["targets"])
    except ValueError as error:  # a method may refuse a layer, in words
        assert str(error)
        assume(False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn(p.shape, generator=drawn["gen"]).to(p.dtype))
    return model


@common
@given(drawn=adapted())
def test_a_model_starts_as_it_was_and_comes_back(drawn):
    base = drawn["make"]()
    want = base(drawn["x"])
    weights = {name: p.detach().clone() for name, p in base.named_parameters()}
    try:
        fl.adapt(base, drawn["method"], drawn["targets"])
    except ValueError:
        assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
        assume(False)
    if drawn["dtype"] == torch.bfloat16:  # x @ W.T may be rounded once more before the bias
        torch.testing.assert_close(base(drawn["x"]), want, rtol=0.0, atol=8 * torch.finfo(torch.bfloat16).eps)
    else:
        torch.testing.assert_close(base(drawn["x"]), want)
    fl.remove(base)
    assert [name for name, _ in base.named_parameters()] == list(weights)
    assert all(torch.equal(p, weights[name]) for name, p in base.named_parameters())
    assert torch.equal(base(drawn["x"]), want)


@common
@given(drawn=adapted())
@pytest.mark.filterwarnings("ignore:Laplace has no statistics")
def test_saved_and_loaded_it_is_the_same(drawn):
    model = stirred(drawn)
    with tempfile.TemporaryDirectory() as folder:
        fl.save(model, folder)
        again = fl.load(drawn["make"](), folder)
    ours, theirs = model.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(again(drawn["x"]), model(drawn["x"]))
    assert torch.equal(fl.penalty(again), fl.penalty(model))


@common
@given(drawn=adapted())
def test_merging_drifts_by_one_rounding_of_the_weight(drawn):
    """Bound: half a unit in the last place of each merged weight, and nothing else."""
    model = stirred(drawn)
    layers = fl.adapters(model)
    exact = {name: layer.weight.double() + layer.delta().double() for name, layer in layers.items()}
    parts = {name: layer.weight.double().abs() + layer.delta().double().abs() for name, layer in layers.items()}
    fl.merge(model)
    eps = torch.finfo(drawn["dtype"]).eps
    wide = torch.finfo(torch.promote_types(drawn["dtype"], torch.float32)).eps
    for name, want in exact.items():
        apart = (model.get_submodule(name).weight.double() - want).abs()
        assert (apart <= eps / 2 * want.abs() + wide * parts[name] + torch.finfo(drawn["dtype"]).tiny).all(), name
    assert type(model.out) is nn.Linear and not fl.adapters(model)
