"""CURLoRA on the op: values, gradients and what is saved."""

import copy

import pytest
import torch
from torch import nn

import forgetless as fl

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


class Plain(nn.Module):
    """The same layer by the formula of the paper: y = x @ (W + alpha C U R).T + b."""

    def __init__(self, layer):
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.adapter = self.layer.adapter

    def forward(self, x):
        adapter, weight = self.adapter, self.layer.weight
        core = adapter.core.T if self.layer.transposed else adapter.core
        weight = weight.T if self.layer.transposed else weight
        return nn.functional.linear(x, weight + ALPHA * adapter.lift @ core @ adapter.down, self.layer.bias)


def plain(model):
    return nn.Sequential(Plain(model[0]))


def run(model, x, penalty=False, need_x=True):
    x = x.clone().requires_grad_(need_x)
    loss = model(x).square().sum() + (fl.penalty(model) if penalty else 0)
    wanted = ([x] if need_x else []) + [model[0].adapter.core]
    return [loss.detach(), *torch.autograd.grad(loss, wanted)]


@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 3, 24), (24,), (0, 24)], ids=str)
@pytest.mark.parametrize("need_x", [False, True])
def test_it_is_the_layer_of_the_factors(shape, bias, conv, need_x):
    model = layer(bias, conv=conv)
    x = torch.randn(shape, dtype=torch.float64)
    for ours, theirs in zip(run(model, x, need_x=need_x), run(plain(model), x, need_x=need_x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradients_are_right():
    model = layer()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, core: model(x), (x, model[0].adapter.core))


def test_x_is_not_saved():
    model = layer()
    saved = []
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = model(x)
    y.sum().backward()
    assert not [t for t in saved if t.shape == x.shape or t.shape == y.shape]
    assert sum(t.numel() for t in saved if t.shape[0] == 50) == 50 * 4


def test_a_changed_weight_does_not_move_the_factors():
    """C and R stay those of the first weight."""
    model = layer()
    x = torch.randn(7, 24, dtype=torch.float64)
    down, lift = model[0].adapter.down.clone(), model[0].adapter.lift.clone()
    fl.consolidate(model)
    nn.init.normal_(model[0].adapter.core, std=0.3)
    assert torch.equal(model[0].adapter.down, down) and torch.equal(model[0].adapter.lift, lift)
    for ours, theirs in zip(run(model, x), run(plain(model), x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_siblings_are_right_together_and_apart():
    """q, k, v of one x, each with rows and columns of its own; their backward passes may run one by one."""
    torch.manual_seed(0)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(24, n, dtype=torch.float64) for n in (20, 12, 12))

        def forward(self, x):
            return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], -1)

    model = fl.adapt(Attention(), fl.CURLoRA(4, ALPHA), "all-linear")
    for module in (model.q_proj, model.k_proj, model.v_proj):
        nn.init.normal_(module.adapter.core, std=0.3)
    x = torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    cores = [m.adapter.core for m in (model.q_proj, model.k_proj, model.v_proj)]
    ours = torch.autograd.grad(model(x).square().sum(), [x, *cores])
    expected = torch.cat([Plain(m)(x) for m in (model.q_proj, model.k_proj, model.v_proj)], -1)
    torch.testing.assert_close(model(x), expected)
    (dx,) = torch.autograd.grad(expected.square().sum(), x)
    torch.testing.assert_close(ours[0], dx)
    assert all(g.abs().sum() > 0 for g in ours[1:])
    model.forward = lambda x: (model.q_proj(x), model.k_proj(x), model.v_proj(x))
    for y, core, grad in zip(model(x), cores, ours[1:], strict=True):
        (alone,) = torch.autograd.grad(y.square().sum(), core)
        torch.testing.assert_close(alone, grad)
