"""Penalties made in the forward pass: the numbers of ``fl.penalty`` without it, and where it steps back."""

from __future__ import annotations

import copy
import gc
import os
import weakref

import pytest
import torch
from kernel_plans import on_kernels
from plain_penalties import plain_value
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import forgetless as fl
from forgetless.penalties.base import PenaltyState
from forgetless_kernels import launcher

PENALTIES = [
    fl.NullSpace(k=5),
    fl.NullSpace(0.5, k=20),  # more than half of some widths, and all of others
    fl.NullSpace(k=6, basis="hadamard"),
    fl.NullSpace(k=28, basis="hadamard"),
    fl.NullSpace(k=6, basis="shared"),
    fl.NullSpace(k=28, basis="shared"),
    fl.WeightDeviation(),
    fl.OutputDeviation(),
    fl.SourceDeviation(),
    fl.SourceDeviation(covariance=3),
]


class Block(nn.Module):
    """Siblings of three widths, and a layer alone."""

    def __init__(self, width: int = 32):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(width, width), nn.Linear(width, 20), nn.Linear(width, 12)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o_proj((self.q_proj(x) + torch.cat((self.k_proj(x), self.v_proj(x)), -1)).tanh())


class Twice(nn.Module):
    def __init__(self, checkpointed: str | None = None):
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList([Block(), Block()]), checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            if self.checkpointed is None:
                x = x + block(x)
            else:
                x = x + checkpoint(block, x, use_reentrant=self.checkpointed == "reentrant")  # type: ignore[operator]
        return x


def build(
    *penalties: fl.penalties.Penalty, dropout: float = 0.0, rank: int = 4, dtype=torch.float64, **options
) -> nn.Module:
    torch.manual_seed(0)
    model = Twice(**options).to(dtype)
    fl.adapt(model, fl.LoRA(rank=rank, dropout=dropout, penalties=penalties))
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.3)
    if any(isinstance(penalty, fl.SourceDeviation) for penalty in penalties):
        fl.calibrate(model, [batch(1, dtype)])
        fl.penalty(model)  # asks whether there are statistics
    return model.train()


