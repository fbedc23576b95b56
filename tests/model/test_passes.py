"""What a layer keeps of a pass is of that pass alone."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from helpers import stir
from torch import Tensor, nn

import forgetless as fl

x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, how: str = "both") -> Tensor:
        x = torch.tanh(self.a(x))
        if how == "fails":
            raise MemoryError
        if how == "twice":
            x = torch.tanh(self.a(2 * x))
        return x if how == "skip" else torch.tanh(self.b(x))


class Outer(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, how: str = "both") -> Tensor:
        return self.inner(x, how) if how != "both" else self.inner(self.inner(x))


def made(wrapped: bool = False) -> Any:
    torch.manual_seed(0)
    net = Outer(Net()) if wrapped else Net()
    return stir(fl.adapt(net, fl.LoRA(2, penalties=(fl.OutputDeviation(0.1),))))


def mean(layer: Any, *inputs: Tensor) -> Tensor:
    """0.1 of the mean over all these tokens of ||delta x||^2."""
    return 0.1 * (torch.cat(inputs) @ layer.delta().T).square().sum(1).mean()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_skipped_layer_counts_for_nothing(compiled):
    model = made()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    (call(x).sum() + fl.penalty(model)).backward()
    y = call(x, "skip")
    torch.testing.assert_close(fl.penalty(model), mean(model.a, x))
    (y.sum() + fl.penalty(model)).backward()
    with torch.no_grad():
        call(50 * x)
        call(x, "skip")
        torch.testing.assert_close(fl.penalty(model), mean(model.a, x))
    assert list(fl.drift(model)) == ["a"]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layer_that_is_used_twice_counts_all_its_tokens(compiled):
    model = made()
    call = torch.compile(model, backend="eager", fullgraph=True) if compiled else model
    call(x, "twice")
    second = 2 * torch.tanh(model.a(x)).detach()
    h = model.a.trace.hidden  # of the call by itself, outside of a pass
    assert h.shape[0] == 5
    y = call(x, "twice")
    wanted = mean(model.a, x, second) + mean(model.b, torch.tanh(nn.functional.linear(
        second, model.a.base.weight + model.a.delta(), model.a.base.bias
    )))  # fmt: skip
    torch.testing.assert_close(fl.penalty(model), wanted)
    (y.sum() + fl.penalty(model)).backward()
    call(x)
    assert model.a.trace.hidden.shape[0] == 5
    with pytest.raises(ValueError, match="token_weights has 5 entries"):
        call(x, "twice")
        fl.penalty(model, token_weights=torch.ones(5))


def test_an_inner_call_is_a_pass_by_itself_or_a_part_of_the_outer_one():
    model = made(wrapped=True)
    inner = model.inner
    model(x)
    assert inner.a.trace.hidden.shape[0] == inner.b.trace.hidden.shape[0] == 10
    inner(x, "skip")
    assert inner.a.trace.hidden.shape[0] == 5 and inner.b.trace is None


@pytest.mark.parametrize("kind", ["adapted", "a copy"])
def test_a_failed_pass_leaves_nothing(kind):
    model = made() if kind == "adapted" else copy.deepcopy(made())
    made_by_a: list[Any] = []
    model.a.register_forward_hook(lambda module, args, y: made_by_a.append(weakref.ref(y)))
    given = x.clone()
    with pytest.raises(MemoryError):
        model(given, "fails")
    gc.collect()
    assert made_by_a[0]() is None and model.a.trace is None
    alive = weakref.ref(given)
    del given
    assert alive() is None
    model(x)
    torch.testing.assert_close(fl.penalty(model), mean(model.a, x) + mean(model.b, torch.tanh(model.a(x))))


def test_an_interrupted_pass_is_over_when_the_next_begins():
    model = made()
    handle = model.b.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        model(x)
    handle.remove()
    model(x, "skip")
    torch.testing.assert_close(fl.penalty(model), mean(model.a, x))


def test_removed_adapters_leave_no_hook():
    for drop in (fl.remove, fl.merge):
        model = drop(made(wrapped=True))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_swapped_in_model_keeps_passes_apart_too():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    model = stir(peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["a", "b"])))
    fl.swap_in(model, (fl.OutputDeviation(0.1),))
    (model(x).sum() + fl.penalty(model)).backward()
    (model(x, "skip").sum() + fl.penalty(model)).backward()
    only = fl.penalty(model)
    model(x)
    assert 0 < only < fl.penalty(model)
    fl.swap_out(model)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
