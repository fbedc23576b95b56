"""What watches or vectorises products: FLOP counters, selective checkpointing, batched gradients; float16's range."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import forgetless as fl
from forgetless.ops import dispatch

M, N, K, R = 6, 20, 24, 4
BACKENDS = ["blas", "reference"] + (["triton"] if dispatch.kernels is not None else [])


class Attention(nn.Module):
    def __init__(self, bias: bool = True):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(K, N, bias), nn.Linear(K, N, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x)


def adapted(bias: bool = True, dtype: torch.dtype = torch.float32, **method: Any) -> nn.Module:
    torch.manual_seed(0)
    model = fl.adapt(Attention(bias).to(dtype), fl.LoRA(R, **method), "all-linear")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.copy_(torch.randn_like(p) / 4)
    return model.train()


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@pytest.mark.parametrize("backend", ["blas", "reference"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_flop_counter_sees_every_product(bias, backend):
    model, x = adapted(bias), torch.randn(M, K, requires_grad=True)
    with dispatch.backend(backend):
        with FlopCounterMode(display=False) as forward:
            y = model(x)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    assert forward.get_total_flops() == 2 * 2 * M * (N * K + R * (N + K))
    # reference and blas make dx of the siblings' low-rank terms at once
    assert backward.get_total_flops() == 2 * 2 * M * (N * K + 2 * R * (N + K))


MM, ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("kept", [[MM], [ADDMM], [MM, ADDMM]], ids=["mm", "addmm", "both"])
def test_selective_checkpointing_that_keeps_products(kept, dropout, bias, backend):
    """Nothing that a tool may have kept is written to."""
    model, x = adapted(bias, dropout=dropout), torch.randn(M, K, requires_grad=True)
    contexts = functools.partial(create_selective_checkpoint_contexts, kept)

    def grads(run: Any) -> tuple[Tensor, ...]:
        torch.manual_seed(1)
        return torch.autograd.grad(run(x).square().sum(), [x, *trained(model)])

    with dispatch.backend(backend):
        plain = grads(model)
        again = grads(lambda x: checkpoint(model, x, use_reentrant=False, context_fn=contexts))
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(M, K), (2, 3, K)], ids=str)
def test_batched_gradients(shape, backend):
    """torch.autograd.grad(is_grads_batched=True), as Jacobians are computed: it vectorises plain torch only."""
    model, x = adapted(), torch.randn(shape, requires_grad=True)
    with dispatch.backend(backend):
        y = model(x)
        dys = torch.randn(5, *y.shape)
        leaves = [x, *trained(model)]
        together = torch.autograd.grad(y, leaves, dys, is_grads_batched=True, retain_graph=True)
        apart = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for batched, single in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(batched, torch.stack(single), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "k_proj"]], ids=["alone", "siblings"])
def test_a_large_scale_leaves_float16_finite(targets, backend):
    """scale * h is beyond 65504 where y is not: alpha / R = 4096 over a small B, as with a large alpha."""
    torch.manual_seed(0)
    model = fl.adapt(Attention().half(), fl.LoRA(R, alpha=4096.0 * R), targets).train()
    with torch.no_grad():
        for name in targets:
            adapter = model.get_submodule(name).adapter
            adapter.down.fill_(1.0)
            adapter.up.fill_(2.0**-14)
    x = torch.full((M, K), 2.0, dtype=torch.float16, requires_grad=True)  # h = 48, scale * h = 196608
    with dispatch.backend(backend):
        y = model.q_proj(x)
        exact = model.q_proj.base(x).double() + 4096 * R * 48 * 2.0**-14
        grads = torch.autograd.grad(model(x).float().mean(), [x, *trained(model)])
    torch.testing.assert_close(y.double(), exact, rtol=2e-3, atol=2e-3)
    assert all(grad.isfinite().all() and grad.any() for grad in grads)


def freed(a: Tensor, gate: Tensor, x: Tensor) -> None:
    x.sum().backward()  # an auxiliary loss on the activations


def zeroed(a: Tensor, gate: Tensor, x: Tensor) -> None:
    with torch.no_grad():
        gate.zero_()


def clamped(a: Tensor, gate: Tensor, x: Tensor) -> None:
    x.data.clamp_(-0.5, 0.5)


def replaced(a: Tensor, gate: Tensor, x: Tensor) -> None:
    x.data = (x.data * 4).round() / 4


def written_by_numpy(a: Tensor, gate: Tensor, x: Tensor) -> None:
    x.detach().numpy().__imul__(0.5)


@pytest.mark.parametrize("change", [freed, zeroed, clamped, replaced, written_by_numpy])
def test_gradients_of_the_factors_are_of_the_input_as_it_is_saved(change):
    """The product that made the input may have been given up or changed since, or the input past its version."""
    weight, grads = torch.randn(24, 64), []

    def plain(x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        return x @ weight.T + x @ down.T @ up.T

    for layer in (plain, fl.ops.lowrank_linear):
        torch.manual_seed(1)
        down, up, a, b = (torch.randn(n, k, requires_grad=True) for n, k in ((4, 64), (24, 4), (256, 64), (256, 64)))
        gate = b.exp()
        x = a.tanh() * gate
        if change in (freed, zeroed):  # after the layer
            y = layer(x, weight, down, up)
            change(a, gate, x)
        else:
            change(a, gate, x)
            y = layer(x, weight, down, up)
        grads.append(torch.autograd.grad(y.sum(), [down, up]))
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-3)
