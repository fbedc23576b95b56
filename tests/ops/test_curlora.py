"""CURLoRA's shortcut computes what the factors compute, from columns of products that are there already."""

import copy

import pytest
import torch
from helpers import assert_as_good_as_eager
from torch import nn

import forgetless as fl
from forgetless.methods import Adapter
from forgetless.ops import blas

ALPHA = 1.5


def layer(bias=True, dtype=torch.float64, conv=False, rank=4):
    torch.manual_seed(0)
    if conv:
        base = pytest.importorskip("transformers.pytorch_utils").Conv1D(20, 24)
    else:
        base = nn.Linear(24, 20, bias=bias)
    net = nn.Sequential(base.to(dtype))
    if bias:
        nn.init.normal_(base.bias)
    model = fl.adapt(net, fl.CURLoRA(rank, ALPHA), ["0"])
    nn.init.normal_(model[0].adapter.core, std=0.3)
    return model


def plain(model, monkeypatch):
    """The same layer by its factors."""
    other = copy.deepcopy(model)
    monkeypatch.setattr(other[0].adapter, "shortcut", Adapter.shortcut.__get__(other[0].adapter))
    return other


def run(model, x, penalty=False, need_x=True):
    x = x.clone().requires_grad_(need_x)
    loss = model(x).square().sum() + (fl.penalty(model) if penalty else 0)
    wanted = ([x] if need_x else []) + [model[0].adapter.core]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (24,), (0, 24)], ids=str)
@pytest.mark.parametrize("need_x", [False, True])
def test_it_is_the_layer_of_the_factors(shape, bias, conv, need_x, monkeypatch):
    model = layer(bias, conv=conv)
    assert "gathered" in fl.explain(model)["0"].reason
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(
        run(model, x, need_x=need_x), run(plain(model, monkeypatch), x, need_x=need_x), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_the_output_deviation_reaches_x_through_it(monkeypatch):
    torch.manual_seed(0)
    method = fl.CURLoRA(4, ALPHA, penalties=(fl.OutputDeviation(0.7),))
    model = fl.adapt(nn.Sequential(nn.Linear(24, 20).double()), method, ["0"])
    nn.init.normal_(model[0].adapter.core, std=0.3)
    x = torch.randn(7, 24, dtype=torch.float64)
    for ours, theirs in zip(run(model, x, True), run(plain(model, monkeypatch), x, True), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradients_are_right():
    model = layer()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, core: model(x), (x, model[0].adapter.core))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", [0.0, 50.0])
def test_a_large_bias_does_not_hurt(dtype, offset):
    """The gather is from the product before the bias: afterwards 50 would swallow the digits."""
    model = layer(dtype=dtype)
    nn.init.constant_(model[0].base.bias, offset)
    truth = copy.deepcopy(model).double()
    truth[0].adapter.core = nn.Parameter(model[0].adapter.core.detach().double())
    x = torch.randn(64, 24).to(dtype)

    def update(net, x):
        return net[0].adapter.shortcut(x, net[0].weight, net[0].bias)[1]

    eager = (ALPHA * (x @ model[0].adapter.down.T)).detach()
    assert_as_good_as_eager(update(model, x).detach(), eager, update(truth, x.double()).detach())


def test_x_is_not_kept_and_no_skinny_product_is_made(monkeypatch):
    model = layer()
    for name in ("project", "outer", "project_outer", "linear_lowrank"):
        monkeypatch.setattr(blas, name, None)
    saved = []
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert not [t for t in saved if t.shape == x.shape or t.shape == y.shape]
    assert sum(t.numel() for t in saved if t.shape[0] == 50) == 50 * 4


def test_a_changed_weight_goes_by_the_factors(monkeypatch):
    model = layer()
    x = torch.randn(7, 24, dtype=torch.float64)
    model(x)
    fl.consolidate(model)
    nn.init.normal_(model[0].adapter.core, std=0.3)
    assert "gathered" not in fl.explain(model)["0"].reason
    for ours, theirs in zip(run(model, x), run(plain(model, monkeypatch), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    copied = copy.deepcopy(model)
    assert "gathered" not in fl.explain(copied)["0"].reason
    torch.testing.assert_close(copied(x), model(x))


def test_a_copy_takes_the_shortcut_too():
    model = copy.deepcopy(layer())
    assert "gathered" in fl.explain(model)["0"].reason
