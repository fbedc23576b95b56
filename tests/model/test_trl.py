"""TRL's SFTTrainer with PenaltyMixin: as many forward passes as without it. ``.ci/versions trl`` runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
from tiny_study import tiny_model, tiny_tokenizer  # noqa: E402

import forgetless as fl  # noqa: E402
from forgetless.training import PenaltyMixin  # noqa: E402

ROWS = [{"prompt": f"Where does order {number} go?", "completion": f" To {number}."} for number in range(16)]


class Penalised(PenaltyMixin, trl.SFTTrainer):
    pass


def forwards(kind: type, folder: Path, accumulation: int, evaluate: bool) -> tuple[int, Any]:
    """How often a run of 3 steps calls the model, and the trainer."""
    model = fl.adapt(tiny_model(), fl.CLoRA(rank=4, k=8))
    torch.manual_seed(0)
    options: dict[str, Any] = {
        "max_steps": 3, "per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulation,
        "logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "bf16": False,
        "use_cpu": True, "eval_strategy": "steps" if evaluate else "no", "eval_steps": 3,
    }  # fmt: skip
    rows = datasets.Dataset.from_list(ROWS)
    run = kind(
        model=model, args=trl.SFTConfig(output_dir=str(folder), **options), train_dataset=rows,
        eval_dataset=rows.select(range(8)) if evaluate else None, processing_class=tiny_tokenizer(),
    )  # fmt: skip
    calls: list[None] = []
    model.register_forward_hook(lambda *given: calls.append(None))
    run.train()
    return len(calls), run


@pytest.mark.parametrize("evaluate", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_mixin_adds_no_forward_pass(accumulation: int, evaluate: bool, tmp_path: Path) -> None:
    plain, _ = forwards(trl.SFTTrainer, tmp_path / "plain", accumulation, evaluate)
    mixed, run = forwards(Penalised, tmp_path / "mixed", accumulation, evaluate)
    print(f"TRL {trl.__version__}, accumulation {accumulation}: {plain} forward passes, {mixed} with the penalty")
    assert mixed == plain == 3 * accumulation + evaluate  # the evaluation is one batch of eight
    logged = [entry for entry in run.state.log_history if "loss" in entry]
    assert len(logged) == 3 and all(entry["penalty"] > 0 for entry in logged)
