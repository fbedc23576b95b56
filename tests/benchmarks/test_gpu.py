"""``bench gpu`` and ``bench check``: what fails costs the others nothing. The soak tests run them on a phantom card."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from forgetless_bench import check, cli, gpu, harness


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_gpu_run_says_what_is_missing(capsys):
    assert cli.main(["gpu"]) == 1
    out = capsys.readouterr().out
    assert "missing" in out and "layer-<gpu>.json" in out and "python -m bench gpu" in out


@pytest.fixture
def gpu_run(tmp_path, monkeypatch):
    """``bench gpu`` on a card that is said to be there; ``answers`` says how a command ends, and what it writes."""

    def start(answers: Any, minutes: str = "9") -> list[list[str]]:
        ran: list[list[str]] = []

        def run(command: list[str], timeout: float) -> Any:
            assert command[:2] == list(gpu.PYTHON) and timeout > 0
            ran.append(command[3:])
            return subprocess.CompletedProcess(command, answers(command[3:], timeout))

        monkeypatch.setattr(gpu.subprocess, "run", run)
        monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu, "tag", lambda device: "card")
        assert gpu.main(["--minutes", minutes, "--out", str(tmp_path)]) == 0
        return ran

    return start


def kernels_of(command: list[str]) -> list[str]:
    return command[command.index("--kernels") + 1 :]


def write_check(folder: Path, kernels: list[str], notes: list[str]) -> None:
    rows = [harness.row("a case", kernel, "check", "error", 0.5, "of the limit") for kernel in kernels]
    harness.write_json(folder / "check-card.json", {"kind": "check", "notes": notes, "rows": rows})


def test_a_kernel_that_faults_costs_the_others_nothing(gpu_run, tmp_path, capsys):
    """One faults and leaves its process without a card, one takes the process with it; all is measured in the end."""

    def answers(command: list[str], timeout: float) -> int:
        if command[0] == "check":
            todo = kernels_of(command)
            if todo[0] == "outer":
                return -11
            end = todo.index("matmul_lowrank_t") + 1 if "matmul_lowrank_t" in todo else len(todo)
            write_check(tmp_path, todo[:end], [f"wrong: {todo[end - 1]}"] if end < len(todo) else [])
        return 0

    ran = gpu_run(answers)
    checks = [kernels_of(command)[0] for command in ran if command[0] == "check"]
    assert checks == ["project", "outer", "project_outer"]
    assert [command[0] for command in ran[3:]] == ["layer", "step", "memory", "penalty", "dispatch", "layer"]
    results = json.loads((tmp_path / "check-card.json").read_text())
    assert {row["provider"] for row in results["rows"]} == set(gpu.KERNELS) - {"outer"}
    assert results["notes"] == ["wrong: matmul_lowrank_t", "outer was not checked"]
    assert "note: check of outer failed" in capsys.readouterr().out


def test_a_part_that_fails_or_is_late_costs_the_others_nothing(gpu_run, tmp_path, capsys):
    def answers(command: list[str], timeout: float) -> int:
        if command[0] == "check":
            write_check(tmp_path, kernels_of(command), [])
        if command[0] == "step":
            raise subprocess.TimeoutExpired(command, timeout)
        return int(command[0] == "memory")

    ran = gpu_run(answers)
    assert [command[0] for command in ran] == ["check", "layer", "step", "memory", "penalty", "dispatch", "layer"]
    out = capsys.readouterr().out
    for text in ("step was stopped after", "memory ended with exit code 1", "note: step failed", "note: memory failed"):
        assert text in out


def test_a_gpu_run_without_time_says_what_it_leaves_out(gpu_run, capsys):
    assert gpu_run(lambda command, timeout: 0, minutes="0") == []
    out = capsys.readouterr().out
    assert all(f"note: {name} left out: out of time" in out for name in gpu.PARTS)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels in the interpreter")
def test_kernels_are_checked_one_by_one(tmp_path, monkeypatch, capsys):
    """A wrong one and one that raises are rows and notes; the others are right."""
    kernels = check.dispatch.kernels
    right, words = kernels.outer, ["check", "--smoke", "--device", "cpu", "--out", str(tmp_path), "--kernels"]
    assert cli.main([*words, "project", "outer", "once"]) == 0
    monkeypatch.setattr(kernels, "outer", lambda *arguments: right(*arguments) * 1.5)
    monkeypatch.setattr(kernels, "project", lambda *arguments: 1 / 0)
    assert cli.main([*words, "project", "outer", "once"]) == 1
    results = json.loads((tmp_path / "check-cpu.json").read_text())
    values = {name: [row["value"] for row in harness.select(results, provider=name)] for name in check.KERNELS}
    assert values["project"] == [None, None] and min(values["outer"]) > 1 and max(values["once"]) <= 1
    assert len(results["notes"]) == 4 and "ZeroDivisionError" in results["notes"][0]
    assert "| outer | 0 of 2 |" in capsys.readouterr().out
    monkeypatch.setattr(check, "answers", lambda device: False)
    assert cli.main([*words, "project", "outer"]) == 1, "the card is gone: what is left needs another process"
    results = json.loads((tmp_path / "check-cpu.json").read_text())
    assert [row["provider"] for row in results["rows"]] == ["project"]
