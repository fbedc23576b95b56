"""Experts on disk: ours and PEFT's, both ways, in PEFT's layout."""

import json
import shutil

import pytest
import torch
from helpers import stir, token_batch
from safetensors.torch import load_file, save_file
from tiny_experts import FAMILIES, STACKS, tiny_experts

import forgetless as fl

peft = pytest.importorskip("peft")
pytest.importorskip("transformers.integrations.moe")

BATCH = token_batch((7, 5))


def logits(model):
    with torch.no_grad():
        return model.eval()(**BATCH).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", ["down_proj"]], ids=str)
def test_peft_reads_what_save_wrote_and_load_reads_what_peft_wrote(family, targets, tmp_path):
    model = stir(fl.adapt(tiny_experts(family), fl.LaLoRA(rank=2, alpha=3, dropout=0.1), targets))
    expected = logits(model)
    assert (expected - logits(tiny_experts(family))).abs().max() > 0.01
    fl.save(model, tmp_path / "ours")
    assert torch.equal(logits(fl.load(tiny_experts(family), tmp_path / "ours")), expected)
    theirs = peft.PeftModel.from_pretrained(tiny_experts(family), tmp_path / "ours")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    back = fl.load(tiny_experts(family), tmp_path / "theirs")
    assert fl.adapters(back).keys() == fl.adapters(model).keys()
    torch.testing.assert_close(logits(back), expected)


def test_the_layout_is_that_of_peft(tmp_path):
    model = stir(fl.adapt(tiny_experts("Qwen3Moe"), fl.LoRA(rank=2), STACKS))
    fl.save(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    inner, outer = (f"base_model.model.model.layers.0.mlp.experts{part}" for part in (".base_layer", ""))
    for name, prefix in zip(("gate_up_proj", "down_proj"), (inner, outer), strict=True):
        adapter = fl.adapters(model)[f"model.layers.0.mlp.experts.{name}"].adapter
        for e in range(4):
            assert torch.equal(tensors[f"{prefix}.lora_A.weight"][2 * e : 2 * e + 2], adapter.down[e])
            assert torch.equal(tensors[f"{prefix}.lora_B.weight"][:, e::4], adapter.up[e])
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == []
    assert config["target_parameters"] == [f"model.layers.0.mlp.{name}" for name in STACKS]


def test_one_stack_of_two_and_a_consolidated_task(tmp_path):
    model = stir(fl.adapt(tiny_experts("GptOss"), fl.LoRA(rank=2), ["experts.down_proj"]))
    fl.consolidate(model)
    stir(model, seed=1)
    expected = logits(model)
    fl.save(model, tmp_path)
    torch.testing.assert_close(logits(fl.load(tiny_experts("GptOss"), tmp_path)), expected)
    theirs = peft.PeftModel.from_pretrained(tiny_experts("GptOss"), tmp_path)
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_every_expert_come_back(tmp_path):
    method = fl.LoRA(rank=2, penalties=(fl.SourceDeviation(), fl.NullSpace(k=4)))
    model = fl.adapt(tiny_experts("Qwen3Moe"), method, STACKS)
    fl.calibrate(model, [BATCH])
    stir(model)
    fl.save(model, tmp_path)
    again = fl.load(tiny_experts("Qwen3Moe"), tmp_path)
    assert fl.penalty(again) == fl.penalty(model) > 0


def test_export_lora_writes_experts_too(tmp_path):
    model = stir(fl.adapt(tiny_experts("Mixtral"), fl.CLoRA(rank=2, k=4), STACKS))
    fl.export_lora(model, tmp_path)
    torch.testing.assert_close(logits(fl.load(tiny_experts("Mixtral"), tmp_path)), logits(model))


def spoil(folder, change):
    """PEFT's folder with another config or other tensors."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")


def cut(config, tensors):
    key = next(key for key in tensors if "experts.lora_A" in key)
    tensors[key] = tensors[key][:-1].clone()


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda config, tensors: config.update(target_parameters=["experts.down_proj"]),
            "does not say which parameter",
        ),
        (lambda config, tensors: config.update(target_parameters=None), "does not say which parameter"),
        (cut, r"has shape \(7, 12\), wants 4 experts in dimension 0"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, says, tmp_path):
    fl.export_lora(stir(fl.adapt(tiny_experts("Qwen3Moe"), fl.LoRA(rank=2), STACKS)), tmp_path / "right")
    shutil.copytree(tmp_path / "right", tmp_path / "wrong")
    spoil(tmp_path / "wrong", change)
    model = tiny_experts("Qwen3Moe")
    with pytest.raises(ValueError, match=says):
        fl.load(model, tmp_path / "wrong")
    assert not fl.adapters(model)
