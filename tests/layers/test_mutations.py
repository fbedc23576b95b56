"""A fuzz: everything a user can change between two calls is changed, and each result is compared with plain PyTorch.

Siblings share what they compute inside a call of their parent, so a change between them is where a stale result would
show.
"""

from __future__ import annotations

import contextlib
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import forgetless as fl
from forgetless.layers import groups
from forgetless.ops import add_lowrank, autograd, dispatch, reference

CALLS = 10_000
K = 12
SEED = torch.tensor([11, -5], dtype=torch.int32)
NAMES = ("q_proj", "k_proj", "v_proj")


class Attention(nn.Module):
    """Calls what it is told to, with what it is told to do in between."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(K, 8), nn.Linear(K, 6), nn.Linear(K, 6, bias=False)
        self.plan: list[Any] = []
        self.expected: list[Tensor] | None = None  # of each call, by the formula, at once

    def forward(self, x: Tensor) -> list[Tensor]:
        results = []
        for step in self.plan:
            if isinstance(step, str):
                results.append(getattr(self, step)(x))
                if self.expected is not None:
                    self.expected.append(expected(getattr(self, step), x))
            else:
                x = step(x)
        return results


def expected(layer: Any, x: Tensor) -> Tensor:
    """The formula, by what the layer is now: its base's own forward, hooks and all, and the low-rank term."""
    adapter = layer.adapter
    down, up = adapter.factors()
    p = autograd.quantized_rate(adapter.dropout if layer.training else 0.0)
    dropped = x
    if p:
        keep = reference.keep_mask(SEED, p, x.numel() // x.shape[-1], x.shape[-1]).view(x.shape)
        dropped = x * keep / (1 - p)
    y = layer.base(x)
    low = nn.functional.linear(nn.functional.linear(dropped, down.to(x.dtype)), up.to(x.dtype))
    return y + adapter.scale * low.to(y.dtype)


class Fuzz:
    def __init__(self, seed: int):
        self.random = random.Random(seed)
        torch.manual_seed(seed)
        rank = self.random.choice([1, 3])
        self.method = self.random.choice([fl.LoRA(rank, alpha=2.0), fl.CLoRA(rank, k=4), fl.CURLoRA(rank, alpha=0.7)])
        self.model = fl.adapt(Attention().double(), self.method, "all-linear").train()
        self.handles: list[Any] = []
        self.changed = False  # between two siblings, what a backward pass would read
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn_like(p) / 2)

    @property
    def layers(self) -> list[Any]:
        return [getattr(self.model, name) for name in NAMES]

    # ---- what a user can do to a layer

    def change(self, unseen: bool = True) -> None:
        """``unseen``: also in ways that leave no trace, which siblings notice only after their parent has returned."""
        layer = self.random.choice(self.layers)
        adapter, base = layer.adapter, layer.base
        tensors = [p for p in (*adapter.parameters(), *base.parameters())]
        tensor = self.random.choice(tensors)
        what = self.random.randrange(13)
        with torch.inference_mode(False), torch.no_grad():
            if what == 0:
                adapter.scale = self.random.choice([0.0, 0.5, 1.0, -2.0])
            elif what == 1:
                tensor.mul_(1.5).clamp_(-2, 2)
            elif what == 2:
                tensor.data = torch.randn_like(tensor) / 2
            elif what == 3 and unseen:
                tensor.data.add_(0.25)  # autograd's version does not see this
            elif what == 4:
                self.random.choice(list(adapter.parameters())).requires_grad_(self.random.random() < 0.7)
            elif what == 5:
                for parameter in base.parameters():
                    parameter.requires_grad_(self.random.random() < 0.3)
            elif what == 6:
                base.bias = None if base.bias is not None else nn.Parameter(torch.randn(base.out_features).double())
            elif what == 7:
                name = self.random.choice([name for name, _ in adapter.named_parameters()])
                old = getattr(adapter, name)
                setattr(adapter, name, nn.Parameter(torch.randn_like(old) / 2))
            elif what == 8 and not isinstance(self.method, fl.CURLoRA):
                adapter.dropout = self.random.choice([0.0, 0.25, 0.5])
            elif what == 9:
                layer.train(self.random.random() < 0.5)
            elif what == 10:
                self.hook(base)
            elif what == 11:
                base.weight.data = base.weight.data.clone().t().contiguous().t()
            elif what == 12:
                base.forward = (lambda plain: lambda x: 2 * plain(x))(type(base).forward.__get__(base))

    def hook(self, base: nn.Module) -> None:
        if self.handles or "forward" in base.__dict__:
            self.restore()
        elif self.random.random() < 0.5:
            self.handles.append(base.register_forward_hook(lambda module, args, y: y + 1.0))
        else:
            self.handles.append(base.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,)))

    def restore(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        for layer in self.layers:
            layer.base.__dict__.pop("forward", None)

    # ---- what can happen to x between siblings

    def between(self, x: Tensor) -> Tensor:
        what = self.random.randrange(7)
        if what == 0:
            self.changed = True
            self.change(unseen=False)
        elif what == 1 and not (x.requires_grad and x.is_leaf):
            self.changed = True
            with torch.no_grad():
                x.mul_(1.25)
        elif what == 2:
            return x.clone()
        elif what == 3:
            return x + 0.5
        elif what == 4:
            self.changed = True
            x.data = x.data + 0.5
        elif what == 5:
            return x.detach()
        return x

    # ---- one call of the parent

    def step(self) -> int:
        rng = self.random
        order = list(NAMES) if rng.random() < 0.6 else [rng.choice(NAMES) for _ in range(rng.randrange(1, 5))]
        shape = rng.choice([(5, K), (2, 3, K), (K,), (0, K)])
        x = torch.randn(shape, dtype=torch.float64)
        mode = rng.choice(["grad"] * 4 + ["no_grad", "inference"])
        leaf = x.requires_grad_(mode == "grad" and rng.random() < 0.7)
        self.model.plan = []
        for name in order:
            self.model.plan += [name, self.between] if rng.random() < 0.4 else [name]
        leaves = [p for p in (leaf, *self.model.parameters()) if p.requires_grad]
        self.changed, self.model.expected = False, []
        with {"grad": contextlib.nullcontext, "no_grad": torch.no_grad, "inference": torch.inference_mode}[mode]():
            given = leaf.clone() if rng.random() < 0.5 else leaf  # the result of an operation, or a leaf
            results = list(zip(self.model(given), self.model.expected, strict=True))
        self.model.expected = None
        for ours, plain in results:
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)
        if mode == "grad" and not self.changed:
            self.backward(results, leaves)
        return len(order)

    def backward(self, results: list[tuple[Tensor, Tensor]], leaves: list[Tensor]) -> None:
        """Of all results at once, or of each by itself."""
        pairs = [(ours, plain) for ours, plain in results if plain.requires_grad]
        dys = [torch.randn_like(plain) for _, plain in pairs]
        if not pairs or not leaves:
            return
        apart = self.random.random() < 0.5

        def grads(which: int) -> list[Tensor]:
            total = [torch.zeros_like(leaf) for leaf in leaves]
            ys = [pair[which] for pair in pairs]
            for group, dy in zip([[y] for y in ys], [[dy] for dy in dys], strict=True) if apart else [(ys, dys)]:
                for sum_, grad in zip(total, torch.autograd.grad(group, leaves, dy, allow_unused=True), strict=True):
                    if grad is not None:
                        sum_ += grad
            return total

        for ours, plain in zip(grads(0), grads(1), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-8, atol=1e-8)


