"""``fl.adapt`` on layers that pack their weight: they run themselves, nothing of the weight's size is made for us."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
from helpers import assert_as_good_as_eager, stir, tiny_llama, token_batch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import forgetless as fl
from forgetless.layers import quantized as packed
from forgetless.layers.wrapped import AdaptedPacked


class Int8(nn.Module):
    """Weight-only int8 with a scale for each row."""

    def __init__(self, inner: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = inner.in_features, inner.out_features
        weight = inner.weight.detach()
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scale).round().to(torch.int8))
        self.bias = inner.bias

    def unpack(self) -> Tensor:
        return self.packed.to(self.scale.dtype) * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.unpack().to(x.dtype), self.bias)


class Unheard(Int8):
    """Packed in a way that nobody has explained."""


packed.register(Int8, lambda base: base.unpack(), lambda base: base.scale.dtype)


def replaced(model: Any, make: Any) -> Any:
    """Every linear layer but the head made anew."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            model.set_submodule(name, make(module))
    return model


def dense(model: Any) -> Any:
    """The same numbers, unpacked."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        kind = packed.kind_of(module)
        if kind is not None:
            made = nn.Linear(module.in_features, module.out_features, module.bias is not None)
            made.weight.data, made.bias = kind.unpack(module), module.bias
            model.set_submodule(name, made)
    return model


METHODS = [
    fl.CLoRA(rank=4, k=5, penalties=(fl.OutputDeviation(0.3),)),
    fl.CURLoRA(rank=4),
    fl.LaLoRA(rank=4, weight=10.0, penalties=(fl.SourceDeviation(0.5),)),
]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def numbers(model: Any) -> list[Tensor]:
    """Loss with penalty, and every gradient."""
    loss = model(**token_batch()).loss + fl.penalty(model)
    return [loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])]


def moved(base: Any, method: fl.methods.Method) -> Any:
    torch.manual_seed(0)
    model = stir(fl.adapt(base, method), 0.1)
    if isinstance(method, fl.LaLoRA):
        fl.calibrate(model, [token_batch(seed=1)])
    return model


@each_method
def test_numbers_are_those_of_the_unpacked_model(method: fl.methods.Method) -> None:
    base = replaced(tiny_llama().double(), Int8)  # in float32, rounding alone may exceed any bound that finds a mistake
    model, twin = moved(copy.deepcopy(base), method), moved(dense(base), method)
    report = fl.explain(model)["model.layers.0.mlp.up_proj"]
    assert (report.path, report.rank) == ("onto", 4) and "Int8 makes x W^T itself" in report.reason
    ours, theirs = numbers(model), numbers(twin)
    assert len(ours) > 14
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert fl.drift(model) == pytest.approx(fl.drift(twin), rel=1e-4)


def test_half_precision_is_as_good_as_eager() -> None:
    torch.manual_seed(0)
    layer = Int8(nn.Linear(48, 40, dtype=torch.bfloat16))
    model = stir(fl.adapt(nn.Sequential(layer), fl.LoRA(rank=4), ["0"]), 0.1)
    adapter = model[0].adapter
    x = torch.randn(5, 7, 48, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(5, 7, 40, dtype=torch.bfloat16)
    leaves = [x, adapter.down, adapter.up]

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x, down, up = (t.detach().to(dtype).requires_grad_() for t in leaves)
        weight, bias = layer.unpack().to(dtype), layer.bias.to(dtype)
        y = F.linear(x, weight, bias) + adapter.scale * F.linear(F.linear(x, down), up)
        return [y.detach(), *torch.autograd.grad(y, [x, down, up], dy.to(dtype))]

    y = model(x)
    ours = [y.detach(), *torch.autograd.grad(y, leaves, dy)]
    for mine, theirs, truth in zip(ours, eager(torch.bfloat16), eager(torch.float64), strict=True):
        assert_as_good_as_eager(mine, theirs.to(mine.dtype), truth)


class Large(TorchDispatchMode):
    """Counts results as large as the weight."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() >= 40 * 48 and not func.is_view:
            self.count += 1
        return result


