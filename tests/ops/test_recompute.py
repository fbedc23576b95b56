"""An input that is a product of what autograd keeps anyway is made again, bit for bit; any other is kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import forgetless as fl
from forgetless.ops import recompute
from forgetless.ops.add_lowrank import Term, add_terms
from forgetless_bench.bytes import saved_bytes

M, H, K = 33, 16, 24


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", 0)


class GatedMLP(nn.Module):
    """What Llama, Mistral, Qwen and Gemma have; ``last`` can be called twice as siblings are."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(H, K), nn.Linear(H, K), nn.Linear(K, H)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def adapted(dropout: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    model = fl.adapt(GatedMLP().to(dtype), fl.LoRA(rank=4, dropout=dropout), "all-linear").train()
    for layer in fl.adapters(model).values():
        nn.init.normal_(layer.adapter.up)
    return model


def gradients(model: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    (model if run is None else run)(leaf).float().pow(2).sum().backward()
    found = [leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)]
    model.zero_grad()
    return found


def same(one, other) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("shape", [(M, H), (3, 11, H)])
def test_the_same_gradients_from_fewer_bytes(monkeypatch, dropout, dtype, shape):
    model, x = adapted(dropout, dtype), torch.randn(shape).to(dtype)
    mine = gradients(model, x)
    less = saved_bytes(lambda: model(x.clone().requires_grad_()), [model])
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    same(mine, gradients(model, x))
    more = saved_bytes(lambda: model(x.clone().requires_grad_()), [model])
    assert more - less == M * K * x.element_size()


def test_siblings_of_a_product(monkeypatch):
    class Siblings(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj = nn.Linear(K, H), nn.Linear(K, 8)
            self.weight = nn.Parameter(torch.randn(M, K))

        def forward(self, x):
            x = x.exp() * self.weight
            return torch.cat([self.q_proj(x), self.k_proj(x)], 1)

    torch.manual_seed(0)
    model = fl.adapt(Siblings(), fl.LoRA(rank=4), "all-linear")
    model.weight.requires_grad_(True)
    assert fl.adapters(model)["q_proj"].group is not None
    x = torch.randn(M, K)
    mine = gradients(model, x)
    less = saved_bytes(lambda: model(x.clone().requires_grad_()), [model])
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    same(mine, gradients(model, x))
    assert saved_bytes(lambda: model(x.clone().requires_grad_()), [model]) - less == M * K * 4


def test_onto_a_layer_that_runs_itself(monkeypatch):
    torch.manual_seed(0)
    base, down, up = nn.Linear(K, H).requires_grad_(False), torch.randn(4, K), torch.randn(H, 4)
    a, b = torch.randn(M, K, requires_grad=True), torch.randn(M, K, requires_grad=True)
    leaves = [t.requires_grad_() for t in (down, up)]

    def forward():
        return add_terms(base, a.exp() * b.exp(), [Term(down, up, 2.0)])[0]

    mine = torch.autograd.grad(forward().pow(2).sum(), [a, b, *leaves])
    less = saved_bytes(forward, [base])
    monkeypatch.setattr(recompute, "SMALL", 1 << 60)
    same(mine, torch.autograd.grad(forward().pow(2).sum(), [a, b, *leaves]))
    assert saved_bytes(forward, [base]) - less == M * K * 4


@pytest.mark.parametrize(
    "make",
    [
        lambda a, b: a + b,
        lambda a, b: a * 2.0,
        lambda a, b: a * b.detach(),  # then only b is held
        lambda a, b: a * b[:1],
        lambda a, b: a * b.double(),
        lambda a, b: (a * b).view(K, M),
        lambda a, b: (a * b).add_(1.0),
        lambda a, b: a.clone().requires_grad_(),
        lambda a, b: (a * b).detach(),
    ],
)
def test_any_other_input_is_kept(make):
    a, b = (torch.randn(M, K, requires_grad=True).exp() for _ in range(2))
    assert recompute.product_of(make(a, b)) is None
    assert recompute.product_of(a * b) is not None


def test_an_input_changed_without_autograd_is_kept():
    a, b = (torch.randn(M, K, requires_grad=True).exp() for _ in range(2))
    x = a * b
    with torch.no_grad():
        x.mul_(2.0)
    assert x.grad_fn.name() == "MulBackward0" and recompute.product_of(x) is None


def test_small_ones_are_kept(monkeypatch):
    monkeypatch.setattr(recompute, "SMALL", M * K + 1)
    a, b = (torch.randn(M, K, requires_grad=True).exp() for _ in range(2))
    assert recompute.product_of(a * b) is None


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Without reentry what is saved unpacks once only."""
    model, x = adapted(0.25, torch.float32), torch.randn(M, H)
    same(gradients(model, x), gradients(model, x, lambda t: checkpoint(model, t, use_reentrant=reentrant)))


def test_checkpointing_the_activation_alone():
    model, x = adapted(0.0, torch.float32), torch.randn(M, H)

    def run(t):
        gated = checkpoint(lambda u: F.silu(model.gate_proj(u)) * model.up_proj(u), t, use_reentrant=False)
        return model.down_proj(gated)

    same(gradients(model, x), gradients(model, x, run))


def test_offloading():
    model, x = adapted(0.0, torch.float32), torch.randn(M, H)

    def run(t):
        with torch.autograd.graph.save_on_cpu():
            return model(t)

    same(gradients(model, x), gradients(model, x, run))


def test_two_backward_passes_over_a_retained_graph():
    model, x = adapted(0.0, torch.float32), torch.randn(M, H)
    once = gradients(model, x)
    loss = model(x.clone().requires_grad_()).pow(2).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(model.down_proj.adapter.down.grad, 2 * [*once][-2], rtol=1e-5, atol=1e-5)


def test_a_factor_changed_in_place_is_noticed():
    a, b = (torch.randn(M, K, requires_grad=True).exp() for _ in range(2))
    model = adapted(0.0, torch.float32)
    y = model.down_proj(a * b)
    with torch.no_grad():
        b.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
