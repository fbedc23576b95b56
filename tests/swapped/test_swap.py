"""PEFT's LoRA layers on our op: same numbers, all of PEFT still works, and what is not on the op is named."""

import copy
import gc
import io
import json
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from helpers import assert_as_good_as_eager, stir, tiny_gpt2, tiny_llama, token_batch
from torch import nn
from torch.nn import functional as F

import forgetless as fl
from forgetless.peft import swap

peft = pytest.importorskip("peft")
lora = pytest.importorskip("peft.tuners.lora")

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make(base=tiny_llama, dtype=torch.float32, second=None, **config):
    """A PEFT model whose adapters have been moved away from their start."""
    torch.manual_seed(0)
    model = base().to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # GPT-2's own
    config = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, **config}
    if base is tiny_gpt2:
        config |= {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    model = peft.get_peft_model(model, peft.LoraConfig(**config))
    if second is not None:
        model.add_adapter("second", peft.LoraConfig(**{**config, **second}))
        model.base_model.set_adapter(["default", "second"])
    return stir(model, 0.1).train()


def numbers(model, batch, autocast=False):
    """Logits and the gradient of every trained parameter; of several batches, stacked."""
    if isinstance(batch, list):
        each = [numbers(model, one, autocast) for one in batch]
        return {key: torch.stack([one[key] for one in each]) for key in each[0]}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(**batch)
    out.loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(grad is not None for grad in grads.values())
    return {"logits": out.logits.detach(), **grads}


def routes(monkeypatch):
    """Counts the forward passes by route."""
    found = []
    plain = swap._Taker.route
    monkeypatch.setattr(swap._Taker, "route", lambda self, x: found.append(plain(self, x)) or found[-1])
    return found


CONFIGS = {
    "linear fp32": {},
    "linear bf16": {"dtype": torch.bfloat16},
    "bf16 adapters too": {"dtype": torch.bfloat16, "adapters": torch.bfloat16},
    "autocast": {"autocast": True},
    "autocast over bf16": {"dtype": torch.bfloat16, "autocast": True},
    "conv1d": {"base": tiny_gpt2},
    "conv1d bf16": {"base": tiny_gpt2, "dtype": torch.bfloat16},
    "rslora": {"use_rslora": True},
    "lora bias": {"base": tiny_gpt2, "lora_bias": True},
    "trained base bias": {"base": tiny_gpt2, "bias": "all"},
    "two adapters": {"second": {"r": 2, "lora_alpha": 3}},
    "two adapters, bf16": {"second": {"r": 2, "lora_alpha": 3}, "dtype": torch.bfloat16},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 8}, "alpha_pattern": {"v_proj": 5}},
    "modules to save": {"modules_to_save": ["lm_head"]},
    "checkpointing": {"checkpoint": {"use_reentrant": False}},
    "checkpointing, reentrant": {"checkpoint": {"use_reentrant": True}},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_every_gradient_are_as_good_as_pefts(name, monkeypatch):
    config = dict(CONFIGS[name])
    autocast, checkpoint, adapters = (config.pop(key, None) for key in ("autocast", "checkpoint", "adapters"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(**config)
    if adapters is not None:
        model.to(adapters)
    theirs, truth = in_the_bases_dtype(copy.deepcopy(model)), copy.deepcopy(model).double()
    if checkpoint is not None:
        for one in (model, theirs):
            one.enable_input_require_grads()
            one.gradient_checkpointing_enable(checkpoint)
    found = routes(monkeypatch)
    # rounding is a draw: batches make a sample of it
    batch = [token_batch((9, 12, 7), prompts=(2, 3, 1), seed=seed) for seed in range(24)]
    assert fl.swap_in(model) is model
    ours = numbers(model, batch, bool(autocast))
    assert found and None not in found  # all of it ran on the op
    eager = numbers(theirs, batch, bool(autocast))
    exact = numbers(truth, batch)
    assert ours.keys() == eager.keys()
    for key in ours:
        assert_sample_as_good_as_eager(ours[key], eager[key].to(ours[key].dtype), exact[key])


def assert_sample_as_good_as_eager(ours, eager, exact):
    """The contract for (batches, ...) of a whole model: RMS over all, the worst element in the median batch.

    The worst element of all batches says little: one rounding upstream moves all that follows. Two equally good orders
    of the same products differ by 2.2 there, in either direction (tiny Llama, bf16, 6 to 100 batches).
    """
    slack = 4 * torch.finfo(torch.float32).eps
    errors = [(t.double() - exact).flatten(1) for t in (ours, eager)]
    for size in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().amax(1).median()):
        limit = 2 * size(errors[1]) + slack * size(exact.flatten(1))
        assert size(errors[0]) <= limit, f"error {size(errors[0]):.3e}, limit {limit:.3e}"


def in_the_bases_dtype(model):
    """Eager PyTorch in the same dtype: over a bf16 base PEFT casts x to float32 for its float32 adapters, we do not."""
    dtype = model.base_model.model.lm_head.weight.dtype
    return model.to(dtype) if dtype == torch.bfloat16 else model


@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_float32_adapters_over_bf16_stay_close_to_pefts_float32_products(base):
    """What not casting x costs against PEFT's float32 low-rank path: the logits and most gradients nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make(base, torch.bfloat16)
    batch = [token_batch((9, 12, 7), seed=seed) for seed in range(6)]
    eager, exact = numbers(model, batch), numbers(copy.deepcopy(model).double(), batch)
    ours = numbers(fl.swap_in(model), batch)
    assert_as_good_as_eager(ours["logits"], eager["logits"], exact["logits"])
    for key, truth in exact.items():
        errors = [(t[key].double() - truth).square().mean().sqrt() for t in (ours, eager)]
        assert errors[0] <= 3 * errors[1]


def same(model, other, batch, tolerance=1e-5):
    for key, value in numbers(other, batch).items():
        torch.testing.assert_close(numbers(model, batch)[key], value, rtol=tolerance, atol=tolerance)


def twins(**config):
    """A swapped-in model and the same one on PEFT's own forward."""
    model = make(**config)
    return fl.swap_in(copy.deepcopy(model)), model


# ------------------------------------------------------------------------------- all of PEFT works


def test_nothing_about_the_model_changes_but_the_forward():
    model, theirs = twins()
    assert repr(model) == repr(theirs)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in theirs.named_modules()]
    assert list(model.state_dict()) == list(theirs.state_dict())
    layer = model.base_model.model.model.layers[0].mlp.up_proj
    assert isinstance(layer, lora.Linear) and type(layer).__name__ == "Linear"
    assert isinstance(model.base_model, peft.LoraModel)
    theirs.load_state_dict(model.state_dict())