@each_method
def test_a_step_makes_nothing_of_the_weights_size_on_our_account(
    method: fl.methods.Method, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    kind = packed.KINDS[packed._full_name(Int8)]
    spy = packed.Kind(kind.title, lambda base: calls.append(base) or kind.unpack(base), kind.dtype)
    monkeypatch.setitem(packed.KINDS, packed._full_name(Int8), spy)
    base, x = Int8(nn.Linear(48, 40)), torch.randn(3, 48, requires_grad=True)
    with Large() as alone:
        base(x).sum().backward()
    method = fl.methods.Method.from_json({**method.to_json(), "penalties": []})
    model = fl.adapt(nn.Sequential(base), method, ["0"])
    assert len(calls) == (1 if isinstance(method, fl.CURLoRA) else 0)
    with Large() as adapted:
        model(x).sum().backward()
    assert alone.count > 0 and adapted.count == alone.count
    assert len(calls) <= 1 and model[0].weight.isnan().all() and model[0].weight.untyped_storage().nbytes() == 4


@each_method
def test_saved_loaded_and_merged(method: fl.methods.Method, tmp_path: Any) -> None:
    base = replaced(tiny_llama(), Int8)
    model = moved(copy.deepcopy(base), method)
    want = model(**token_batch()).logits
    fl.save(model, tmp_path)
    again = fl.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(again(**token_batch()).logits, want)
    if isinstance(method, fl.CURLoRA):
        other = copy.deepcopy(base)
        other.model.layers[0].mlp.up_proj.packed[0] += 1
        with pytest.raises(ValueError, match="up_proj is not the one this curlora adapter was made on"):
            fl.load(other, tmp_path)
    with pytest.raises(ValueError, match=r"packed \(Int8\): nothing was merged; .*dequantise=True"):
        fl.merge(model)
    with pytest.raises(ValueError, match="packed .*nothing was consolidated"):
        fl.consolidate(model, [token_batch()])
    assert torch.equal(model(**token_batch()).logits, want)
    with torch.autocast("cpu", torch.bfloat16):  # which must not round the update
        fl.merge(model, dequantise=True)
    assert not fl.adapters(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear
    torch.testing.assert_close(model(**token_batch()).logits, want, rtol=1e-4, atol=1e-5)
    fl.remove(again)
    assert type(again.model.layers[0].mlp.up_proj) is Int8
    assert torch.equal(again(**token_batch()).logits, base(**token_batch()).logits)


def test_a_compiler_and_a_transform_take_the_formula() -> None:
    torch.manual_seed(0)
    model = stir(fl.adapt(nn.Sequential(Int8(nn.Linear(12, 9).double())), fl.LoRA(rank=3), ["0"]))
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *[p for p in model.parameters() if p.requires_grad]]
    want = torch.autograd.grad(model(x).square().sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x).square().sum(), leaves), want)
    values = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}

    def loss(values: Any) -> Tensor:
        return torch.func.functional_call(model, values, (x.detach(),)).square().sum()

    torch.testing.assert_close(tuple(torch.func.grad(loss)(values).values()), want[1:])


def test_kinds_that_are_not_known_are_named_with_the_reason() -> None:
    base = tiny_llama()
    base.model.layers[0].mlp = replaced(base.model.layers[0].mlp, Unheard)
    with pytest.warns(UserWarning, match=r"left out: 3 of .*Unheard \(how it packs its weight is not known; fl.packed"):
        fl.adapt(base, fl.LoRA(rank=2))
    assert not any("layers.0.mlp" in name for name in fl.adapters(base))
    with pytest.raises(ValueError, match=r"'0' matches 0, .*Unheard; only nn.Linear.*bitsandbytes.*not known"):
        fl.adapt(nn.Sequential(Unheard(nn.Linear(4, 4))), fl.LoRA(rank=2), ["0"])
    with pytest.raises(ValueError, match=r"no nn.Linear or Conv1D layer; left out: 1 of .*Unheard"):
        fl.adapt(nn.Sequential(Unheard(nn.Linear(4, 4))), fl.LoRA(rank=2))
    attention = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.warns(UserWarning, match="1 of .*NonDynamicallyQuantizableLinear .*MultiheadAttention reads"):
        fl.adapt(attention, fl.LoRA(rank=2))
    assert sorted(fl.adapters(attention)) == ["linear1", "linear2"]


def test_a_layer_that_is_not_packed_yet_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = packed.Kind("early", lambda base: base.unpack(), wants=lambda base: "it is not quantised yet")
    monkeypatch.setitem(packed.KINDS, packed._full_name(Int8), kind)
    with pytest.raises(ValueError, match=r"0 cannot be adapted \(early\): it is not quantised yet"):
        fl.adapt(nn.Sequential(Int8(nn.Linear(4, 4))), fl.LoRA(rank=2), ["0"])


