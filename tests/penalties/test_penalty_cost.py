"""What a penalty costs: operations do not grow with the layers, kernels are not launched, no large tensor is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import stir
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import forgetless as fl

PENALTIES = {
    "orthogonal": fl.NullSpace(0.7, 9),
    "shared": fl.NullSpace(0.7, 9, "shared"),
    "hadamard": fl.NullSpace(0.7, 9, "hadamard"),
    "complement": fl.NullSpace(0.7, 40),
    "diag": fl.Laplace(),
    "diag balanced": fl.Laplace(at_zero="balanced"),
    "kfac": fl.Laplace(curvature="kfac", columns=5),
    "tri_kfac": fl.Laplace(curvature="tri_kfac", columns=5, prior_precision=0.1),
    "output": fl.OutputDeviation(0.3),
    "weight": fl.WeightDeviation(0.2),
    "source diag": fl.SourceDeviation(0.1),
    "source q": fl.SourceDeviation(0.1, 6),
    "loss": fl.LossDeviation(0.1, 4),
    "decay": fl.Decay(0.3),
}
#: Dispatcher operations of value and gradient for layers of one shape, at most; for the Hadamard basis, which works
#: block by block, for each binary digit of the two dimensions.
HANDFUL = 50
PER_BLOCK = 13
every = pytest.mark.parametrize("name", PENALTIES)
N, K, M = 53, 47, 59  # told apart by their sizes


class Watch(TorchDispatchMode):
    """Operations, and the shapes that they put out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.names.append(str(func))
        self.shapes += [tuple(t.shape) for t in tree_leaves(out) if isinstance(t, Tensor)]
        return out

    def work(self) -> list[str]:
        """Without views, which launch nothing."""
        views = (
            "view", "_unsafe_view", "unsqueeze", "transpose", "unbind", "detach", "expand", "select", "slice",
            "as_strided", "permute", "alias",
        )  # fmt: skip
        return [name for name in self.names if not any(f"aten.{view}" in name or name == view for view in views)]


def stack_of(count: int, *penalties: Any, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(K, N), nn.Tanh(), nn.Linear(N, K)) for _ in range(count)))
    model = fl.adapt(model, fl.LoRA(rank=4, penalties=penalties, dropout=dropout), ".*[02]$")
    stir(model, 0.1)
    if any(state.statistics for layer in fl.adapters(model).values() for state in layer.adapter.penalty_states()):
        fl.calibrate(model, [torch.randn(M, K)], lambda m, x: m(x).square().mean())
    return stir(model, 0.1, seed=1)


def trained(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


def penalty_watched(model: nn.Module) -> Watch:
    model(torch.randn(M, K))
    fl.penalty(model)  # asks each layer once whether it is calibrated
    with Watch() as watch:
        value = fl.penalty(model)
        torch.autograd.grad(value, trained(model), allow_unused=True)
    return watch


@every
def test_the_operations_do_not_grow_with_the_layers(name):
    few, many = (penalty_watched(stack_of(count, PENALTIES[name])).work() for count in (2, 9))
    # OutputDeviation's h goes on through each layer's own backward pass: that is the layer's, not the penalty's
    if name == "output":
        model = stack_of(9, PENALTIES[name])
        model(torch.randn(M, K))
        with Watch() as watch:
            fl.penalty(model)
        many = watch.work()
        model = stack_of(2, PENALTIES[name])
        model(torch.randn(M, K))
        with Watch() as watch:
            fl.penalty(model)
        few = watch.work()
    assert len(many) == len(few)
    shapes = 2  # (N, K) and (K, N)
    blocks = N.bit_count() + K.bit_count() if name == "hadamard" else 0
    assert len(many) <= shapes * (HANDFUL + PER_BLOCK * blocks)


@every
def test_nothing_as_large_as_a_weight_or_an_activation_is_made(name):
    """Over value and gradient: no N x K, M x N or M x K in any order; scalars times a stack of them neither."""
    watch = penalty_watched(stack_of(3, PENALTIES[name]))
    assert len(watch.shapes) > 3
    backward = name == "output"  # its gradient runs through the layer: dx (M, K) is the layer's own result
    for shape in watch.shapes:
        for pair in ((N, K), (M, N), (M, K), (N, N), (K, K)):
            large = shape[-2:] in (pair, pair[::-1])
            assert not large or (backward and M in pair), shape


def test_output_deviation_adds_no_activation_to_a_step():
    """Loss and penalty in one backward pass: as many M x N and M x K tensors as the loss alone."""

    def large(*penalties: Any) -> int:
        model = stack_of(2, *penalties).train()
        x = torch.randn(M, K).requires_grad_()
        with Watch() as watch:
            loss = model(x).square().mean() + fl.penalty(model)
            torch.autograd.grad(loss, [x, *trained(model)])
        return sum(shape in ((M, N), (M, K)) for shape in watch.shapes)

    assert large(fl.OutputDeviation(0.3)) <= large()


@pytest.mark.parametrize("name", ["orthogonal", "hadamard", "diag", "kfac", "output", "weight", "source q", "decay"])
def test_a_step_launches_as_many_kernels_with_a_penalty_as_without(name, monkeypatch):
    """In the interpreter: every launch goes through the backend's functions; the penalty adds none."""
    backend = pytest.importorskip("forgetless_kernels.fused")
    triton = pytest.importorskip("triton")
    launches: list[str] = []
    from triton.runtime import interpreter

    run = interpreter.GridExecutor.__call__
    monkeypatch.setattr(
        interpreter.GridExecutor,
        "__call__",
        lambda self, *args, **kwargs: (launches.append(self.fn.__name__), run(self, *args, **kwargs))[1],
    )
    assert backend is not None and triton is not None

    def step(*penalties: Any) -> list[str]:
        model = stack_of(1, *penalties).train()
        with fl.ops.backend("triton"):
            launches.clear()
            x = torch.randn(8, K).requires_grad_()
            (model(x).square().mean() + fl.penalty(model)).backward()
        return sorted(launches)

    plain = step()
    assert plain
    assert step(PENALTIES[name]) == plain


def test_hadamard_holds_no_basis():
    model = stack_of(2, PENALTIES["hadamard"])
    for layer in fl.adapters(model).values():
        floats = [b for b in layer.adapter.penalties.buffers() if b.is_floating_point()]
        assert floats == []


@pytest.mark.parametrize("penalty", [fl.WeightDeviation(0.2), fl.NullSpace(0.7, 9)], ids=["weight", "null-space"])
def test_gradients_become_grad_without_a_copy(penalty):
    """One product with the gradient that comes in, and what it makes is .grad."""
    model = stack_of(4, penalty)
    value = fl.penalty(model)
    with Watch() as watch:
        value.backward()
    assert watch.work() == ["aten.ones_like.default", "aten._foreach_mul.Tensor"]
    grads = [p.grad for p in trained(model)]
    with Watch() as watch:
        fl.penalty(model).backward()
    assert sum("add_" in name or "clone" in name for name in watch.names) <= len(grads) + 10


def test_a_retained_graph_gives_the_same_gradient_twice():
    model = stack_of(2, fl.WeightDeviation(0.2), fl.NullSpace(0.7, 9))
    value = fl.penalty(model)
    once = torch.autograd.grad(value, trained(model), retain_graph=True)
    again = torch.autograd.grad(3 * value, trained(model))
    for a, b in zip(once, again, strict=True):
        torch.testing.assert_close(3 * a, b)
