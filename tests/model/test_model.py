"""Adapting a whole model: which layers, what is frozen, drift, explain, merge, remove."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import inspect
import re
from collections import OrderedDict
from typing import Any

import pytest
import torch
from helpers import assert_as_good_as_eager, stir, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn

import forgetless as fl
from forgetless.layers.linear import AdaptedLinear
from forgetless.layers.trace import DRIFT_TOKENS
from forgetless.methods import LoRA, Method
from forgetless.methods.lora import LoRAAdapter
from forgetless.ops import dispatch as ops
from forgetless.targets import find_layers

BLOCK = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def names(*parts: str, layers: int = 2) -> list[str]:
    return [f"model.layers.{i}.{part}" for i in range(layers) for part in parts]


def lora(**options: Any) -> LoRA:
    return fl.LoRA(**{"rank": 3, "alpha": 6.0, **options})


class Pair(nn.Module):
    """Holds one linear layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.second = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def untouched(model: nn.Module, twin: nn.Module) -> bool:
    """Same modules, parameters and flags as its copy."""
    ours, theirs = model.state_dict(), twin.state_dict()
    same = [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]
    same &= ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    return same and [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in twin.parameters()]


# ----------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(
    "targets, wanted",
    [
        (["q_proj"], names("self_attn.q_proj")),
        (["v_proj", "q_proj"], names("self_attn.q_proj", "self_attn.v_proj")),
        (["self_attn.q_proj", "mlp.up_proj"], names("self_attn.q_proj", "mlp.up_proj")),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (("q_proj",), names("self_attn.q_proj")),
        ({"lm_head"}, ["lm_head"]),
        ("q_proj", names("self_attn.q_proj")),
        ("[qv]_proj", names("self_attn.q_proj", "self_attn.v_proj")),
        (r"layers\.1\..*_proj", [n for n in names(*BLOCK, *MLP) if ".1." in n]),
        (r"model\.layers\.0\.mlp\.(up|down)_proj", ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]),
        ("all-linear", names(*BLOCK, *MLP)),
    ],
    ids=str,
)
def test_targets_name_layers(targets, wanted):
    assert list(find_layers(tiny_llama(), targets)) == wanted
    assert list(fl.adapters(fl.adapt(tiny_llama(), lora(), targets))) == wanted


def test_a_suffix_is_a_whole_name_and_no_expression():
    for nothing in ("proj", "_proj", "q.proj", "up_pro"):
        with pytest.raises(ValueError, match=f"nothing is named '{re.escape(nothing)}'"):
            find_layers(tiny_llama(), [nothing])


def test_near_names_are_listed():
    with pytest.raises(ValueError, match=r"nothing is named 'q_porj'; near names: .*q_proj"):
        fl.adapt(tiny_llama(), lora(), ["q_porj"])
    with pytest.raises(ValueError, match=r"nothing is named 'query'; near names: .*\w"):
        fl.adapt(tiny_llama(), lora(), ["q_proj", "query"])
    with pytest.raises(ValueError, match="near names: none, no linear layer at all"):
        fl.adapt(nn.Sequential(nn.Tanh()), lora(), ["q_proj"])


@pytest.mark.parametrize(
    "targets, message",
    [
        ([], "targets is empty"),
        ([3], "targets holds 3, wants strings"),
        (3, "targets is 3, wants a list of names or a regular expression"),
        ("((", r"unterminated subpattern at position 1"),
        ("q_proj(", r"targets is 'q_proj\(', not a valid regular expression"),
        (["embed_tokens"], r"'embed_tokens' matches model.embed_tokens, a torch.*Embedding; only nn.Linear"),
        ("model.norm", r"matches model.norm, a transformers.*RMSNorm"),
    ],
    ids=str,
)
def test_what_cannot_be_a_target_is_said(targets, message):
    model = tiny_llama()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        fl.adapt(model, lora(), targets)
    assert untouched(model, twin)


