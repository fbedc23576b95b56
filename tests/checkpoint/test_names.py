"""Names are those of the bare model: in state dicts, in files, and where random bases are drawn."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_gpt2, tiny_llama, token_batch
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import forgetless as fl
from forgetless.names import bare_modules

CLORA = fl.CLoRA(rank=4, k=4)


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_blocks(model: Any) -> Any:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = compiled(block)
    return model


def checkpointed_blocks(model: Any) -> Any:
    for index, block in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(block)
    return model


WRAPPERS = [compiled, nn.DataParallel, compiled_blocks, checkpointed_blocks]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**token_batch()).logits


def same_penalty(model: nn.Module, other: nn.Module) -> bool:
    return torch.equal(fl.penalty(model), fl.penalty(other))


@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: wrap.__name__)
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wrapper_changes_neither_names_nor_bases(wrap: Any, when: str, tmp_path: Path) -> None:
    plain = stir(fl.adapt(tiny_llama(), CLORA), 0.1)
    if when == "after":
        model = wrap(copy.deepcopy(plain))
    else:
        model = stir(fl.adapt(wrap(tiny_llama()), CLORA), 0.1)
    assert list(fl.adapters(model)) == list(fl.adapters(plain))
    assert same_penalty(model, plain)
    fl.save(plain, tmp_path / "plain")
    fl.save(model, tmp_path / "wrapped")
    for path in (tmp_path / "plain").iterdir():
        assert (tmp_path / "wrapped" / path.name).read_bytes() == path.read_bytes()
    torch.testing.assert_close(logits(fl.load(wrap(tiny_llama()), tmp_path / "plain")), logits(plain))
    assert set(fl.explain(model)) == set(fl.explain(plain))
    fl.merge(model)
    assert not fl.adapters(model)


def test_a_module_of_the_user_s_called_module_is_no_wrapper() -> None:
    model = nn.ModuleDict({"module": nn.Sequential(nn.Linear(4, 4))})
    assert set(bare_modules(model)) == {"", "module", "module.0"}
    assert list(fl.adapters(fl.adapt(model, fl.LoRA(rank=2), ["0"]))) == ["module.0"]


@pytest.mark.parametrize("adapted_at, saved_at", [("model", ""), ("", "model")])
def test_bases_are_those_that_were_drawn_whatever_the_root(adapted_at: str, saved_at: str, tmp_path: Path) -> None:
    model = tiny_llama()
    fl.adapt(model.get_submodule(adapted_at), CLORA)
    stir(model, 0.1)
    fl.save(model.get_submodule(saved_at), tmp_path)
    again = tiny_llama()
    fl.load(again.get_submodule(saved_at), tmp_path)
    assert torch.equal(logits(again), logits(model)) and same_penalty(again, model)
    fl.save(again.get_submodule(saved_at), tmp_path / "again")
    for path in (tmp_path / "again").iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


# -------------------------------------------------------------------------------------- state dicts


def tied() -> Any:
    return tiny_llama(1, tie_word_embeddings=True)


def own(base: nn.Module) -> list[tuple[str, Tensor]]:
    return [*base.named_parameters(), *base.named_buffers()]


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tied], ids=lambda make: make.__name__)
def test_the_state_dict_has_the_base_model_s_names_and_order(make: Any) -> None:
    base = make()
    model = stir(fl.adapt(make(), CLORA), 0.1)
    keys = [key for key in model.state_dict() if ".adapter." not in key]
    assert keys == list(base.state_dict())
    twin = stir(fl.adapt(make(), CLORA), 0.2, seed=1)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(logits(twin), logits(model))
    bases = {id(t): f"{name}.base.{key}" for name, layer in fl.adapters(model).items() for key, t in own(layer.base)}
    old = {bases.get(id(t), key): t for key, t in model.state_dict(keep_vars=True).items()}  # as it was written before
    assert any(".base." in key for key in old)
    twin = fl.adapt(make(), CLORA)
    twin.load_state_dict(old)
    assert torch.equal(logits(twin), logits(model))
    lacking, more = twin.load_state_dict(base.state_dict(), strict=False)
    assert not more and all(".adapter." in key for key in lacking)


def test_transformers_writes_and_reads_the_base_of_an_adapted_model(tmp_path: Path) -> None:
    model = fl.adapt(tied(), fl.LoRA(rank=4), ["q_proj", "lm_head"])
    stir(model, 0.1).save_pretrained(tmp_path)
    back = type(model).from_pretrained(tmp_path)
    fl.remove(model)
    assert torch.equal(logits(back), logits(model))


def test_tying_again_ties_the_base_layer() -> None:
    model = fl.adapt(tied(), fl.LoRA(rank=4), ["lm_head"])
    model.model.embed_tokens.weight = nn.Parameter(torch.randn(37, 16))
    model.tie_weights()
    assert model.lm_head.base.weight is model.lm_head.weight is model.model.embed_tokens.weight
    assert not model.lm_head._parameters


def test_torch_s_distributed_checkpoints_know_the_names() -> None:
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model = stir(fl.adapt(tiny_llama(), CLORA), 0.1)
    state = get_model_state_dict(model)
    assert list(state) == list(model.state_dict())
    twin = fl.adapt(tiny_llama(), CLORA)
    set_model_state_dict(twin, state)
    assert torch.equal(logits(twin), logits(model))


def test_a_model_that_peft_adapted_is_refused() -> None:
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    before = [(name, p.requires_grad) for name, p in theirs.named_parameters()]
    for model in (theirs, theirs.base_model.model):
        with pytest.raises(ValueError, match=r"model has PEFT adapters: fl.swap_in\(model\)"):
            fl.adapt(model, fl.LoRA(rank=2))
    assert before == [(name, p.requires_grad) for name, p in theirs.named_parameters()]
    fl.adapt(theirs.merge_and_unload(), fl.LoRA(rank=2))