def test_parameters_are_shared_with_an_optimiser_made_before():
    model = make()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    before = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]
    fl.swap_in(model)(**token_batch()).loss.backward()
    optimiser.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, optimiser.param_groups[0]["params"], strict=True))


def test_save_pretrained_and_load(tmp_path):
    model, theirs = twins()
    model.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    ours, peft_s = (
        [(tmp_path / whose / name).read_bytes() for name in ("adapter_model.safetensors", "adapter_config.json")]
        for whose in ("ours", "theirs")
    )
    assert ours[0] == peft_s[0]
    told, expected = (json.loads(files[1]) for files in (ours, peft_s))
    for config in (told, expected):  # peft writes a set: in any order
        config["target_modules"] = sorted(config["target_modules"])
    assert told == expected
    again = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "ours")
    batch = token_batch()
    with torch.no_grad():
        expected = theirs.eval()(**batch).logits
        torch.testing.assert_close(again.eval()(**batch).logits, expected)
        torch.testing.assert_close(fl.swap_in(again)(**batch).logits, expected)


def test_adapters_switch_are_disabled_added_and_deleted(monkeypatch):
    model, theirs = twins(second={"r": 2, "target_modules": ["q_proj", "o_proj"]})
    batch = token_batch()
    found = routes(monkeypatch)
    for active in ("default", "second", ["second", "default"]):
        for one in (model, theirs):
            one.base_model.set_adapter(active)
        same(model, theirs, batch)
    assert any(found)
    with model.disable_adapter(), theirs.disable_adapter(), torch.no_grad():
        assert torch.equal(model(**batch).logits, theirs(**batch).logits)
    for one in (model, theirs):
        torch.manual_seed(1)
        one.delete_adapter("second")
        one.add_adapter("second", peft.LoraConfig(r=3, target_modules=["lm_head", "up_proj"], init_lora_weights=False))
        one.set_adapter("second")
    assert fl.explain(model)["base_model.model.lm_head"].path == "blas"  # a layer that PEFT made just now
    found.clear()
    same(model, theirs, batch)
    assert any(found)