def test_all_linear_leaves_the_head_alone_whatever_it_is_called():
    class Named(nn.Module):
        def __init__(self, head: str):
            super().__init__()
            self.body = nn.Linear(6, 6)
            setattr(self, head, nn.Linear(6, 9))
            self.out = head

    for head in ("lm_head", "score", "classifier", "embed_out"):
        assert list(find_layers(Named(head), "all-linear")) == ["body"]
    odd = Named("vocabulary")
    odd.get_output_embeddings = lambda: odd.vocabulary
    assert list(find_layers(odd, "all-linear")) == ["body"]
    odd.get_output_embeddings = lambda: None
    assert list(find_layers(odd, "all-linear")) == ["body", "vocabulary"]
    with pytest.raises(ValueError, match="Sequential has no nn.Linear or Conv1D layer"):
        find_layers(nn.Sequential(nn.Conv1d(3, 3, 1)), "all-linear")


def test_a_subclass_of_linear_may_compute_something_else_and_is_left_alone():
    attention = nn.MultiheadAttention(8, 2)
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear; only nn.Linear"):
        fl.adapt(nn.Sequential(attention), lora(), ["out_proj"])


def test_layers_of_no_floating_dtype_are_refused():
    model = nn.Sequential(OrderedDict(layer=nn.Linear(6, 6)))
    model.layer.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="layer cannot be adapted: its weight has dtype torch.int8, wants one of"):
        fl.adapt(model, lora(), ["layer"])
    model.layer.weight = nn.Parameter(torch.ones(6, 6).to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match="layer cannot be adapted: its weight has dtype torch.float8_e4m3fn"):
        fl.adapt(model, lora(), ["layer"])


# ------------------------------------------------------------------------------------------- adapt


def test_adapt_freezes_the_rest_and_changes_nothing_yet():
    model = tiny_llama()
    want = model(**token_batch()).logits
    assert fl.adapt(model, lora(), ["q_proj"]) is model
    torch.testing.assert_close(model(**token_batch()).logits, want)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.adapter.{factor}" for name in names("self_attn.q_proj") for factor in ("down", "up")}


@pytest.mark.parametrize("training", [True, False])
def test_adapters_take_the_layer_s_device_and_mode(training):
    model = tiny_llama().train(training)
    fl.adapt(model, lora(), ["q_proj"])
    assert {module.training for module in model.modules()} == {training}


def test_an_adapted_model_is_not_adapted_again():
    model = fl.adapt(tiny_llama(), lora(), ["q_proj"])
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="adapted already; fl.merge"):
        fl.adapt(model, lora(), ["v_proj"])
    with pytest.raises(ValueError, match="q_proj is adapted already; fl.merge or fl.remove"):
        find_layers(model, ["q_proj"])
    assert untouched(model, twin)


@pytest.mark.parametrize("method", [fl.LoRA, "lora", None, 3.0], ids=str)
def test_a_method_is_an_instance(method):
    with pytest.raises(ValueError, match=r"wants an instance such as fl.LoRA\(rank=16\)"):
        fl.adapt(tiny_llama(), method, ["q_proj"])


def test_a_method_that_fails_while_building_leaves_the_model_alone():
    class Late(LoRA):
        def build(self, site: Any) -> Any:
            if ".1." in site.name:
                raise ValueError("not this one")
            return super().build(site)

    model = tiny_llama()
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="not this one"):
        fl.adapt(model, Late(rank=3), ["q_proj"])
    assert untouched(model, twin)
    assert isinstance(Late(), Method)


def test_the_adapted_layer_looks_like_the_one_it_holds():
    model = fl.adapt(tiny_llama(), lora(), ["k_proj"])
    layer = model.model.layers[0].self_attn.k_proj
    assert (layer.in_features, layer.out_features) == (16, 8)
    assert layer.weight is layer.base.weight and layer.bias is None
    assert "LoRA(rank=3" in repr(layer)
    gpt = fl.adapt(tiny_gpt2(), lora(), ["c_attn"]).transformer.h[0].attn.c_attn
    assert (gpt.in_features, gpt.out_features) == (16, 48)


