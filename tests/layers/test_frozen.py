"""Subclasses of nn.Linear: those that compute the same are adapted and run themselves, the others are left out."""

from __future__ import annotations

import pytest
import torch
from helpers import stir
from torch import Tensor, nn
from torch.nn import functional as F

import forgetless as fl


class Inherits(nn.Linear):
    pass


class Transposes(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.T
        return y if self.bias is None else y + self.bias


class Doubles(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Clips(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-8, 8)


class Steps(nn.Linear):
    """Rounds small numbers away."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear((x * 4).round() / 4, self.weight, self.bias)


class Pairs(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x), x


class WantsMore(nn.Linear):
    def forward(self, x: Tensor, group: int) -> Tensor:
        return super().forward(x) + group


class HasOwnAdapter(nn.Linear):
    """Computes the same as long as its own factor is zero."""

    def __init__(self, K: int, N: int):
        super().__init__(K, N)
        self.extra = nn.Parameter(torch.zeros(N, K))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(x, self.extra)


def model_of(cls: type[nn.Linear], dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), cls(8, 5)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", [fl.CLoRA(rank=2, k=4), fl.CURLoRA(rank=2)], ids=["clora", "curlora"])
@pytest.mark.parametrize("cls", [Inherits, Transposes])
def test_a_subclass_that_computes_the_same_is_adapted(cls, method, dtype, tmp_path):
    model, x = model_of(cls, dtype), torch.randn(3, 6, dtype=dtype)
    base, before = model[1], model(x)
    fl.adapt(model, method)
    assert torch.equal(model(x), before)
    report = fl.explain(model)
    assert report["1"].path == "onto" and report["1"].reason.startswith(f"{cls.__name__} makes x W^T itself")
    (model(x).float().square().sum() + fl.penalty(model)).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    after = stir(model, 0.2)(x)
    fl.save(model, tmp_path)
    assert torch.equal(fl.load(model_of(cls, dtype), tmp_path)(x), after)
    fl.merge(model)
    assert model[1] is base
    rounding = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {}
    torch.testing.assert_close(model(x), after, **rounding)


@pytest.mark.parametrize("cls", [Doubles, Clips, Steps, Pairs, WantsMore, HasOwnAdapter])
def test_a_subclass_that_computes_something_else_is_left_out(cls):
    model = model_of(cls)
    with pytest.warns(UserWarning, match=rf"left out: 1 of .*{cls.__name__} \(it gives something else than"):
        fl.adapt(model, fl.LoRA(rank=2), r"\d")
    assert list(fl.adapters(model)) == ["0"] and type(model[1]) is cls


def test_a_subclass_is_asked_without_hooks_and_draws_nothing():
    model, calls = model_of(Transposes), []
    model[1].register_forward_hook(lambda *call: calls.append(call))
    random = torch.get_rng_state()
    fl.adapt(model, fl.CURLoRA(rank=2), ["1"])
    assert not calls and torch.equal(torch.get_rng_state(), random)


def test_a_subclass_without_numbers_is_left_out_unless_it_inherits_its_forward():
    with torch.device("meta"):
        models = [nn.Sequential(cls(8, 5)) for cls in (Inherits, Transposes)]
    assert list(fl.adapters(fl.adapt(models[0], fl.LoRA(rank=2), ["0"]))) == ["0"]
    with pytest.raises(ValueError, match="left out: 1 of .*Transposes"):
        fl.adapt(models[1], fl.LoRA(rank=2))


def test_peft_s_curlora_takes_the_same_ones():
    peft = pytest.importorskip("peft")
    pytest.importorskip("forgetless.peft.plugin")
    x = torch.randn(3, 6)
    model = peft.get_peft_model(model_of(Transposes), fl.peft.CURLoRAConfig(r=2, target_modules=["0", "1"]))
    after = stir(model, 0.2)(x)
    assert fl.explain(model)["base_model.model.1"].path == "onto"
    torch.testing.assert_close(model.merge_and_unload()(x), after)
    with pytest.raises(ValueError, match="1 is not supported: Doubles"):
        peft.get_peft_model(model_of(Doubles), fl.peft.CURLoRAConfig(r=2, target_modules=["1"]))
