"""PEFT's target_parameters on our op: same numbers, and PEFT goes on working."""

import copy

import pytest
import torch
from helpers import stir, token_batch
from tiny_experts import FAMILIES, STACKS, tiny_experts

import forgetless as fl

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

BATCH = token_batch((7, 5))
NAME = "base_model.model.model.layers.0.mlp.experts"


def make(family="Qwen3Moe"):
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["o_proj"], target_parameters=STACKS)
    return stir(peft.get_peft_model(tiny_experts(family), config), 0.2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_peft(family):
    theirs = make(family)
    ours = fl.swap_in(copy.deepcopy(theirs))
    a, b = ours(**BATCH), theirs(**BATCH)
    close(a.logits, b.logits)
    a.loss.backward()
    b.loss.backward()
    grads = dict(theirs.named_parameters())
    for name, p in ours.named_parameters():
        if p.requires_grad:
            assert (p.grad - grads[name].grad).norm() <= 1e-5 * grads[name].grad.norm(), name
    assert {report.path for name, report in fl.explain(ours).items() if ".experts." in name} == {"experts"}


def test_peft_goes_on_working_and_swap_out_leaves_nothing():
    theirs = make().eval()
    ours = fl.swap_in(copy.deepcopy(theirs))
    expected = theirs(**BATCH).logits
    with ours.disable_adapter(), theirs.disable_adapter():
        close(ours(**BATCH).logits, theirs(**BATCH).logits)
    close(copy.deepcopy(ours)(**BATCH).logits, expected)
    close(copy.deepcopy(ours).unload()(**BATCH).logits, copy.deepcopy(theirs).unload()(**BATCH).logits)
    close(copy.deepcopy(ours).merge_and_unload()(**BATCH).logits, expected)
    ours.add_adapter("second", peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=STACKS))
    ours.base_model.set_adapter(["default", "second"])
    assert fl.explain(ours)[f"{NAME}.down_proj"].reason.startswith("several adapters are active")
    close(ours(**BATCH).logits, expected)
    ours.base_model.set_adapter("second")
    with theirs.disable_adapter():
        close(ours(**BATCH).logits, theirs(**BATCH).logits)
    ours.base_model.set_adapter("default")
    fl.swap_out(ours)
    assert torch.equal(ours(**BATCH).logits, expected)
    assert ours.get_submodule(NAME).get_base_layer().config is ours.base_model.model.config


def test_penalties_and_statistics_are_those_of_adapt():
    penalties = (fl.NullSpace(k=4), fl.SourceDeviation(), fl.OutputDeviation())
    swapped = fl.swap_in(make(), penalties)
    adapted = fl.adapt(tiny_experts("Qwen3Moe"), fl.LoRA(rank=2, alpha=4, penalties=penalties), ["o_proj", *STACKS])
    for name, layer in fl.adapters(adapted).items():
        down, up = (t.detach() for t in fl.model.running(swapped)[f"base_model.model.{name}"].adapter.factors())
        layer.adapter.down.data.copy_(down)
        layer.adapter.up.data.copy_(up)
    for model in (swapped, adapted):
        fl.calibrate(model, [BATCH])
        model.train()
        model(**BATCH)
    torch.testing.assert_close(fl.penalty(swapped), fl.penalty(adapted), rtol=1e-5, atol=0)
    fl.penalty(swapped).backward()
    assert all(p.grad is not None for p in swapped.parameters() if p.requires_grad)


def test_a_parameter_that_is_no_stack_stays_with_peft():
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], target_parameters=["q_proj.weight"])
    model = fl.swap_in(peft.get_peft_model(tiny_experts("Qwen3Moe"), config))
    report = next(report for name, report in fl.explain(model).items() if "q_proj" in name)
    assert report.path == "peft" and "no stack of experts" in report.reason
