"""The scripts of docs/examples run as they stand, and leave an adapter; without a package they say which one it is."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_study import tiny_model, write_model

import forgetless as fl

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
if not EXAMPLES.exists():
    pytest.skip("outside of a source checkout", allow_module_level=True)
#: Script -> the package it needs beyond those of the study.
NEEDS = {"loop": None, "trainer": None, "trl_sft": "trl", "qlora": "bitsandbytes"}


def check_saved(folder: Path) -> None:
    """What lies there loads, and has been trained."""
    model = fl.load(tiny_model(), folder)
    assert all(layer.adapter.up.any() for layer in fl.adapters(model).values())


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, str(write_model(tmp_path / "model")), str(tmp_path / "out")])
    package = NEEDS[name]
    if package is not None and importlib.util.find_spec(package) is None:
        with pytest.raises(SystemExit, match=f"pip install {package}"):
            runpy.run_path(str(EXAMPLES / f"{name}.py"))
        return
    torch.manual_seed(0)
    runpy.run_path(str(EXAMPLES / f"{name}.py"))
    check_saved(tmp_path / "out")


def test_fsdp2_runs_in_two_processes(tmp_path: Path) -> None:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(EXAMPLES / "fsdp2.py"), str(write_model(tmp_path / "model")), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("loss of the first process") == 3
    check_saved(tmp_path / "out")


def test_every_example_is_tested_and_named_on_a_page() -> None:
    scripts = {path.stem for path in EXAMPLES.glob("*.py")}
    assert scripts == {*NEEDS, "fsdp2"}
    page = (EXAMPLES.parent / "index.md").read_text(encoding="utf-8")
    assert all(f"(examples/{name}.py)" in page for name in scripts)