@pytest.mark.parametrize("cls, said", [(Int8, "known already"), (nn.Linear, "known already"), (3, "nn.Module")])
def test_register_refuses(cls: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        packed.register(cls, lambda base: base.unpack())


def test_a_frozen_layer_without_a_gradient_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Int8, "forward", lambda self, x: F.linear(x.detach(), self.unpack(), self.bias))
    model = fl.adapt(nn.Sequential(Int8(nn.Linear(6, 5))), fl.LoRA(rank=2), ["0"])
    model(torch.randn(2, 6))
    with pytest.raises(RuntimeError, match="a Int8, returned a result without a gradient for its input"):
        model(torch.randn(2, 6, requires_grad=True))


def test_hooks_on_the_frozen_layer_are_run() -> None:
    """Such as accelerate's, that bring an offloaded weight."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    x = torch.randn(3, 6)
    want = layer(x)
    model = fl.adapt(nn.Sequential(layer), fl.CURLoRA(rank=2), ["0"])
    assert torch.equal(model(x), want) and "has hooks and runs itself" in fl.explain(model)["0"].reason
    stir(model)
    torch.testing.assert_close(model(x), want + F.linear(x, model[0].delta()))
    moved = F.linear(x, model[0].delta())
    fl.merge(model)
    torch.testing.assert_close(model(x), want + 2 * moved)  # the hook sees the update once it is in the weight


# -------------------------------------------------------------------------------- the real packages


def bnb_4bit(inner: nn.Linear, nested: bool = False) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear4bit(inner.in_features, inner.out_features, False, inner.weight.dtype, nested, "nf4")
    made.weight = bnb.nn.Params4bit(inner.weight.data, False, quant_type="nf4", compress_statistics=nested)
    return made.to("cpu").train(inner.training)


def bnb_int8(inner: nn.Linear) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    made = bnb.nn.Linear8bitLt(inner.in_features, inner.out_features, False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(inner.weight.data, False, has_fp16_weights=False)
    return made.to("cpu").train(inner.training)


def torchao_int8(inner: nn.Linear) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(holder := nn.Sequential(inner), ao.Int8WeightOnlyConfig())
    return holder[0]


def torchao_nf4(inner: nn.Linear) -> nn.Module:
    ao = pytest.importorskip("torchao.quantization")
    inner.weight = nn.Parameter(ao.NF4Tensor.from_tensor(inner.weight.data, 64, 16), requires_grad=False)
    return inner


def gguf_q8(inner: nn.Linear) -> nn.Module:
    gguf = pytest.importorskip("gguf")
    utils = pytest.importorskip("transformers.integrations.gguf.utils")
    kind = gguf.GGMLQuantizationType.Q8_0
    made = utils.GgufLinear(inner.in_features, inner.out_features, int(kind))
    made.weight.data = torch.from_numpy(gguf.quantize(inner.weight.detach().numpy(), kind).copy())
    return made.train(inner.training)


MAKERS = {
    "bitsandbytes 4-bit": bnb_4bit,
    "bitsandbytes 4-bit, nested": functools.partial(bnb_4bit, nested=True),
    "bitsandbytes int8": bnb_int8,
    "torchao": torchao_int8,
    "torchao NF4": torchao_nf4,
    "GGUF": gguf_q8,
}


@pytest.mark.parametrize("title", MAKERS)
@pytest.mark.parametrize("method", [METHODS[0], METHODS[1]], ids=lambda method: method.name)
def test_real_kinds(title: str, method: fl.methods.Method, tmp_path: Any) -> None:
    """Against the unpacked model: numbers, saved and loaded after an evaluation, merged."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = replaced(
            tiny_llama(1, hidden_size=128, intermediate_size=128, num_key_value_heads=2).train(), MAKERS[title]
        )
    model, twin = moved(copy.deepcopy(base), method), moved(dense(base), method)
    layer = model.model.layers[0].mlp.down_proj
    assert type(layer) is AdaptedPacked and layer.kind.title == title.removesuffix(", nested")
    activations = 0.03 if title == "bitsandbytes int8" else 1e-3  # it quantises x as well
    for ours, theirs in zip(numbers(model), numbers(twin), strict=True):
        assert (ours - theirs).norm() <= activations * theirs.norm()
    model.eval()(**token_batch())  # bitsandbytes packs anew
    fl.save(model, tmp_path)
    want = model(**token_batch()).logits
    again = fl.load(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(again(**token_batch()).logits, want)
    fl.merge(model, dequantise=True)
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert (model(**token_batch()).logits - want).norm() <= max(activations, 5e-3) * want.norm()