def shared_models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    layer = nn.Linear(6, 6)
    return {
        "in two parents": nn.Sequential(nn.Sequential(layer), nn.Tanh(), nn.Sequential(layer)),
        "twice in one parent": nn.Sequential(layer, nn.Tanh(), layer),
        "under two names": Pair(),
    }


@pytest.mark.parametrize("where", shared_models())
def test_a_shared_layer_gets_one_adapter_everywhere(where):
    model = shared_models()[where]
    twin = copy.deepcopy(model)
    x = torch.randn(4, 6)
    stir(fl.adapt(model, lora(), "all-linear"))
    places = [m for m in model.modules() if type(m) is nn.Linear]
    assert len(fl.adapters(model)) == 1 and len(places) == 1  # the base, inside its adapter
    held = [child for parent in model.modules() for child in parent._modules.values()]
    assert sum(isinstance(child, AdaptedLinear) for child in held) == 2
    want = model(x)
    merged = fl.merge(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), want)
    assert not any(isinstance(m, AdaptedLinear) for m in merged.modules())
    fl.remove(model)
    assert torch.equal(model(x), twin(x))
    assert [type(m) for m in model.modules()] == [type(m) for m in twin.modules()]


def test_a_shared_layer_may_be_named_by_any_of_its_names():
    assert len(find_layers(Pair(), ["second"])) == 1


# ------------------------------------------------------------------------------------------- drift


def moved_by(model: nn.Module, inputs: dict[str, list[Tensor]], limit: int | None = None) -> dict[str, float]:
    """CLoRA's Eq. 3 from the inputs of each layer: mean over tokens of ||delta x|| / ||x||, in float64."""
    values = {}
    for name, layer in fl.adapters(model).items():
        x = inputs[name][-1].reshape(-1, layer.in_features).double()
        x = x if limit is None else x[:: -(-len(x) // limit)]
        ratio = (x @ layer.delta().double().T).norm(dim=1) / x.norm(dim=1).clamp(min=1e-30)  # padding may embed as 0
        values[name] = ratio.mean().item()
    return values


def watch(model: nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {name: [] for name in fl.adapters(model)}
    for name, layer in fl.adapters(model).items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0].detach()))
    return seen


@pytest.mark.parametrize("method", [lora(), fl.CURLoRA(rank=4, alpha=2.0)], ids=["lora", "curlora"])
def test_drift_is_the_paper_s(method):
    model = stir(fl.adapt(tiny_llama(), method, ["q_proj", "down_proj"]))
    seen = watch(model)
    model(**token_batch((9, 6)))
    assert fl.drift(model) == pytest.approx(moved_by(model, seen), rel=1e-5)
    model(**token_batch((64, 64, 64)))  # more tokens than are looked at
    assert fl.drift(model) == pytest.approx(moved_by(model, seen, DRIFT_TOKENS), rel=1e-5)
    assert all(layer.trace.x.shape[0] <= DRIFT_TOKENS for layer in fl.adapters(model).values())


def test_drift_is_of_the_adapters_as_they_are_now():
    """Also when an optimiser step came after the forward pass."""
    model = stir(fl.adapt(tiny_llama(), lora(), ["q_proj"]))
    seen = watch(model)
    model(**token_batch())
    stir(model, 0.5, seed=1)
    assert fl.drift(model) == pytest.approx(moved_by(model, seen), rel=1e-5)


def test_drift_is_the_same_in_training_with_dropout():
    model = stir(fl.adapt(tiny_llama(), lora(dropout=0.5), ["q_proj"])).train()
    assert fl.record_drift(model) is model
    seen = watch(model)
    model(**token_batch())
    assert fl.drift(model) == pytest.approx(moved_by(model, seen), rel=1e-5)


