"""The how-to's code runs, in order, and trains."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from tiny_study import tiny_model

import forgetless as fl

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "training.md").read_text(encoding="utf-8")


def test_every_block_runs_in_order(tmp_path: Path, monkeypatch) -> None:
    model = tiny_model()
    torch.manual_seed(0)
    fl.adapt(model, fl.CLoRA(rank=4, alpha=8, k=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(16 * 10).reshape(16, 10) % 250]
    batches = [{k: torch.stack([row[k] for row in rows[at : at + 4]]) for k in rows[0]} for at in range(0, 16, 4)]
    optimiser = torch.optim.SGD(trained, 0.1)
    space = {
        "model": model, "batches": batches, "trained": trained, "optimiser": optimiser, "rows": rows,
        "folder": str(tmp_path),
    }  # fmt: skip
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) == 3
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    for block in blocks:
        before = [p.detach().clone() for p in trained]
        exec(block, space)  # noqa: S102
        assert not any(torch.equal(a, b) for a, b in zip(before, trained, strict=True))