@pytest.mark.parametrize("safe", [False, True])
def test_merging(safe):
    model, theirs = twins()
    batch = token_batch()
    same(model, theirs, batch)
    with torch.no_grad():
        expected = theirs(**batch).logits
        model.merge_adapter(safe_merge=safe)
        assert {report.path for report in fl.explain(model).values()} == {"base"}
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
    merged = model.merge_and_unload(safe_merge=safe)
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_weighted_adapters():
    model, theirs = twins(second={"r": 4})
    for one in (model, theirs):
        one.add_weighted_adapter(["default", "second"], [0.3, 0.7], "both", combination_type="cat")
        one.set_adapter("both")
    same(model, theirs, token_batch())


def test_scaling_one_sibling_is_seen():
    model, theirs = twins()
    for one in (model, theirs):
        one.base_model.model.model.layers[0].self_attn.k_proj.scale_layer(3.0)
    same(model, theirs, token_batch())


def test_deepcopy_and_pickle_stay_swapped_in():
    model, theirs = twins(second={"r": 2})
    batch = token_batch()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), torch.load(buffer, weights_only=False)]
    stir(model, 1.0, seed=5)  # the copies are on their own
    for one in copies:
        assert {report.path for report in fl.explain(one).values()} == {"blas"}
        same(one, theirs, batch)
        fl.swap_out(one)
        same(one, theirs, batch)
    assert fl.explain(model)


def test_swap_out_restores_pefts_own():
    model, theirs = twins(second={"r": 2})
    fl.swap_out(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in theirs.modules()]
    assert not any("_forgetless" in vars(m) for m in model.modules())
    batch = token_batch()
    for key, value in numbers(theirs, batch).items():
        assert torch.equal(numbers(model, batch)[key], value)
    with pytest.raises(ValueError, match="no layer of model is swapped in"):
        fl.swap_out(model)
    same(fl.swap_in(fl.swap_in(model)), theirs, batch)  # again, and twice is once


def test_dropout_is_dropped_out_in_training_alone():
    model, theirs = twins(lora_dropout=0.5)
    batch = token_batch()
    with torch.no_grad():
        torch.manual_seed(0)
        first = model(**batch).logits
        assert not torch.allclose(first, model(**batch).logits)
        torch.manual_seed(0)
        assert torch.equal(first, model(**batch).logits)
        torch.testing.assert_close(model.eval()(**batch).logits, theirs.eval()(**batch).logits)


def test_dropouts_mean_is_pefts():
    layer = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(target_modules=["0"], lora_dropout=0.3))
    stir(layer, 0.5).train()
    x = torch.randn(1, 8).expand(40_000, 8).contiguous()
    with torch.no_grad():
        theirs = layer(x)
        ours = fl.swap_in(layer)(x)
    assert not torch.equal(ours, theirs)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(ours.std(0), theirs.std(0), rtol=0.03, atol=0.01)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant):
    model = fl.swap_in(make(lora_dropout=0.5))
    batch = token_batch()
    torch.manual_seed(0)
    plain = numbers(model, batch)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    torch.manual_seed(0)
    for key, value in numbers(model, batch).items():
        torch.testing.assert_close(value, plain[key])


def test_compiled():
    model, theirs = twins()
    batch = token_batch()
    compiled = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, theirs(**batch).logits)


# --------------------------------------------------------------------- what stays on PEFT's forward


def only(model):
    (report,) = fl.explain(model).values()
    return report


def toy(layer=None, **config):
    torch.manual_seed(0)
    model = nn.Sequential(layer if layer is not None else nn.Linear(8, 6))
    model = peft.get_peft_model(model, peft.LoraConfig(**{"r": 2, "target_modules": ["0"], **config}))
    return stir(model, 0.3)


class Tapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


