"""The penalty in transformers' Trainer: once per step, logged, and a resumed run is the run that was not stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_study import tiny_model
from transformers import Trainer, TrainingArguments

import forgetless as fl
from forgetless.training import PenaltyMixin, adapted, attended, mean_drift


class Penalised(PenaltyMixin, Trainer):
    pass


ROWS = [{"input_ids": row, "labels": row} for row in (torch.arange(24 * 10).reshape(24, 10) * 11 % 250)]


def trainer(model: torch.nn.Module, folder: Path, rows: list[Any] = ROWS, **options: Any) -> Penalised:
    given: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "logging_steps": 1,
        "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3,
        "max_grad_norm": 0.5,
    } | options  # fmt: skip
    return Penalised(model=model, args=TrainingArguments(output_dir=str(folder), **given), train_dataset=rows)


def adapted_model(method: fl.methods.Method) -> torch.nn.Module:
    model = tiny_model()
    torch.manual_seed(0)
    fl.adapt(model, method)
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.up.normal_(std=0.1)
    return model


CLORA = fl.CLoRA(rank=4, alpha=8, k=8, weight=3.0)


def test_the_penalty_counts_once_whatever_the_accumulation(tmp_path: Path) -> None:
    """A step of SGD without momentum: every parameter moves as the loss and the penalty together say."""
    moves = []
    for parts in (1, 2):
        model = adapted_model(CLORA)
        before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        run = trainer(
            model, tmp_path, ROWS[:8], max_steps=1, optim="sgd", learning_rate=0.1, lr_scheduler_type="constant",
            max_grad_norm=0.0, per_device_train_batch_size=8 // parts, gradient_accumulation_steps=parts,
        )  # fmt: skip
        run.train()
        after = [p.detach() for p in model.parameters() if p.requires_grad]
        moves.append([a - b for a, b in zip(after, before, strict=True)])
    model = adapted_model(CLORA).train()
    rows = torch.stack([row["input_ids"] for row in ROWS[:8]])
    (model(input_ids=rows, labels=rows).loss + fl.penalty(model)).backward()
    wanted = [-0.1 * p.grad for p in model.parameters() if p.requires_grad]
    penalty = torch.autograd.grad(fl.penalty(model), [p for p in model.parameters() if p.requires_grad])
    for one, two, want, extra in zip(*moves, wanted, penalty, strict=True):
        assert extra.norm() > 0
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one, want, rtol=1e-4, atol=1e-6)


def test_outputs_are_asked_for_only_where_the_trainer_asks(tmp_path: Path) -> None:
    """A trainer may do more for outputs: TRL's runs the model once more."""

    class Asking(Trainer):
        asked: ClassVar[list[bool]] = []

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, *others: Any) -> Any:
            self.asked.append(return_outputs)
            return super().compute_loss(model, inputs, return_outputs, *others)

    class Mixed(PenaltyMixin, Asking):
        pass

    model = adapted_model(CLORA)
    calls: list[Any] = []
    model.register_forward_hook(lambda *given: calls.append(1))
    run = trainer(model, tmp_path)
    run = Mixed(model=model, args=run.args, train_dataset=ROWS)
    run.train()
    assert Mixed.asked == [False] * 4 and len(calls) == 4
    assert run.compute_loss(model, run.data_collator(ROWS[:2]), return_outputs=True)[1].logits.shape[0] == 2


def test_padding_does_not_count_in_the_penalty(tmp_path: Path) -> None:
    model = adapted_model(fl.LoRA(rank=4, penalties=(fl.OutputDeviation(1.0),)))
    mask = torch.arange(10) < torch.tensor([10, 4, 7, 2])[:, None]
    rows = [{**row, "attention_mask": m.long()} for row, m in zip(ROWS[:4], mask, strict=True)]
    run = trainer(model, tmp_path, rows, max_steps=1, learning_rate=0.0)
    run.train()
    model(torch.stack([row["input_ids"] for row in rows]), attention_mask=mask.long())
    everything, real = fl.penalty(model).item(), fl.penalty(model, token_weights=mask).item()
    assert run.penalty_value == pytest.approx(real, rel=1e-4) != pytest.approx(everything, rel=1e-3)


def test_a_mask_of_other_tokens_is_refused_where_it_would_matter(tmp_path: Path) -> None:
    mask = torch.arange(10) < torch.tensor([10, 4, 7, 2])[:, None]
    assert attended({"attention_mask": mask}) is mask
    assert attended({"attention_mask": torch.ones(4, 10)}) is attended({}) is attended([mask]) is None
    model = adapted_model(fl.LoRA(rank=4, penalties=(fl.OutputDeviation(1.0),)))
    model(ROWS[0]["input_ids"][None])
    with pytest.raises(ValueError, match="token_weights has 40 entries"):
        fl.penalty(model, token_weights=attended({"attention_mask": mask}))


def test_penalty_and_drift_are_logged(tmp_path: Path) -> None:
    model = adapted_model(CLORA)
    run = trainer(model, tmp_path)
    run.train()
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 4
    assert all(entry["penalty"] > 0 and entry["drift"] > 0 for entry in logged)
    assert logged[-1]["penalty"] < logged[0]["penalty"]
    assert logged[-1]["drift"] == pytest.approx(mean_drift(model))


def test_evaluation_has_no_penalty(tmp_path: Path) -> None:
    model = adapted_model(CLORA)
    run = trainer(model, tmp_path)
    plain = Trainer(model=model, args=run.args)
    assert run.evaluate(ROWS)["eval_loss"] == pytest.approx(plain.evaluate(ROWS)["eval_loss"])


def test_a_model_without_adapters_trains_as_ever(tmp_path: Path) -> None:
    found = []
    for kind in (Penalised, Trainer):
        model = tiny_model()
        assert not adapted(model)
        args = trainer(model, tmp_path).args
        kind(model=model, args=args, train_dataset=ROWS).train()
        found.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "method",
    [
        fl.CLoRA(rank=4, alpha=8, dropout=0.1, k=8, penalties=(fl.OutputDeviation(0.1),)),
        fl.LaLoRA(rank=4, alpha=8, dropout=0.1, weight=10.0),
        fl.CURLoRA(rank=4),
    ],
    ids=["clora", "lalora", "curlora"],
)
def test_a_resumed_run_is_the_run_that_was_not_stopped(method: fl.methods.Method, tmp_path: Path) -> None:
    """20 steps against 10 and, in a new model, 10 more from the checkpoint: bit for bit, dropout included."""

    def fresh() -> torch.nn.Module:
        model = tiny_model()
        torch.manual_seed(0)
        fl.adapt(model, method)
        if isinstance(method, fl.LaLoRA):
            fl.calibrate(model, [{"input_ids": row["input_ids"][None], "labels": row["labels"][None]} for row in ROWS])
        return model

    options = {"max_steps": 20, "save_strategy": "steps", "save_steps": 10}
    through = fresh()
    trainer(through, tmp_path / "through", **options).train()
    again = fresh()
    run = trainer(again, tmp_path / "again", **options)
    run.train(resume_from_checkpoint=str(tmp_path / "through" / "checkpoint-10"))
    for (name, there), here in zip(through.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(there, here), name
    assert any(not torch.equal(a, b) for a, b in zip(again.parameters(), fresh().parameters(), strict=True))
