"""What training is wrapped in: activations offloaded to the host, ``torch.func`` transforms, FSDP1."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.func import functional_call, grad, hessian, jvp, vmap
from torch.nn import functional as F

import forgetless as fl
from forgetless.model import running


def swapped_in() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules="all-linear")
    return fl.swap_in(peft.get_peft_model(tiny_llama(), config), penalties=(fl.NullSpace(k=5),))


MODELS: dict[str, Callable[[], Any]] = {
    "clora": lambda: fl.adapt(tiny_llama(), fl.CLoRA(rank=4, k=5, dropout=0.2, penalties=(fl.OutputDeviation(0.3),))),
    "curlora": lambda: fl.adapt(tiny_llama(), fl.CURLoRA(rank=4)),
    "bfloat16": lambda: fl.adapt(tiny_llama().bfloat16(), fl.LoRA(rank=4, dropout=0.1)),
    "swapped in": swapped_in,
}


@pytest.mark.parametrize("name", MODELS)
def test_offloaded_activations_change_no_bit(name: str) -> None:
    model = stir(MODELS[name](), 0.1).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def numbers() -> list[Tensor]:
        torch.manual_seed(5)
        loss = model(**token_batch()).loss + fl.penalty(model)
        return [loss.detach(), *torch.autograd.grad(loss, trained)]

    want = numbers()

    with torch.autograd.graph.save_on_cpu():
        torch.testing.assert_close(numbers(), want, rtol=0, atol=0)
    assert any(g.any() for g in want[1:])


def layer(method: fl.methods.Method) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    torch.manual_seed(0)
    model = stir(fl.adapt(nn.Sequential(nn.Linear(7, 6)).double(), method, ["0"]), 0.3)
    return model, {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, torch.randn(4, 7).double()


@pytest.mark.parametrize("method", [fl.LoRA(rank=3), fl.CURLoRA(rank=3)], ids=lambda method: method.name)
def test_transforms_give_what_autograd_gives(method: fl.methods.Method) -> None:
    """Gradients of parameters, one sample at a time, forward mode and second derivatives, which autograd refuses."""
    model, values, x = layer(method)

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, values, (x,)).square().sum()

    def eager(x: Tensor) -> dict[str, Tensor]:
        names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
        return dict(zip(names, torch.autograd.grad(model(x).square().sum(), parameters), strict=True))

    torch.testing.assert_close(grad(loss)(values, x), eager(x))
    singly = vmap(grad(loss), in_dims=(None, 0))(values, x)
    for i, row in enumerate(x):
        torch.testing.assert_close({n: g[i] for n, g in singly.items()}, eager(row[None]))
    step = torch.randn_like(x)
    y, dy = jvp(model, (x,), (step,))
    torch.testing.assert_close(y, model(x))
    torch.testing.assert_close(dy, model(step) - F.linear(torch.zeros_like(step), model[0].weight, model[0].bias))
    weight = model[0].weight + model[0].delta()
    torch.testing.assert_close(hessian(lambda x: model(x).square().sum())(x[0]), 2 * weight.T @ weight)


def test_the_penalty_is_refused_within_a_transform() -> None:
    model, values, x = layer(fl.CLoRA(rank=3, k=2))

    def loss(values: dict[str, Tensor]) -> Tensor:
        return functional_call(model, values, (x,)).sum() + fl.penalty(model)

    with pytest.raises(RuntimeError, match="fl.penalty is not for torch.func transforms"):
        grad(loss)(values)


def test_a_model_that_fsdp1_wraps_is_not_adapted(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped = FullyShardedDataParallel(tiny_llama(), device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match="sharded by FSDP already"):
            fl.adapt(wrapped, fl.LoRA(rank=2))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_between_the_passes_of_fsdp1_nothing_reads_an_adapter(name: str, tmp_path: Path) -> None:
    model = MODELS[name]()
    layer = next(iter(running(model).values()))
    layer = layer.layer.base_layer if name == "swapped in" else layer.base
    layer.weight = nn.Parameter(layer.weight.detach().flatten(), requires_grad=False)
    uses = [fl.penalty, fl.drift, lambda m: fl.scaled(m, 0.5)]
    if name != "swapped in":
        uses += [fl.explain, fl.merge, fl.remove, lambda m: fl.save(m, tmp_path)]
    for use in uses:
        with pytest.raises(ValueError, match="flattened .*use FSDP2"):
            use(model)