def hook_lora_a(model):
    model.base_model.model[0].lora_A["default"].register_forward_hook(lambda m, a, y: 2 * y)


def hook_dropout(model):
    model.base_model.model[0].lora_dropout["default"].register_forward_hook(lambda m, a, y: 2 * y)


def parametrise(model):
    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    nn.utils.parametrize.register_parametrization(model.base_model.model[0].lora_B["default"], "weight", Twice())


KEPT = {
    "dora": ({"use_dora": True}, None, "Dora"),
    "embedding": ({"layer": nn.Embedding(8, 6)}, None, "Embedding is none of Linear"),
    "conv": ({"layer": nn.Conv2d(2, 3, 1)}, None, "Conv2d is none of Linear"),
    "hooked factor": ({}, hook_lora_a, "have hooks"),
    "hooked dropout": ({}, hook_dropout, "have hooks"),
    "parametrised factor": ({}, parametrise, "not nn.Linear"),
    "dropout of everything": ({"lora_dropout": 1.0}, None, "drops everything"),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_rest_keeps_pefts_forward_and_says_why(name):
    config, change, reason = KEPT[name]
    theirs = toy(**copy.deepcopy(config))
    if change is not None:
        change(theirs)
    model = fl.swap_in(copy.deepcopy(theirs))
    report = only(model)
    assert report.path == "peft" and reason in report.reason and reason in str(fl.explain(model))
    x = torch.arange(4) if name == "embedding" else torch.randn(3, 2, 5, 5) if name == "conv" else torch.randn(3, 8)
    torch.manual_seed(0)
    ours = model(x)
    torch.manual_seed(0)
    assert torch.equal(ours, theirs(x))


def test_a_mixed_batch_runs_on_pefts_forward():
    model, theirs = twins(second={"r": 2})
    batch = {**token_batch((9, 9)), "adapter_names": ["default", "second"]}
    for one in (model, theirs):
        one.eval().requires_grad_(False)
    assert torch.equal(model(**batch).logits, theirs(**batch).logits)


def test_a_tracer_or_a_transform_runs_pefts_forward():
    model, theirs = fl.swap_in(toy()), toy()
    x = torch.randn(3, 8)
    parameters = dict(theirs.named_parameters())

    def loss(model):
        return torch.func.grad(lambda p: torch.func.functional_call(model, p, (x,)).square().sum())(parameters)

    torch.testing.assert_close(loss(model), loss(theirs))
    assert torch.equal(torch.func.vmap(model)(x[:, None]), torch.func.vmap(theirs)(x[:, None]))
    traced = torch.jit.trace(model.base_model.model[0], x)
    torch.testing.assert_close(traced(2 * x), theirs(2 * x))
    exported = torch.export.export(model.base_model.model, (x,))
    assert not any("forgetless" in str(node.target) for node in exported.graph.nodes)
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, y: 2 * y if type(m) is nn.Linear else y)
    assert torch.equal(model(x), theirs(x))
    handle.remove()


def test_layers_added_behind_our_back_are_named():
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0"]), base)
    fl.swap_in(base)
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["0", "1"]), base, "second")
    assert fl.explain(base)["1"].path == "peft" and "again after adding" in fl.explain(base)["1"].reason
    fl.swap_in(base)
    assert {report.path for report in fl.explain(base).values()} == {"blas"}


def test_a_second_derivative_is_refused_not_wrong():
    model = fl.swap_in(toy())
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)


def test_bad_input():
    with pytest.raises(ValueError, match="Linear without PEFT LoRA layers"):
        fl.swap_in(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="wants Penalty instances"):
        fl.swap_in(toy(), penalties=[fl.LoRA()])
    with pytest.raises(ValueError, match="Dora"):
        fl.swap_in(toy(use_dora=True), penalties=[fl.NullSpace(k=2)])
    with pytest.raises(ValueError, match="swap_in"):
        fl.penalty(toy())
    assert "call fl.swap_in" in only(toy()).reason


def test_the_library_does_not_import_peft():
    code = "import sys, forgetless; assert 'peft' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_peft_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    for name in [name for name in sys.modules if name.startswith("peft.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install 'peft>="):
        fl.swap_in(nn.Linear(2, 2))


# ------------------------------------------------------------------- frozen layers that run themselves


