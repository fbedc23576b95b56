"""Our methods in PEFT's own ``get_peft_model``: what PEFT does with its methods works with ours."""

import copy
import subprocess
import sys

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from torch import nn

import forgetless as fl

peft = pytest.importorskip("peft")
pytest.importorskip("forgetless.peft.plugin")

TARGETS = ["q_proj", "down_proj"]
CONFIGS = {
    "CURLoRA": lambda **fields: fl.peft.CURLoRAConfig(r=3, alpha=2.0, **fields),
    "CLoRA": lambda **fields: fl.peft.CLoRAConfig(r=3, k=5, weight=0.5, basis="hadamard", **fields),
    "LaLoRA": lambda **fields: fl.peft.LaLoRAConfig(r=3, weight=10.0, prior_precision=0.1, **fields),
}
each = pytest.mark.parametrize("name", CONFIGS)


def make(name, base=tiny_llama, **fields):
    torch.manual_seed(0)
    return peft.get_peft_model(base(), CONFIGS[name](**{"target_modules": TARGETS, **fields}))


def moved(name, **fields):
    """A model whose adapters are away from their start and whose penalty has what it needs."""
    model = make(name, **fields)
    if name == "LaLoRA":
        fl.calibrate(model, [token_batch(seed=1)])
    return stir(model, 0.1).eval()


def logits(model):
    with torch.no_grad():
        return model(**token_batch()).logits


def test_curlora_is_that_of_adapt():
    model = make("CURLoRA")
    torch.manual_seed(0)
    adapted = fl.adapt(tiny_llama(), fl.CURLoRA(3, 2.0), TARGETS)
    layers = dict(model.named_modules())
    for name, layer in fl.adapters(adapted).items():
        theirs = layers[f"base_model.model.{name}"].curlora_adapters["default"]
        assert torch.equal(theirs.rows, layer.adapter.rows) and torch.equal(theirs.columns, layer.adapter.columns)
        with torch.no_grad():
            theirs.core.copy_(layer.adapter.core.normal_())
    for one in (model, adapted):
        one(**token_batch()).loss.backward()
    assert torch.equal(logits(model), logits(adapted))
    for name, layer in fl.adapters(adapted).items():
        core = layers[f"base_model.model.{name}"].curlora_adapters["default"].core
        torch.testing.assert_close(core.grad, layer.adapter.core.grad)


@pytest.mark.parametrize("name", ["CLoRA", "LaLoRA"])
def test_the_penalty_is_that_of_swap_in(name):
    model = moved(name)
    plain = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=3, target_modules=TARGETS))
    fl.swap_in(plain, penalties=model.peft_config["default"].method().all_penalties())
    plain.load_state_dict(model.state_dict())
    fl.swap_in(plain)
    assert fl.penalty(model).item() > 0
    torch.testing.assert_close(fl.penalty(model), fl.penalty(plain))
    assert {report.path for report in fl.explain(model).values()} == {"blas"}


@each
def test_training_moves_the_adapter_alone(name):
    model = make(name)
    if name == "LaLoRA":
        fl.calibrate(model, [token_batch(seed=1)])
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.Adam(trained, 0.05)
    before = model(**token_batch()).loss.item()
    for _ in range(3):
        (model(**token_batch()).loss + 0.01 * fl.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model(**token_batch()).loss.item() < before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


@each
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_is_saved_is_loaded_under_any_name(name, low_cpu_mem_usage, tmp_path):
    model = moved(name)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(
        tiny_llama(), tmp_path, "other", is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(logits(again.eval()), logits(model))
    assert torch.equal(fl.penalty(again), fl.penalty(model))
    told, kept = again.peft_config["other"], model.peft_config["default"]
    assert type(told) is type(kept) and told.method() == kept.method()


@each
def test_adapters_are_added_switched_disabled_and_deleted(name):
    model = moved(name)
    first = logits(model)
    with model.disable_adapter():
        base = logits(model)
    assert not torch.equal(base, first)
    model.add_adapter("second", CONFIGS[name](target_modules=["q_proj", "up_proj"]))
    model.set_adapter("second")
    two = logits(stir(model, 0.1, seed=3))
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not any(torch.equal(a, b) for a, b in ((base, first), (base, two), (first, two), (first, both), (two, both)))
    assert torch.equal(logits(copy.deepcopy(model)), both)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_each_adapter_has_its_own_penalty():
    model = moved("CLoRA")
    first = fl.penalty(model).item()
    model.add_adapter("second", fl.peft.CLoRAConfig(r=3, k=5, weight=1.0, basis="hadamard", target_modules=TARGETS))
    with torch.no_grad():
        for module in model.modules():
            if "second" in getattr(module, "lora_A", {}):
                for part in (module.lora_A, module.lora_B):
                    part["second"].weight.copy_(part["default"].weight)
    model.set_adapter("second")
    assert fl.penalty(model).item() == pytest.approx(2 * first)


@each
@pytest.mark.parametrize("base", [tiny_llama, tiny_gpt2], ids=["linear", "conv1d"])
def test_merging(name, base):
    fields = {"target_modules": ["c_attn", "c_proj"]} if base is tiny_gpt2 else {}
    if base is tiny_gpt2 and name != "CURLoRA":
        fields["fan_in_fan_out"] = True
    model = moved(name, base=base, **fields)
    expected = logits(model)
    for change in (lambda: model.merge_adapter(safe_merge=True), model.unmerge_adapter):
        change()
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert not [n for n, _ in merged.named_parameters() if "lora" in n]


def test_two_curlora_adapters_add_up():
    model = moved("CURLoRA")
    x = torch.randn(2, 3, model.config.hidden_size)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    model.add_adapter("second", CONFIGS["CURLoRA"](seed=7, target_modules=TARGETS, init_weights=False))
    model.base_model.set_adapter(["default", "second"])
    delta = layer.get_delta_weight("default") + layer.get_delta_weight("second")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ delta.T, rtol=1e-4, atol=1e-5)


def test_refusals():
    with pytest.raises(ValueError, match="NullSpace.k is 0"):
        fl.peft.CLoRAConfig(k=0)
    with pytest.raises(ValueError, match="Laplace.curvature is 'none'"):
        fl.peft.LaLoRAConfig(curvature="none")
    with pytest.raises(ValueError, match="CURLoRA.rank is 0"):
        fl.peft.CURLoRAConfig(r=0)
    with pytest.raises(ValueError, match="Dora"):
        make("CLoRA", use_dora=True)
    with pytest.raises(ValueError, match="0 is not supported: Embedding"):
        peft.get_peft_model(nn.Sequential(nn.Embedding(8, 6)), fl.peft.CURLoRAConfig(target_modules=["0"]))
    with pytest.raises(AttributeError, match="no attribute 'LoRAConfig'"):
        _ = fl.peft.LoRAConfig


def test_nothing_of_peft_is_changed_by_the_import():
    code = (
        "import sys, forgetless as fl; assert 'peft' not in sys.modules; import peft;"
        "before = list(peft.PeftType); fl.peft.CURLoRAConfig; assert list(peft.PeftType) == before;"
        "assert 'CURLORA' in peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