def test_drift_of_training_passes_is_recorded_when_asked_for():
    """What an earlier pass left behind is never told as that of a later one."""
    model = stir(fl.adapt(tiny_llama(), lora(), ["q_proj"])).train()
    with torch.no_grad():
        model(**token_batch())
    assert len(fl.drift(model)) == 2
    model(**token_batch())
    assert fl.drift(model) == {}
    fl.record_drift(model)
    model(**token_batch())
    assert len(fl.drift(model)) == 2
    fl.record_drift(model, False)
    model(**token_batch())
    assert fl.drift(model) == {}
    model.eval()(**token_batch())
    assert len(fl.drift(model)) == 2
    with pytest.raises(ValueError, match="no adapters"):
        fl.record_drift(tiny_llama())


def test_drift_before_any_forward_pass_or_of_no_token_is_left_out():
    model = fl.adapt(tiny_llama(), lora(), ["q_proj"])
    assert fl.drift(model) == {}
    layer = model.model.layers[0].self_attn.q_proj
    layer(torch.zeros(0, 16))
    assert fl.drift(model) == {}
    layer(torch.zeros(3, 16))
    assert fl.drift(model) == {"model.layers.0.self_attn.q_proj": 0.0}
    with pytest.raises(ValueError, match="no adapters"):
        fl.drift(tiny_llama())


def test_drift_of_a_half_precision_model():
    model = stir(fl.adapt(tiny_llama().bfloat16(), lora(), ["q_proj"]))
    seen = watch(model)
    model(**token_batch())
    assert fl.drift(model) == pytest.approx(moved_by(model, seen), rel=2e-2)


# ----------------------------------------------------------------------------------------- explain


def test_explain_says_how_each_layer_runs():
    model = fl.adapt(tiny_llama(), lora(), ["q_proj", "k_proj"])
    with ops.backend("reference"):
        report = fl.explain(model)
    assert list(report) == names("self_attn.q_proj", "self_attn.k_proj")
    row = report["model.layers.0.self_attn.k_proj"]
    assert (row.method, row.in_features, row.out_features, row.rank) == ("lora", 16, 8, 3)
    assert row.trainable == 3 * (16 + 8)
    assert row.path == "reference" and row.reason
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(row.trainable for row in report.values()) == trainable
    assert {row.path for row in fl.explain(model).values()} == {"blas"}
    with pytest.raises(ValueError, match="no adapters"):
        fl.explain(tiny_llama())


def test_explain_prints_a_table_with_like_layers_in_one_row():
    lines = str(fl.explain(fl.adapt(tiny_llama(), lora(), ["q_proj", "k_proj"]))).splitlines()
    assert len(lines) == 4 and lines[3].startswith("not adapted, ")
    assert lines[0].split()[:4] == ["layers", "name", "method", "in"]
    assert lines[1].split()[:6] == ["2", "q_proj", "lora", "16", "->", "16"]
    assert lines[2].split()[:6] == ["2", "k_proj", "lora", "16", "->", "8"]


def test_explain_counts_curlora_s_core_alone():
    report = fl.explain(fl.adapt(tiny_llama(), fl.CURLoRA(rank=5), ["q_proj"]))
    assert {row.trainable for row in report.values()} == {25}


# ----------------------------------------------------------------------------------- merge, remove


def test_merge_gives_plain_frozen_layers_that_do_the_same():
    model = stir(fl.adapt(tiny_llama(), lora(), "all-linear"))
    want = model(**token_batch()).logits
    assert fl.merge(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in tiny_llama().modules()]
    assert not any(p.requires_grad for p in model.parameters())
    torch.testing.assert_close(model(**token_batch()).logits, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [lora(), fl.CURLoRA(rank=2)], ids=lambda method: method.name)
def test_merge_rounds_once_from_float32(method):
    model = stir(fl.adapt(tiny_llama().bfloat16(), method, ["q_proj"]))
    layer = model.model.layers[0].self_attn.q_proj
    want = (layer.weight.float() + layer.delta()).bfloat16()
    assert layer.delta().dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        fl.merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, want)


