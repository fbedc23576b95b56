"""Layers that accelerate offloads: adapters live where the layer executes, and nothing is computed from no numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor

import forgetless as fl
from forgetless.layers.offload import onloaded

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
    grads = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
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


@pytest.mark.parametrize("how", ["cpu", "disk"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*has no statistics")
def test_an_adapter_that_is_offloaded_with_the_model_is_refused(name: str, how: str, tmp_path: Path) -> None:
    model = offloaded(stir(fl.adapt(tiny_llama(), METHODS[name]), 0.1), how, tmp_path)
    for use in (lambda: model(**BATCH), lambda: fl.penalty(model)):
        with pytest.raises(ValueError, match="is offloaded: offload the model first, then fl.adapt or fl.load"):
            use()
    with pytest.raises(ValueError, match="no numbers: it is offloaded, or was never filled"):
        fl.save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="offloaded, or has no numbers yet"):
        fl.merge(model)


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
