"""The plugin that runs PEFT's own tests with every LoRA layer swapped in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
SUPPORT = str(Path(__file__).resolve().parents[1] / "support")
TEST = """
import peft, torch, pytest

@pytest.mark.parametrize("config_cls", [peft.LoraConfig, peft.IA3Config])
def test_it(config_cls):
    model = torch.nn.Sequential(torch.nn.Linear(3, 3))
    peft.get_peft_model(model, config_cls(target_modules=["0"]))(torch.ones(1, 3))
"""


@pytest.mark.parametrize("swap, counted", [("1", "{'op': 1}"), ("0", "{}")])
def test_the_plugin_swaps_in_what_a_test_makes(tmp_path: Path, swap: str, counted: str) -> None:
    (tmp_path / "test_it.py").write_text(TEST)
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    path = os.pathsep.join(filter(None, [SUPPORT, os.environ.get("PYTHONPATH")]))
    env = {**os.environ, "PYTHONPATH": path, "FORGETLESS_SWAP": swap}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
    assert f"swapped-in layers: {counted}" in done.stdout