def test_merge_refuses_a_tied_weight_and_changes_nothing():
    model = tiny_gpt2()
    stir(fl.adapt(model, lora(), ["c_attn", "lm_head"]))
    twin = copy.deepcopy(model)
    with pytest.raises(ValueError, match="the weight of lm_head is also that of transformer.wte; untie"):
        fl.merge(model)
    assert untouched(model, twin)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_merge_refuses_what_is_not_finite_and_changes_nothing(value):
    model = stir(fl.adapt(tiny_llama(), lora(), ["q_proj"]))
    last = model.model.layers[1].self_attn.q_proj
    with torch.no_grad():
        last.adapter.up[0, 0] = value
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match="adapter of model.layers.1.self_attn.q_proj holds NaN or Inf"):
        fl.merge(model)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before) and len(fl.adapters(model)) == 2


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_remove_restores_every_bit(make):
    model, twin = make(), make()
    model(**token_batch())
    stir(fl.adapt(model, lora(), "all-linear"))
    model(**token_batch())
    assert fl.remove(model) is model
    twin.requires_grad_(False)
    assert untouched(model, twin)
    assert torch.equal(model(**token_batch()).logits, twin(**token_batch()).logits)


def test_remove_keeps_the_mode():
    model = fl.adapt(tiny_llama(), lora(), ["q_proj"]).train()
    assert all(module.training for module in fl.remove(model).modules())


def test_a_removed_model_can_be_adapted_anew():
    model = fl.remove(fl.adapt(tiny_llama(), lora(), ["q_proj"]))
    fl.adapt(model, fl.CURLoRA(rank=4), ["v_proj"])
    assert list(fl.adapters(model)) == names("self_attn.v_proj")


@pytest.mark.parametrize("function", [fl.merge, fl.remove])
def test_a_plain_model_has_nothing_to_merge_or_remove(function):
    with pytest.raises(ValueError, match=r"model has no adapters; call fl.adapt\(model, method\) first"):
        function(tiny_llama())


# ---------------------------------------------------------------------------------------- siblings