class FakeQuantised(nn.Linear):
    """Its weight is packed: only its own forward knows x @ W.T."""

    def __init__(self, inner):
        super().__init__(inner.in_features, inner.out_features, inner.bias is not None, dtype=inner.weight.dtype)
        self.load_state_dict(inner.state_dict())
        self.table = inner.weight.detach().clone()
        self.weight = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return F.linear(x, self.table.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def quantise(model):
    for module in list(model.modules()):
        if isinstance(module, lora.Linear):
            module.base_layer = FakeQuantised(module.base_layer)
    return model


@pytest.mark.parametrize("config", ["linear fp32", "linear bf16", "autocast", "two adapters", "checkpointing"])
def test_a_quantised_base_runs_itself(config, monkeypatch):
    config = dict(CONFIGS[config])
    autocast, checkpoint = config.pop("autocast", False), config.pop("checkpoint", None)
    model = quantise(make(**config))
    theirs, truth = in_the_bases_dtype(copy.deepcopy(model)), copy.deepcopy(model)
    for module in truth.modules():
        if isinstance(module, FakeQuantised):
            module.table = module.table.double()
    truth.double()
    fl.swap_in(model)
    if checkpoint:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(checkpoint)
    report = fl.explain(model)["base_model.model.model.layers.0.mlp.up_proj"]
    assert report.path == "onto" and "FakeQuantised makes x W^T itself" in report.reason
    found = routes(monkeypatch)
    batch = [token_batch((9, 12, 7), seed=seed) for seed in range(6)]
    ours, eager, exact = numbers(model, batch, autocast), numbers(theirs, batch, autocast), numbers(truth, batch)
    assert found and all(route is not None and route[1] for route in found)
    for key in ours:
        eager[key] = eager[key].to(ours[key].dtype)
        assert_as_good_as_eager(ours[key], eager[key], exact[key])


def test_hooks_on_the_frozen_layer_are_run():
    model, theirs = fl.swap_in(toy()), toy()
    for one in (model, theirs):
        one.base_model.model[0].base_layer.register_forward_hook(lambda m, a, y: 3 * y)
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), theirs(x))
    assert only(model).path == "onto" and "hooks" in only(model).reason


# ---------------------------------------------------------------------------------------- penalties


def test_penalties_are_those_of_an_adapted_model():
    penalties = (fl.NullSpace(k=5), fl.Decay(0.1), fl.OutputDeviation(0.3), fl.WeightDeviation(0.2))
    model = fl.swap_in(make(), penalties=penalties)
    adapted = fl.adapt(tiny_llama(), fl.LoRA(4, 8, penalties=penalties), targets=LINEARS).train()
    theirs = dict(model.named_modules())
    with torch.no_grad():
        for name, layer in fl.adapters(adapted).items():
            layer.adapter.down.copy_(theirs[f"base_model.model.{name}"].lora_A["default"].weight)
            layer.adapter.up.copy_(theirs[f"base_model.model.{name}"].lora_B["default"].weight)
    batch = token_batch()
    values = []
    for one in (model, adapted):
        loss = one(**batch).loss + fl.penalty(one)
        loss.backward()
        values.append(loss.detach())
    torch.testing.assert_close(*values)
    for name, layer in fl.adapters(adapted).items():
        mine = theirs[f"base_model.model.{name}"]
        torch.testing.assert_close(mine.lora_A["default"].weight.grad, layer.adapter.down.grad)
        torch.testing.assert_close(mine.lora_B["default"].weight.grad, layer.adapter.up.grad)
    drifts = fl.drift(adapted)
    assert fl.drift(model) == pytest.approx({f"base_model.model.{name}": value for name, value in drifts.items()})