@pytest.fixture
def one_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every dropout mask is drawn from one seed, so that the formula can use the same."""
    for module in (autograd, groups, add_lowrank):
        monkeypatch.setattr(module, "draw_seed", lambda device: SEED)


@pytest.mark.parametrize("backend", ["blas", "reference"])
def test_no_change_between_calls_is_missed(backend, one_mask):
    calls, seed = 0, 0
    with dispatch.backend(backend):
        while calls < CALLS // 2:
            fuzz, seed = Fuzz(seed), seed + 1
            for _ in range(12):
                try:
                    calls += fuzz.step()
                except AssertionError as error:
                    raise AssertionError(f"seed {seed - 1}, {fuzz.method}: {error}") from error
                for _ in range(fuzz.random.randrange(3)):
                    fuzz.change()
            fuzz.restore()
    assert calls >= CALLS // 2


def test_the_fuzz_finds_a_stale_result(one_mask, monkeypatch):
    """With a core that trusts what it computed earlier in the call, the fuzz fails."""
    monkeypatch.setattr(groups.State, "same", lambda self, other: True)
    monkeypatch.setattr(groups, "_call", lambda x, dropout: None)
    with pytest.raises(AssertionError, match="not close"):
        for seed in range(200):
            fuzz = Fuzz(seed)
            for _ in range(12):
                fuzz.step()
                fuzz.change()
            fuzz.restore()


def test_recomputing_finds_the_same_numbers(one_mask):
    """Non-reentrant checkpointing of the parent, changed between steps."""
    for seed in range(20):
        fuzz = Fuzz(seed)
        fuzz.model.plan = list(NAMES)
        x = torch.randn(4, K, dtype=torch.float64, requires_grad=True)
        wanted = [x, *(p for p in fuzz.model.parameters() if p.requires_grad)]

        def run(x: Tensor, model: nn.Module = fuzz.model) -> Tensor:
            return torch.cat(model(x), -1)

        plain = torch.autograd.grad(run(x).square().sum(), wanted)
        again = torch.autograd.grad(checkpoint(run, x, use_reentrant=False).square().sum(), wanted)
        for a, b in zip(plain, again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