class Heads(nn.Module):
    """Three projections of one x, as in attention. More of siblings in test_siblings.py."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(9, 8), nn.Linear(9, 5, bias=False), nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x).square().sum(-1) + (self.k_proj(x) * self.v_proj(x).sin()).sum(-1)


def heads(method: Any = None, dtype: torch.dtype = torch.float64) -> Heads:
    torch.manual_seed(0)
    return stir(fl.adapt(Heads().to(dtype), method or lora(), "all-linear"))


def alone(model: Heads) -> Heads:
    """The same adapters, each for itself."""
    twin = copy.deepcopy(model)
    for layer in fl.adapters(twin).values():
        layer.group = None
    return twin


def rows(*lead: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(*lead, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def everything(model: Heads, x: Tensor) -> list[Tensor]:
    """Output and the gradients of x and the parameters."""
    y = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y.detach(), *torch.autograd.grad(y.sum(), [x, *trained] if x.requires_grad else trained)]


@pytest.mark.parametrize("wants_x", [True, False], ids=["x trained", "x frozen"])
@pytest.mark.parametrize("lead", [(7,), (2, 3), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize(
    "method", [lora(), fl.CURLoRA(rank=4), fl.CLoRA(rank=3, k=4)], ids=["lora", "curlora", "clora"]
)
def test_siblings_compute_what_each_would_alone(method, lead, wants_x):
    model = heads(method)
    x = rows(*lead).requires_grad_(wants_x)
    torch.testing.assert_close(everything(model, x), everything(alone(model), x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", ["reference", "blas", "triton"])
def test_siblings_are_as_good_as_eager_in_half(backend):
    model = heads(dtype=torch.bfloat16)

    def plain(model: nn.Module, x: Tensor) -> Tensor:
        outs = []
        for layer in fl.adapters(model).values():
            down, up = (factor.to(x.dtype) for factor in layer.adapter.factors())
            low = nn.functional.linear(layer.adapter.scale * nn.functional.linear(x, down), up)
            outs.append(nn.functional.linear(x, layer.weight, layer.bias) + low)
        return torch.cat(outs, dim=-1)

    def grouped(model: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in fl.adapters(model).values()], dim=-1)

    results = []
    for function, dtype in ((grouped, torch.bfloat16), (plain, torch.bfloat16), (plain, torch.float64)):
        twin = copy.deepcopy(model)
        twin = twin.double() if dtype == torch.float64 else twin
        x = rows(40, dtype=torch.bfloat16).to(dtype).requires_grad_()
        with ops.backend(backend):
            y = function(twin, x)
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
            trained = [p for p in twin.parameters() if p.requires_grad]
            results.append([y.detach(), *torch.autograd.grad(y, [x, *trained], dy)])
    for ours, eager, truth in zip(*results, strict=True):
        assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize("frozen", ["q_proj.up", "k_proj.down", "v_proj.*", "*.down"])
def test_siblings_with_frozen_factors(frozen):
    model = heads()
    for name, p in model.named_parameters():
        if fnmatch.fnmatch(name.replace("adapter.", ""), frozen):
            p.requires_grad_(False)
    x = rows(7).requires_grad_()
    torch.testing.assert_close(everything(model, x), everything(alone(model), x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", ["k q v", "q q k v v", "v", "q", "k v"])
def test_siblings_may_be_called_in_any_order(order):
    model, names = heads(), {"q": "q_proj", "k": "k_proj", "v": "v_proj"}
    twin = alone(model)
    for seed in (0, 1):
        x = rows(7, seed=seed).requires_grad_()
        for letter in order.split():
            pair = [getattr(m, names[letter])(x) for m in (model, twin)]
            torch.testing.assert_close(*pair, rtol=1e-11, atol=1e-11)
            grads = [torch.autograd.grad(y.square().sum(), x, retain_graph=True)[0] for y in pair]
            torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("change", ["nothing", "x", "a factor", "autocast", "gradients", "dropout"])
def test_a_change_between_two_siblings_is_seen(change):
    """What the first projected for the second is then stale."""
    x, model = rows(7, dtype=torch.float32), heads(lora(dropout=0.5), dtype=torch.float32).eval()
    within = {"autocast": lambda: torch.autocast("cpu", torch.bfloat16), "gradients": torch.no_grad}
    with within.get(change, contextlib.nullcontext)():
        model.q_proj(x)
    if change == "x":
        x.mul_(2)
    elif change == "a factor":
        stir(model, seed=3)
    elif change == "dropout":
        model.train()
        torch.manual_seed(1)
        assert not torch.allclose(model.k_proj(x), alone(model).eval().k_proj(x))
        model.eval()
    y = model.k_proj(x)
    assert y.requires_grad
    torch.testing.assert_close(y, alone(model).k_proj(x))


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_siblings_without_gradients(mode):
    model = heads()
    twin = alone(model)
    with mode():
        x = rows(7)
        torch.testing.assert_close(model(x), twin(x), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(everything(model, rows(7)), everything(twin, rows(7)), rtol=1e-11, atol=1e-11)


def test_siblings_backward_twice_gives_the_same():
    model, x = heads(), rows(7).requires_grad_()
    y = model(x).sum()
    inputs = [x, *[p for p in model.parameters() if p.requires_grad]]
    first = torch.autograd.grad(y, inputs, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs), first, rtol=0, atol=0)


def test_siblings_refuse_a_second_derivative():
    model, x = heads(), rows(7).requires_grad_()
    with pytest.raises(RuntimeError, match="twice|second"):
        (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        (dx.square().sum() + model(x).sum()).backward()


def test_copied_siblings_are_siblings_of_each_other():
    model = heads()
    twin = copy.deepcopy(model)
    members = {id(layer) for layer in fl.adapters(twin).values()}
    assert {id(m) for layer in fl.adapters(twin).values() for m in layer.group.members} == members
    x = rows(7).requires_grad_()
    torch.testing.assert_close(everything(twin, x), everything(model, x), rtol=0, atol=0)


def test_a_down_that_is_not_the_factor_itself_is_not_shared():
    """A method may compute its factor from a parameter of that name."""

    class GatedAdapter(LoRAAdapter):
        def factors(self) -> tuple[Tensor, Tensor]:
            return self.down * 2, self.up

    class Gated(LoRA):
        def build(self, site: Any) -> Any:
            return GatedAdapter(site, self.rank, self.scale, self.dropout)

    model, x = heads(Gated(rank=3)), rows(7).requires_grad_()
    torch.testing.assert_close(everything(model, x), everything(alone(model), x), rtol=1e-11, atol=1e-11)


def test_siblings_compile_whole():
    torch._dynamo.reset()
    model, x = heads(dtype=torch.float32), rows(2, 3, dtype=torch.float32).requires_grad_()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = [x, *[p for p in model.parameters() if p.requires_grad]]
    got, want = (torch.autograd.grad(m(x).sum(), inputs) for m in (compiled, model))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_drift_of_an_input_buffer_that_is_refilled():
    """As under CUDA graphs: the same tensor, other numbers."""
    model, x = fl.record_drift(heads()), rows(7)
    model(x)
    x.copy_(rows(7, seed=5) * torch.linspace(0, 3, 9))
    seen = watch(model)
    model(x)
    assert fl.drift(model) == pytest.approx(moved_by(model, seen), rel=1e-5)


# ------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("reentrant", [True, False])
def test_hugging_face_s_checkpointing_changes_no_gradient(reentrant):
    def gradients(recompute: bool) -> list[Tensor]:
        model = stir(fl.adapt(tiny_llama(), fl.CLoRA(rank=4, k=5, dropout=0.1))).train()
        if recompute:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        torch.manual_seed(0)
        (model(**token_batch((9, 6))).loss + fl.penalty(model)).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_gradients_of_a_whole_model_are_those_of_its_dense_weights(make):
    """Every layer with its siblings, against W + delta put into the model by torch.func."""
    model = stir(fl.adapt(make().double(), lora(), "all-linear"))
    trained = [p for p in model.parameters() if p.requires_grad]
    ours = model(**token_batch((9, 6))).loss
    weights = {}
    for name, layer in fl.adapters(model).items():
        delta = layer.adapter.scale * layer.adapter.up @ layer.adapter.down
        weights[f"{name}.weight"] = layer.base.weight + (delta.T if layer.transposed else delta)
    dense = torch.func.functional_call(make().double(), weights, (), token_batch((9, 6)))
    torch.testing.assert_close(ours, dense.loss, rtol=1e-6, atol=0)
    got, want = (torch.autograd.grad(loss, trained) for loss in (ours, dense.loss))
    torch.testing.assert_close(got, want, rtol=2e-4, atol=1e-7)  # Llama's norms and softmax are float32


def test_training_lowers_the_loss():
    model = fl.adapt(tiny_llama(), fl.CLoRA(rank=4, k=5, weight=1e-3, dropout=0.1)).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    torch.manual_seed(0)
    for _ in range(40):
        loss = model(**token_batch((9, 6))).loss
        (loss + fl.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


def test_generation_runs_on_an_adapted_model():
    model = fl.adapt(tiny_llama(), lora(), "all-linear")
    out = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    want = tiny_llama().generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)
    assert torch.equal(out, want)


def takes_a_model(name: str) -> bool:
    """``load`` too, but it reads its folder first."""
    thing = getattr(fl, name)
    return inspect.isfunction(thing) and next(iter(inspect.signature(thing).parameters)) == "model" and name != "load"


@pytest.mark.parametrize("name", filter(takes_a_model, fl.__all__))
def test_the_name_of_a_model_is_no_model(name: str) -> None:
    """Every public function of a model says so in one line, whatever else it is given."""
    call = getattr(fl, name)
    more = {"method": fl.LoRA(), "folder": "none", "batches": [{}], "factor": 0.5, "asked": True}
    others = list(inspect.signature(call).parameters.values())[1:]
    needed = {p.name: more[p.name] for p in others if p.default is p.empty}
    with pytest.raises(ValueError, match="^model is 'gpt2', wants a torch.nn.Module"):
        with call("gpt2", **needed):  # a context begins to work when it is entered
            pass