def batch(seed: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def step(model: nn.Module, x: Tensor, token_weights: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The penalty of one pass, and all gradients of loss and penalty together"""
    model.zero_grad()
    x.grad = None
    torch.manual_seed(3)
    loss = model(x).square().mean()
    value = fl.penalty(model, token_weights)
    (loss + value).backward()
    return value.detach(), [x.grad.clone(), *[p.grad.clone() for p in model.parameters() if p.grad is not None]]


@pytest.fixture
def paths(monkeypatch) -> list[str]:
    """Which way each kind of penalty was summed"""
    taken: list[str] = []

    def noted(cls, name):
        plain = cls.__dict__[name].__func__

        def total(kind, *arguments):
            taken.append(name)
            return plain(kind, *arguments)

        monkeypatch.setattr(cls, name, classmethod(total))

    todo = [PenaltyState]
    while todo:
        cls = todo.pop()
        todo += cls.__subclasses__()
        for name in ("total", "total_made"):
            if name in cls.__dict__:
                noted(cls, name)
    return taken


def plain_total(model: nn.Module) -> Tensor:
    """The formula of each layer, in plain autograd"""
    layers = fl.adapters(model).values()
    return sum(
        plain_value(s, l.adapter, l.trace and l.trace.hidden) for l in layers for s in l.adapter.penalty_states()
    )


@pytest.mark.parametrize("penalty", PENALTIES, ids=repr)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_same_value_and_gradients(penalty, dropout, paths):
    model, x = build(penalty, dropout=dropout), batch()
    with fl.ops.backend("reference"):
        paths.clear()
        value, grads = step(model, x)
        assert set(paths) == {"total_made"}
        expected, others = step(fl.fuse_penalty(model, False), x)
        assert paths[-1] == "total"
        model.zero_grad()
        x.grad = None
        torch.manual_seed(3)
        loss = model(x).square().mean()
        formula = plain_total(model)
        (loss + formula).backward()
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(value, formula.detach(), rtol=1e-12, atol=0)
    plain = [x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]
    for ours, grouped, formula in zip(grads, others, plain, strict=True):
        torch.testing.assert_close(ours, grouped, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours, formula, rtol=1e-9, atol=1e-12)


def test_several_penalties_on_a_layer(paths):
    model, x = build(*PENALTIES, rank=3), batch()
    with fl.ops.backend("reference"):
        paths.clear()
        value, grads = step(model, x)
        assert set(paths) == {"total_made"}
        expected, others = step(fl.fuse_penalty(model, False), x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, grouped in zip(grads, others, strict=True):
        torch.testing.assert_close(ours, grouped, rtol=1e-9, atol=1e-12)


ALL = (fl.NullSpace(k=5), fl.OutputDeviation(), fl.SourceDeviation(covariance=3))


def changed_factor(model: nn.Module) -> None:
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.up.mul_(2)


def changed_basis(model: nn.Module) -> None:
    for layer in fl.adapters(model).values():
        null, _, source = layer.adapter.penalty_states()
        null.input.basis.mul_(2)
        source.source.rest.mul_(2)


def another_basis(model: nn.Module) -> None:
    for layer in fl.adapters(model).values():
        null, _, source = layer.adapter.penalty_states()
        null.output.basis = null.output.basis * 2
        source.source.basis = source.source.basis.clone()


@pytest.mark.parametrize("change, stale", [(changed_factor, 3), (changed_basis, 2), (another_basis, 2)])
def test_changes_after_the_pass(change, stale, paths):
    """What was made of other tensors is not used; what does not depend on them still is."""
    values = []
    for fused in (True, False):
        model = fl.fuse_penalty(build(*ALL), fused)
        with fl.ops.backend("reference"):
            loss = model(batch()).square().mean()
            change(model)
            paths.clear()
            values.append(fl.penalty(model))
            assert paths.count("total_made") == (3 - stale if fused else 0)
        del loss
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


def another_rank(model: nn.Module) -> None:
    """In the same parameters, of one sibling"""
    adapter = model.blocks[0].k_proj.adapter
    adapter.down.data = torch.cat((adapter.down.data, adapter.down.data[:2]))
    adapter.up.data = torch.cat((adapter.up.data, adapter.up.data[:, :2]), 1)


@pytest.mark.parametrize("change", [changed_factor, changed_basis, another_basis, another_rank])
def test_a_pass_after_a_change(change, paths):
    """What was asked of the passes before is not asked again."""
    values = []
    for fused in (True, False):
        model = fl.fuse_penalty(build(*ALL), fused)
        with fl.ops.backend("reference"):
            step(model, batch())
            change(model)
            paths.clear()
            value, grads = step(model, batch())
            assert set(paths) == {"total_made" if fused else "total"}
            values.append((value, *grads))
    for ours, grouped in zip(*values, strict=True):
        torch.testing.assert_close(ours, grouped, rtol=1e-9, atol=1e-12)


def test_after_the_backward_pass(paths):
    """Its graph is gone: the penalty makes its own."""
    model, x = build(fl.NullSpace(k=5), fl.WeightDeviation()), batch()
    with fl.ops.backend("reference"):
        _, expected = step(model, x)
        model.zero_grad()
        x.grad = None
        model(x).square().mean().backward()
        paths.clear()
        fl.penalty(model).backward()
        assert set(paths) == {"total"}
    grads = [x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]
    for ours, grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_checkpoints(kind, paths):
    """Without reentrance the first pass has a graph; with it, the penalty makes its own."""
    penalties = (fl.NullSpace(k=5), fl.SourceDeviation(), *([] if kind == "reentrant" else [fl.OutputDeviation()]))
    model, x = build(*penalties, dropout=0.25, checkpointed=kind), batch()
    plain = copy.deepcopy(model)
    plain.checkpointed = None
    with fl.ops.backend("reference"):
        paths.clear()
        value, grads = step(model, x)
        assert set(paths) == {"total" if kind == "reentrant" else "total_made"}
        expected, others = step(fl.fuse_penalty(plain, False), x)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, grad in zip(grads, others, strict=True):
        torch.testing.assert_close(ours, grad, rtol=1e-9, atol=1e-12)


def test_where_it_steps_back(paths):
    model, x = build(*ALL), batch()
    weights = torch.rand(3, 7)

    def way(token_weights: Tensor | None = None) -> list[str]:
        paths.clear()
        fl.penalty(model, token_weights)
        return sorted(set(paths))

    with fl.ops.backend("reference"):
        model(x)
        assert way() == ["total_made"]
        assert way(weights) == ["total", "total_made"] and paths.count("total") == 1  # of OutputDeviation
        model(x.half().double())
        with torch.no_grad():
            model(x)
            assert way() == ["total"]
        model.eval()(x)
        assert way() == ["total"]
        layer = model.train().blocks[0].o_proj
        model(x)
        fl.remove(model)
    model = build(*ALL)
    layer = model.blocks[0].o_proj
    plain = layer.forward
    layer.forward = lambda x: plain(plain(x))  # called more than once: only all calls together count
    with fl.ops.backend("reference"):
        model(x)
        assert way() == ["total", "total_made"]
    with fl.ops.backend("blas"):
        build(*ALL)(x)
        model(x)
        assert way() == ["total"]


def test_one_tensor_of_products_for_the_siblings_of_a_call():
    """Of each kind of penalty one, whatever the layers: autograd and ``fl.penalty`` have as many things less to do."""
    model = build(fl.NullSpace(k=5), fl.WeightDeviation())
    with fl.ops.backend("reference"):
        model(batch())
    for block in model.blocks:
        q, k, v, o = ({id(made) for made in layer.trace.made.values()} for layer in block.children())
        assert q == k == v and len(q) == len(o) == 2 and not q & o


def test_a_part_of_what_a_call_has_made(paths):
    """Products of siblings are taken together or not at all."""
    values = []
    for fused in (True, False):
        model = fl.fuse_penalty(build(*ALL), fused)
        null = model.blocks[0].k_proj.adapter.penalty_states()[0]
        null.spec = fl.NullSpace(0.0, k=5)
        with fl.ops.backend("reference"):
            paths.clear()
            value, grads = step(model, batch())
            assert sorted(paths) == (["total", *["total_made"] * 3] if fused else ["total"] * 3)
            values.append((value, *grads))
    for ours, grouped in zip(*values, strict=True):
        torch.testing.assert_close(ours, grouped, rtol=1e-9, atol=1e-12)


def test_no_graph_is_kept_by_a_penalty_that_nobody_asks_for():
    model, x = build(fl.NullSpace(k=5)), batch()
    with fl.ops.backend("reference"):
        model(x).sum().backward()
        node = next(iter(fl.adapters(model).values())).trace.made
        assert all(made.terms.spent and made.products is None for made in node.values())
        before = len([t for t in gc.get_objects() if isinstance(t, Tensor)])
        model(x).sum().backward()
        assert len([t for t in gc.get_objects() if isinstance(t, Tensor)]) <= before + 8


def test_what_is_moved_away_is_not_kept():
    model = build(fl.NullSpace(k=5), fl.WeightDeviation())
    with fl.ops.backend("reference"):
        step(model, batch())
    earlier = [weakref.ref(basis) for layer in fl.adapters(model).values() for basis in layer.adapter.buffers()]
    model.to(torch.float32)
    gc.collect()
    assert earlier and not any(basis() is not None for basis in earlier)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="counts in the interpreter")
@pytest.mark.parametrize("penalty", [None, *PENALTIES], ids=repr)
def test_on_the_kernels(penalty, monkeypatch):
    """No launch more than LoRA's; value and gradients are those of float64 to the precision of bfloat16."""
    model = build(*([] if penalty is None else [penalty]), dtype=torch.bfloat16, rank=3)
    names: list[str] = []
    launch = launcher.Launch.__call__

    def noted(self, *arguments):
        names.append(self.kernel.__name__)
        return launch(self, *arguments)

    monkeypatch.setattr(launcher.Launch, "__call__", noted)
    x = batch(dtype=torch.bfloat16)
    with on_kernels("split", monkeypatch):
        value, grads = step(model, x)
        forward, backward = (1 + 3) + (1 + 1), (1 + 1 + 1) + (3 + 1 + 1)  # of a block: siblings, one layer
        assert len(names) == 2 * (forward + backward), names
        expected, others = step(fl.fuse_penalty(model, False), x)
    torch.testing.assert_close(value, expected, rtol=2e-2, atol=1e-6)
    for ours, grad in zip(grads, others, strict=True):
        assert (ours - grad).norm() <= 2e-2 * grad.norm()


def test_kernels_that_take_no_rows_run_without_them(paths, monkeypatch):
    """On Triton 3.6: the layers stay on the kernels, and the penalty is computed for all of them at once."""
    monkeypatch.setattr(launcher, "TAKES_ROWS", False)
    model, x = build(fl.NullSpace(k=5), dtype=torch.float32), batch(dtype=torch.float32)
    paths.clear()
    with on_kernels("split", monkeypatch):
        value, _ = step(model, x)
    assert set(paths) == {"total"}
    torch.testing.assert_close(value, plain_total(model).detach(), rtol=1e-5, atol=0)
