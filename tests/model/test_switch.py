"""fl.scaled and fl.disabled: for a pass, or for good, on adapted models and on PEFT's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from torch import nn

import forgetless as fl

BATCH = token_batch()
METHODS = {
    "lora": fl.LoRA(4),
    "rslora": fl.LoRA(4, rslora=True),
    "clora": fl.CLoRA(4, k=4),
    "curlora": fl.CURLoRA(4, alpha=2.0),
    "lalora": fl.LaLoRA(4),
}


def adapted(method: fl.methods.Method = METHODS["lora"], base: Any = tiny_llama) -> Any:
    torch.manual_seed(0)
    return stir(fl.adapt(base(), method), 0.2)


def swapped(**config: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **config}
    return fl.swap_in(stir(peft.get_peft_model(tiny_llama(), peft.LoraConfig(**config)), 0.2))


MODELS = {**{name: (lambda m=method: adapted(m)) for name, method in METHODS.items()}, "swapped": swapped}
MODELS |= {"conv1d": lambda: adapted(base=tiny_gpt2), "onto": lambda: hooked_base(adapted())}
every = pytest.mark.parametrize("name", MODELS)


def hooked_base(model: Any) -> Any:
    for layer in fl.adapters(model).values():
        layer.base.register_forward_hook(lambda *_: None)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**BATCH).logits


def weighted(name: str, factor: float) -> torch.Tensor:
    """Logits of dense weights W + factor * delta."""
    model = MODELS[name]()
    if name == "swapped":
        for module in model.modules():
            if hasattr(module, "lora_B"):
                module.lora_B["default"].weight.data.mul_(factor)
        return logits(fl.swap_out(model).merge_and_unload())
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            delta = factor * layer.delta()
            layer.base.weight.add_(delta.T if layer.transposed else delta)
    return logits(fl.remove(model))


# ------------------------------------------------------------------------------------------ passes


@every
def test_scaled_is_the_update_times_the_factor_and_then_as_it_was(name):
    model = MODELS[name]()
    before = logits(model)
    with fl.scaled(model, 0.6):
        torch.testing.assert_close(logits(model), weighted(name, 0.6), rtol=1e-4, atol=1e-5)
        with fl.scaled(model, 0.5):
            torch.testing.assert_close(logits(model), weighted(name, 0.3), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), before)


@every
def test_disabled_is_the_base_model_and_then_as_it_was(name):
    model = MODELS[name]()
    before, base = logits(model), tiny_gpt2() if name == "conv1d" else tiny_llama()
    with fl.disabled(model):
        assert torch.equal(logits(model), logits(base))
    with pytest.raises(KeyError), fl.disabled(model):
        raise KeyError
    assert torch.equal(logits(model), before)


@every
def test_gradients_are_of_the_scale_of_their_pass(name):
    """Without checkpoints a backward pass may come after the context."""
    grads = []
    for later in (True, False):
        model = MODELS[name]()
        with fl.scaled(model, 0.6):
            loss = model(**BATCH).loss
            if not later:
                loss.backward()
        if later:
            loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_some_layers_alone():
    model = adapted()
    layer = model.model.layers[0].self_attn
    with fl.disabled(layer.q_proj), fl.scaled(model.model.layers[1], 0.0):
        ours = logits(model)
    twin = adapted()
    with torch.no_grad():
        for name, one in fl.adapters(twin).items():
            if ".layers.1." in name or name.endswith("0.self_attn.q_proj"):
                for p in one.adapter.parameters():
                    p.zero_()
    torch.testing.assert_close(ours, logits(twin))


@pytest.mark.parametrize("kind", ["adapted", "swapped"])
def test_a_reference_pass_leaves_what_the_pass_before_it_left(kind):
    penalties = (fl.OutputDeviation(0.1),)
    model = adapted(fl.LoRA(4, penalties=penalties)) if kind == "adapted" else fl.swap_in(swapped(), penalties)
    model(**BATCH)
    value = fl.penalty(model)
    with fl.disabled(model), torch.no_grad():
        model(**token_batch(seed=5))
    assert torch.equal(fl.penalty(model), value) and value > 0


@pytest.mark.parametrize("kind", ["adapted", "swapped"])
def test_compiled(kind):
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    if kind == "swapped":
        peft = pytest.importorskip("peft")
        model = fl.swap_in(peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0", "2"])))
    else:
        fl.adapt(model, fl.LoRA(2))
    stir(model)
    compiled, x = torch.compile(model, backend="eager"), torch.randn(3, 8)

    def outputs(call: Any) -> list[torch.Tensor]:
        results = [call(x)]
        with fl.scaled(model, 0.6):
            results.append(call(x))
        with fl.disabled(model):
            results.append(call(x))
        return results

    wanted = outputs(model)
    assert not torch.allclose(wanted[0], wanted[1]) and not torch.allclose(wanted[1], wanted[2])
    for _ in range(2):
        torch.testing.assert_close(outputs(compiled), wanted)


# ------------------------------------------------------------------------------------- checkpointing


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def gradients(model: Any, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.requires_grad]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["lora", "swapped"])
def test_a_checkpoint_recomputes_in_its_own_scale_or_says_that_it_cannot(kind, reentrant):
    plain, model = MODELS[kind]().train(), checkpointed(MODELS[kind](), reentrant)
    loss = model(**BATCH).loss
    with fl.disabled(model), torch.no_grad():  # DPO's reference
        model(**BATCH)
    torch.testing.assert_close(gradients(model, loss), gradients(plain, plain(**BATCH).loss))
    with fl.scaled(model, 0.6), fl.scaled(plain, 0.6):
        theirs = gradients(plain, plain(**BATCH).loss)
        torch.testing.assert_close(gradients(model, model(**BATCH).loss), theirs)
        loss = model(**BATCH).loss
    with pytest.raises(RuntimeError, match="a checkpoint recomputes a layer, but fl.scaled or fl.disabled"):
        loss.backward()
    with fl.disabled(model):
        loss = model(**BATCH).loss
    first = model(**BATCH).loss
    with pytest.raises(RuntimeError, match="a checkpoint recomputes a layer"):
        (loss + first).backward()
    fl.scaled(model, 0.5), fl.scaled(plain, 0.5)
    torch.testing.assert_close(gradients(model, model(**BATCH).loss), gradients(plain, plain(**BATCH).loss))


# ------------------------------------------------------------------------------------------- for good


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("consolidated", [False, True])
def test_saved_and_loaded_it_is_scaled_still(name, consolidated, tmp_path):
    model = adapted(METHODS[name])
    if consolidated:
        fl.consolidate(model, [BATCH])
        stir(model, 0.2, seed=3)
    fl.scaled(model, 0.6)
    wanted = logits(model)
    fl.save(model, tmp_path)
    torch.testing.assert_close(logits(fl.load(tiny_llama(), tmp_path)), wanted, rtol=1e-4, atol=1e-5)
    if name != "curlora":
        peft = pytest.importorskip("peft")
        theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
        torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(fl.merge(model)), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", [{}, {"alpha_pattern": {"q_proj": 20}}], ids=["plain", "pattern"])
def test_peft_saves_the_scale(pattern, tmp_path):
    peft = pytest.importorskip("peft")
    model = swapped(**pattern)
    fl.scaled(model, 0.6)
    wanted = logits(model)
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-4, atol=1e-5)
    with fl.scaled(model, 2.0):
        assert model.peft_config["default"].lora_alpha == pytest.approx(9.6)
    assert model.peft_config["default"].lora_alpha == pytest.approx(4.8)


def test_what_was_consolidated_comes_back_after_the_context():
    model = adapted()
    fl.consolidate(model)
    stir(model, 0.2, seed=3)
    (layer,) = list(fl.adapters(model).values())[:1]
    before = [layer.adapter.scale * up @ down for down, up in layer.folded]
    kept = layer.folded
    with fl.scaled(model, 0.5):
        torch.testing.assert_close([layer.adapter.scale * up @ down for down, up in layer.folded], before)
        update = layer.delta()
        fl.consolidate(model)
    assert all(a is b for a, b in zip(layer.folded[0], kept[0], strict=True))
    down, up = layer.folded[1]
    torch.testing.assert_close(layer.adapter.scale * up @ down, update)


def test_a_head_that_peft_trains_is_off_too():
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = fl.swap_in(stir(peft.get_peft_model(tiny_llama(), config), 0.2))
    with fl.disabled(model):
        assert torch.equal(logits(model), logits(tiny_llama()))


# --------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("factor", [float("nan"), "1", None, True], ids=str)
def test_a_factor_is_a_finite_number(factor):
    with pytest.raises(ValueError, match="factor is .*, wants a finite number"):
        fl.scaled(adapted(), factor)


def test_what_cannot_be_scaled_is_named_and_left_alone():
    with pytest.raises(ValueError, match="model has no adapters"):
        fl.scaled(tiny_llama(), 0.5)
    with pytest.raises(ValueError, match="model has no adapters"), fl.disabled(nn.Linear(2, 2)):
        pass
    model = adapted()
    fl.consolidate(model)
    before = logits(model)
    with pytest.raises(ValueError, match="factor is 0, but .*q_proj has consolidated tasks"):
        fl.scaled(model, 0)
    assert torch.equal(logits(model), before)
    model = swapped()
    model.merge_adapter()
    with pytest.raises(ValueError, match="has its adapters merged into the weight"):
        fl.scaled(model, 0.5)
    dora = swapped(use_dora=True)
    with pytest.raises(ValueError, match="model has no adapters|is not linear in its scale"):
        fl.scaled(dora, 0.5)
