"""What is trained beside the adapters: saved and loaded, by PEFT as well, or named."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from safetensors.torch import load_file
from torch import Tensor, nn

import forgetless as fl
from forgetless.checkpoint.io import OURS, WEIGHTS


def classifier() -> Any:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    sizes = {"vocab_size": 37, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    return LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_attention_heads=2, num_labels=3, pad_token_id=0)
    ).eval()


def tied() -> Any:
    return tiny_llama(1, tie_word_embeddings=True)


def with_bias() -> Any:
    return tiny_llama(1, attention_bias=True)


MODELS = {
    "a new head": (classifier, ["score.weight"]),
    "embeddings and norms": (tiny_llama, ["model.embed_tokens.weight", "model.norm.weight"]),
    "tied embeddings": (tied, ["model.embed_tokens.weight"]),
}


def trained(make: Any, names: list[str], method: Any = None) -> Any:
    model = fl.adapt(make(), method or fl.LoRA(rank=4), ["q_proj", "v_proj"])
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return stir(model, 0.1)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_batch()["input_ids"]).logits


@pytest.mark.parametrize("method", [fl.LoRA(rank=4), fl.CURLoRA(rank=4)], ids=lambda method: method.name)
@pytest.mark.parametrize("title", MODELS)
def test_it_is_saved_and_loaded(title: str, method: Any, tmp_path: Path) -> None:
    make, names = MODELS[title]
    model = trained(make, names, method)
    fl.save(model, tmp_path)
    again = fl.load(make(), tmp_path)
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(make()))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    fl.save(again, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / WEIGHTS).read_bytes()


@pytest.mark.parametrize("export", [False, True], ids=["save", "export_lora"])
@pytest.mark.parametrize("title", MODELS)
def test_peft_reads_it(title: str, export: bool, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, names = MODELS[title]
    model = trained(make, names)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (fl.export_lora if export else fl.save)(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PEFT, on tied weights
        theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path))
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    if export:
        torch.testing.assert_close(logits(fl.load(make(), tmp_path)), logits(model))


@pytest.mark.parametrize("title", ["a new head", "embeddings and norms"])
def test_we_read_modules_to_save_of_peft(title: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    make, names = MODELS[title]
    modules = [name.removesuffix(".weight").rpartition(".")[2] for name in names]
    config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=modules)
    theirs = stir(peft.get_peft_model(make(), config), 0.1)
    theirs.save_pretrained(str(tmp_path))
    ours = fl.load(make(), tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)
    assert all(ours.get_parameter(name).requires_grad for name in names)


def test_what_peft_cannot_read_is_named(tmp_path: Path) -> None:
    """A bias of an adapted layer, and a parameter of the model itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.shift = nn.Linear(6, 6), nn.Parameter(torch.zeros(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) + self.shift

    def make() -> nn.Module:
        torch.manual_seed(0)
        return Net()

    model = fl.adapt(make(), fl.LoRA(rank=2), ["fc"])
    model.shift.requires_grad_(True)
    model.fc.bias.requires_grad_(True)
    stir(model)
    with pytest.warns(UserWarning, match=r"shift, fc.bias: trained and saved, but PEFT does not read"):
        fl.save(model, tmp_path)
    again = fl.load(make(), tmp_path)
    assert torch.equal(again(torch.eye(6)), model(torch.eye(6)))
    assert again.shift.requires_grad and again.fc.bias.requires_grad and not again.fc.weight.requires_grad


def test_a_model_that_lacks_it_is_refused_and_unchanged(tmp_path: Path) -> None:
    model = trained(classifier, ["score.weight"])
    fl.save(model, tmp_path)
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM(classifier().config)
    before = {name: t.clone() for name, t in base.state_dict().items()}
    with pytest.raises(ValueError, match="holds score.weight, which was trained beside the adapters"):
        fl.load(base, tmp_path)
    assert not fl.adapters(base) and all(torch.equal(t, before[n]) for n, t in base.state_dict().items())


def test_an_adapter_saved_before_there_was_such_an_entry(tmp_path: Path) -> None:
    import json

    model = trained(tiny_llama, [])
    fl.save(model, tmp_path)
    ours = json.loads((tmp_path / OURS).read_text())
    assert ours.pop("trained") == {}
    (tmp_path / OURS).write_text(json.dumps(ours))
    assert torch.equal(logits(fl.load(tiny_llama(), tmp_path)), logits(model))


@pytest.mark.parametrize(
    "config, saving, words",
    [
        ({"bias": "lora_only"}, {}, "trained biases .bias='lora_only'"),
        ({}, {"save_embedding_layers": True}, "not of modules_to_save; .*embeddings"),
        ({}, {"safe_serialization": False}, "adapter_model.bin: a pickle"),
    ],
    ids=["biases", "embeddings", "pickle"],
)
def test_peft_checkpoints_with_more_than_factors_are_refused_in_words(
    config: Any, saving: Any, words: str, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(with_bias(), peft.LoraConfig(r=4, target_modules=["q_proj"], **config))
    theirs.save_pretrained(str(tmp_path), **saving)
    with pytest.raises(ValueError, match=words):
        fl.load(with_bias(), tmp_path)


def test_a_config_s_unknown_entry_is_refused_if_it_is_set(tmp_path: Path) -> None:
    import json

    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    theirs.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"use_some_new_formula": False}))
    fl.load(tiny_llama(), tmp_path)
    path.write_text(json.dumps(config | {"use_some_new_formula": True}))
    with pytest.raises(ValueError, match="an entry that is not known .use_some_new_formula=True"):
        fl.load(tiny_llama(), tmp_path)


def test_modules_are_saved_whole(tmp_path: Path) -> None:
    """PEFT wants all of a module's tensors, the frozen ones too."""
    model = fl.adapt(nn.ModuleDict({"fc": nn.Linear(6, 6), "norm": nn.LayerNorm(6)}), fl.LoRA(rank=2), ["fc"])
    model["norm"].weight.requires_grad_(True)
    fl.save(model, tmp_path)
    keys = load_file(tmp_path / WEIGHTS).keys()
    assert {"base_model.model.norm.weight", "base_model.model.norm.bias"} <= keys
