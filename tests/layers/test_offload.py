"""Layers that accelerate offloads: adapters live where the layer executes, and nothing is computed from no numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from tiny_experts import STACKS, tiny_experts
from torch import Tensor

import forgetless as fl
from forgetless.offload import onloaded

accelerate = pytest.importorskip("accelerate")

METHODS = {
    "lora": fl.LoRA(rank=4, penalties=(fl.SourceDeviation(0.1), fl.Laplace())),
    "clora": fl.CLoRA(rank=4, k=4),
    "curlora": fl.CURLoRA(rank=4),
}
BATCH = token_batch()


def offloaded(model: Any, how: str, folder: Path) -> Any:
    if how == "cpu":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk":
        accelerate.disk_offload(model, str(folder / "weights"), execution_device="cpu")
    else:  # one block of several, as device_map has it
        places = {name: "cpu" for name, _ in model.named_children()}
        first = next(name for name in places if name != "lm_head")
        del places[first]
        places |= {f"{first}.{name}": "cpu" for name, _ in model.get_submodule(first).named_children()}
        blocks = next(name for name in places if name.endswith((".layers", ".h")))
        del places[blocks]
        places |= {f"{blocks}.{name}": "disk" for name, _ in model.get_submodule(blocks).named_children()}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(folder / "w"), force_hooks=True)
    return model


def results(model: Any) -> list[Tensor]:
    """Logits, loss with penalty, gradients."""
    output = model(**BATCH)
    loss = output.loss + fl.penalty(model)
    grads = torch.autograd.grad(loss, [p for _, p in sorted(model.named_parameters()) if p.requires_grad])
    return [output.logits.detach(), loss.detach(), *grads]


@pytest.mark.parametrize(
    "make, how",
    [(tiny_llama, "cpu"), (tiny_llama, "disk"), (tiny_llama, "device_map"), (tiny_gpt2, "device_map")],
    ids=["llama-cpu", "llama-disk", "llama-device_map", "gpt2-device_map"],
)
@pytest.mark.parametrize("name", METHODS)
def test_it_is_what_it_is_without(name: str, make: Any, how: str, tmp_path: Path) -> None:
    plain = stir(fl.adapt(make(), METHODS[name]), 0.1)
    if name == "lora":
        fl.calibrate(plain, [BATCH])
    fl.save(plain, tmp_path / "adapter")
    model = fl.adapt(offloaded(make(), how, tmp_path), METHODS[name])
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    assert any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(model(**BATCH).logits, make()(**BATCH).logits)
    if name == "lora":
        fl.calibrate(model, [BATCH])
    fl.remove(model)
    fl.load(model, tmp_path / "adapter")
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)
    fl.save(model, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes()
    for fold in (fl.merge, fl.consolidate):
        with pytest.raises(ValueError, match="offloaded, or has no numbers yet: nothing was"):
            fold(model)


HOWS = ["cpu", "disk", "device_map"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("name", METHODS)
def test_a_model_may_be_offloaded_after_it_was_adapted(name: str, how: str, tmp_path: Path) -> None:
    plain, model = (stir(fl.adapt(tiny_llama(), METHODS[name]), 0.1) for _ in range(2))
    if name == "lora":
        for one in (plain, model):
            fl.calibrate(one, [BATCH])
    fl.save(plain, tmp_path / "adapter")
    own = [p for p in model.parameters() if p.requires_grad]
    offloaded(model, how, tmp_path)
    kept = [p for p in model.parameters() if p.requires_grad]
    assert all(a is b for a, b in zip(own, kept, strict=True))  # those that an optimizer may know
    assert any(p.is_meta for p in model.parameters())
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)
    fl.save(model, tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes()
    with pytest.raises(ValueError, match="offloaded, or has no numbers yet: nothing was"):
        fl.merge(model)
    fl.remove(model)
    torch.testing.assert_close(model(**BATCH).logits, tiny_llama()(**BATCH).logits)
    fl.load(model, tmp_path / "adapter")
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_an_optimizer_of_before_or_after_trains_an_offloaded_model(how: str, tmp_path: Path) -> None:
    for early in (True, False):
        plain, model = (stir(fl.adapt(tiny_llama(), fl.CLoRA(rank=4, k=4)), 0.1) for _ in range(2))

        def optimizer(one: Any) -> Any:
            return torch.optim.AdamW([p for p in one.parameters() if p.requires_grad], lr=1e-2)

        made = optimizer(model) if early else None
        offloaded(model, how, tmp_path / str(early))
        for one, steps in ((plain, optimizer(plain)), (model, made or optimizer(model))):
            for _ in range(2):
                (one(**BATCH).loss + fl.penalty(one)).backward()
                steps.step()
                steps.zero_grad()
        torch.testing.assert_close(results(model), results(plain), rtol=1e-3, atol=1e-4)


def test_hooks_are_taken_off_and_put_on_again(tmp_path: Path) -> None:
    model = stir(fl.adapt(tiny_llama(), fl.CLoRA(rank=4, k=4)), 0.1)
    expected = results(model)
    own = [p for p in model.parameters() if p.requires_grad]
    for how in ("cpu", "disk"):
        offloaded(model, how, tmp_path)
        torch.testing.assert_close(results(model), expected)
        accelerate.hooks.remove_hook_from_submodules(model)
        assert not any(p.is_meta for p in model.parameters())
        torch.testing.assert_close(results(model), expected)
    assert all(a is b for a, b in zip(own, [p for p in model.parameters() if p.requires_grad], strict=True))


def test_statistics_stay_too_when_buffers_are_offloaded() -> None:
    plain, model = (stir(fl.adapt(tiny_llama(), METHODS["lora"]), 0.1) for _ in range(2))
    for one in (plain, model):
        fl.calibrate(one, [BATCH])
    accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)


def test_an_offload_around_adapted_layers_is_refused() -> None:
    model = fl.adapt(tiny_llama(), fl.LoRA(rank=4))
    kind = type(model.model.layers[0]).__name__
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=[kind])
    with pytest.raises(ValueError, match="is offloaded with the module around it, and cannot be trained there"):
        model(**BATCH)


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
@pytest.mark.parametrize("first", ["adapt", "offload"])
def test_experts_are_offloaded(first: str, family: str, how: str, tmp_path: Path) -> None:
    method, targets = fl.CLoRA(rank=2, k=4), ["q_proj", *STACKS]
    plain = stir(fl.adapt(tiny_experts(family), method, targets), 0.1)
    fl.save(plain, tmp_path / "adapter")
    if first == "adapt":
        model = offloaded(stir(fl.adapt(tiny_experts(family), method, targets), 0.1), how, tmp_path)
    else:
        model = fl.load(offloaded(tiny_experts(family), how, tmp_path), tmp_path / "adapter")
    torch.testing.assert_close(results(model), results(plain), rtol=1e-4, atol=1e-5)
    fl.save(model, tmp_path / "again")
    for path in (tmp_path / "again").glob("*.safetensors"):  # the configs name targets in the order of loading
        assert path.read_bytes() == (tmp_path / "adapter" / path.name).read_bytes()
    fl.remove(model)
    torch.testing.assert_close(model(**BATCH).logits, tiny_experts(family)(**BATCH).logits)


def test_a_consolidated_adapter_is_not_folded_into_an_offloaded_model(tmp_path: Path) -> None:
    plain = stir(fl.adapt(tiny_llama(), fl.LoRA(rank=4)), 0.1)
    fl.consolidate(plain)
    fl.save(plain, tmp_path / "adapter")
    model = offloaded(tiny_llama(), "device_map", tmp_path)
    with pytest.raises(ValueError, match="nothing was loaded"):
        fl.load(model, tmp_path / "adapter")
    assert not fl.adapters(model)
    torch.testing.assert_close(model(**BATCH).logits, tiny_llama()(**BATCH).logits)


def test_an_offload_around_the_layer_is_refused() -> None:
    model = tiny_llama()
    kind = type(model.model.layers[0]).__name__
    accelerate.cpu_offload(model, execution_device="cpu", preload_module_classes=[kind])
    with pytest.raises(ValueError, match="is offloaded with the module around it"):
        fl.adapt(model, fl.LoRA(rank=4))


def test_a_model_on_the_meta_device_is_adapted_there_and_not_saved_or_filled(tmp_path: Path) -> None:
    plain = fl.adapt(tiny_llama(), fl.LoRA(rank=4))
    fl.save(plain, tmp_path)
    with torch.device("meta"):
        base = copy.deepcopy(tiny_llama()).to("meta")
    model = fl.adapt(base, fl.LoRA(rank=4))
    assert all(p.is_meta for p in model.parameters())
    with pytest.raises(ValueError, match="no numbers"):
        fl.save(model, tmp_path / "meta")
    fl.remove(model)
    with pytest.raises(ValueError, match="there is nothing to load into"):
        fl.load(model, tmp_path)


def test_numbers_are_there_within_and_gone_after() -> None:
    model = offloaded(tiny_llama(), "cpu", Path())
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(RuntimeError, match="stop"), onloaded(model):
        assert torch.equal(layer.weight, tiny_llama().model.layers[0].self_attn.q_proj.weight)
        raise RuntimeError("stop")
    assert layer.weight.is_meta
