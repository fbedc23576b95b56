"""What the Trainer writes of an adapted model, and what it resumes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama, token_batch
from torch import Tensor
from transformers import Trainer, TrainingArguments

import forgetless as fl
from forgetless.checkpoint.restore import resume
from forgetless.training import PenaltyMixin


class Penalised(PenaltyMixin, Trainer):
    pass


ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(3, 37, (8, 6), generator=torch.Generator())]
METHODS = [fl.CLoRA(rank=4, k=4), fl.CURLoRA(rank=4)]
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def trainer(model: Any, folder: Path, kind: Any = Penalised, **options: Any) -> Any:
    given: dict[str, Any] = {
        "max_steps": 2, "save_steps": 1, "learning_rate": 0.1, "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "lr_scheduler_type": "constant",
    } | options  # fmt: skip
    rows = {"train_dataset": ROWS, "eval_dataset": ROWS[:2]}
    return kind(model=model, args=TrainingArguments(output_dir=str(folder), **given), **rows)


def adapted(method: Any = METHODS[0]) -> Any:
    torch.manual_seed(0)
    return fl.adapt(tiny_llama(), method)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_batch()["input_ids"]).logits


@each_method
def test_a_checkpoint_is_an_adapter_and_no_model(method: Any, tmp_path: Path) -> None:
    model = adapted(method)
    run = trainer(model, tmp_path)
    run.train()
    files = set(os.listdir(tmp_path / "checkpoint-2"))
    assert {"adapter_model.safetensors", "adapter_config.json", "forgetless.json"} <= files
    assert not {"model.safetensors", "config.json"} & files and "training_args.bin" in files
    assert torch.equal(logits(fl.load(tiny_llama(), tmp_path / "checkpoint-2")), logits(model))
    run.save_model(str(tmp_path / "end"))
    assert torch.equal(logits(fl.load(tiny_llama(), tmp_path / "end")), logits(model))
    assert "save_pretrained" not in vars(model)  # as it was


def test_a_head_that_is_trained_beside_is_in_it(tmp_path: Path) -> None:
    model = adapted()
    model.lm_head.weight.requires_grad_(True)
    trainer(model, tmp_path).train()
    again = adapted()
    again.lm_head.weight.requires_grad_(True)
    trainer(again, tmp_path, max_steps=2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again), logits(model)) and not torch.equal(
        model.lm_head.weight, tiny_llama().lm_head.weight
    )
    assert torch.equal(logits(fl.load(tiny_llama(), tmp_path / "checkpoint-2")), logits(model))


@each_method
def test_the_best_model_comes_back(method: Any, tmp_path: Path) -> None:
    model = adapted(method)
    run = trainer(
        model,
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        learning_rate=50.0,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert torch.equal(logits(model), logits(fl.load(tiny_llama(), best)))


def test_a_model_without_adapters_is_written_as_ever(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer(model, tmp_path).train()
    assert torch.equal(logits(type(model).from_pretrained(tmp_path / "checkpoint-2")), logits(model))
    again = tiny_llama()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again), logits(model))


def test_a_plain_trainer_s_checkpoint_resumes_too(tmp_path: Path) -> None:
    """A whole state dict, under the base model's names; so were checkpoints of the mixin once."""
    model = adapted()
    trainer(model, tmp_path, Trainer).train()
    base = type(model).from_pretrained(tmp_path / "checkpoint-2")
    again = adapted()
    trainer(again, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(again), logits(model))
    fl.remove(model)
    assert torch.equal(logits(base), logits(model))


class Unserialisable:
    """What transformers asks of a quantiser."""

    is_trainable = is_qat_trainable = False


def test_quantised_weights_train_once_they_are_adapted(tmp_path: Path) -> None:
    def quantised() -> Any:
        model = tiny_llama()
        model.is_quantized, model.hf_quantizer = True, Unserialisable()
        return model

    with pytest.raises(ValueError, match="purely quantized"):
        trainer(quantised(), tmp_path)
    model = fl.adapt(quantised(), fl.LoRA(rank=4))
    trainer(model, tmp_path).train()
    assert "_hf_peft_config_loaded" not in vars(model)
    assert torch.equal(logits(fl.load(tiny_llama(), tmp_path / "checkpoint-2")), logits(model))


def test_another_adapter_is_not_resumed_from(tmp_path: Path) -> None:
    fl.save(adapted(), tmp_path)
    before = adapted(fl.CLoRA(rank=4, k=5))
    with pytest.raises(ValueError, match="holds CLoRA.*the model has CLoRA"):
        resume(before, tmp_path)
    with pytest.raises(ValueError, match="adapters of other layers, or of another base model"):
        resume(fl.adapt(tiny_llama(), METHODS[0], ["q_proj"]), tmp_path)
    fl.save(adapted(METHODS[1]), tmp_path)
    other = tiny_llama()
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight.add_(1)
    with pytest.raises(ValueError, match="of another base model"):
        resume(fl.adapt(other, METHODS[1]), tmp_path)


@each_method
def test_consolidated_tasks_are_resumed(method: Any, tmp_path: Path) -> None:
    """In the model that was consolidated, and in a new one."""
    model = adapted(method)
    trainer(model, tmp_path / "one").train()
    fl.consolidate(model)
    trainer(model, tmp_path / "two").train()
    want = logits(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1) if p.requires_grad else None
    for again in (model, adapted(method)):
        resume(again, tmp_path / "two" / "checkpoint-2")
        assert torch.equal(logits(again), want)
    fl.consolidate(model)
    with pytest.raises(ValueError, match="holds 1 consolidated tasks, the model has 2"):
        resume(model, tmp_path / "two" / "checkpoint-2")