@pytest.mark.parametrize("penalty", [fl.Laplace(100.0, prior_precision=0.1), fl.SourceDeviation(0.5)], ids=str)
def test_calibrated_penalties(penalty):
    model = fl.swap_in(make(), penalties=[penalty])
    adapted = fl.adapt(tiny_llama(), fl.LoRA(4, 8, penalties=(penalty,)), targets=LINEARS)
    theirs = dict(model.named_modules())
    batches = [token_batch(seed=1), token_batch((9, 5), seed=2)]
    values = []
    for one in (model, adapted):
        with torch.no_grad():
            for name, layer in fl.adapters(adapted).items():
                layer.adapter.down.copy_(theirs[f"base_model.model.{name}"].lora_A["default"].weight)
                layer.adapter.up.copy_(theirs[f"base_model.model.{name}"].lora_B["default"].weight)
        counts = fl.calibrate(one, batches)
        assert counts["layers"] == 14 and counts["batches"] == 2
    stir(model, 0.1, seed=3)
    with torch.no_grad():
        for name, layer in fl.adapters(adapted).items():
            layer.adapter.down.copy_(theirs[f"base_model.model.{name}"].lora_A["default"].weight)
            layer.adapter.up.copy_(theirs[f"base_model.model.{name}"].lora_B["default"].weight)
    values = [fl.penalty(one).detach() for one in (model, adapted)]
    assert values[0] > 0
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


def test_penalties_follow_the_active_adapters_and_the_device_and_leave_with_swap_out(tmp_path):
    model = fl.swap_in(make(second={"r": 2}), penalties=(fl.NullSpace(k=5),))
    both = fl.penalty(model).item()
    parts = []
    for name in ("default", "second"):
        model.set_adapter(name)
        parts.append(fl.penalty(model).item())
    assert both == pytest.approx(sum(parts)) and min(parts) > 0
    model.add_adapter("third", peft.LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    model.set_adapter("third")
    assert fl.penalty(model).item() > 0 and len(fl.drift(model)) == 0
    model.delete_adapter("third")
    model.add_adapter("third", peft.LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
    model.set_adapter("third")
    assert fl.penalty(model).item() > 0
    model.double()
    assert fl.penalty(model).dtype == torch.float64
    assert not [key for key in model.state_dict() if "forgetless" in key]  # bases are drawn again, not saved
    model.save_pretrained(tmp_path)
    fl.swap_in(model, penalties=())
    assert fl.penalty(model).item() == 0
    fl.swap_out(model)
    assert not [name for name, _ in model.named_modules() if "forgetless" in name]


def test_penalties_over_a_quantised_base():
    plain = fl.swap_in(make(), penalties=(fl.NullSpace(k=5), fl.OutputDeviation(0.5)))
    model = fl.swap_in(quantise(make()), penalties=(fl.NullSpace(k=5), fl.OutputDeviation(0.5)))
    batch = token_batch()
    values = []
    for one in (plain, model):
        loss = one(**batch).loss + fl.penalty(one)
        loss.backward()
        values.append([loss.detach(), *(p.grad for p in one.parameters() if p.requires_grad)])
    for a, b in zip(*values, strict=True):
        torch.testing.assert_close(a, b)
    assert fl.drift(plain) == pytest.approx(fl.drift(model))


def test_peft_saves_no_statistics_of_swapped_in_layers(tmp_path):
    model = fl.swap_in(make(), penalties=(fl.NullSpace(k=5), fl.SourceDeviation(0.1)))
    fl.calibrate(model, [token_batch()])
    model.save_pretrained(tmp_path)
    fl.swap_out(copy.deepcopy(model)).save_pretrained(tmp_path / "peft")
    ours, theirs = (folder / "adapter_model.safetensors" for folder in (tmp_path, tmp_path / "peft"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert any("forgetless_penalties" in key for key in model.state_dict())
    model.double()  # moves them
    assert all(
        t.dtype == torch.float64 for key, t in model.state_dict().items() if "penalties" in key and "rest" in key
    )


@pytest.mark.parametrize("leave", ["merge_and_unload", "unload"])
def test_an_unloaded_model_is_plain_again(leave):
    model = getattr(fl.swap_in(make()), leave)()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    batch = token_batch()
    torch.testing.assert_close(pickle.loads(pickle.dumps(model))(**batch).logits, model(**batch).logits)


def test_a_copy_of_the_inner_model_is_pickled_after_the_original_is_gone():
    inner = copy.deepcopy(fl.swap_in(make()).base_model.model)
    gc.collect()
    batch = token_batch()
    torch.testing.assert_close(pickle.loads(pickle.dumps(inner))(**batch).logits, inner(**batch).logits)
