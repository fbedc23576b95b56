"""The how-to's code runs, and its numbers of routes are true."""

import re
from pathlib import Path

import pytest
import torch
from helpers import stir, tiny_llama, token_batch

import forgetless as fl

peft = pytest.importorskip("peft")
TEXT = (Path(__file__).resolve().parents[2] / "docs" / "peft.md").read_text(encoding="utf-8")


def test_every_block_runs_in_order(capsys):
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    stir(model, 0.1).train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    before = [p.detach().clone() for p in optimiser.param_groups[0]["params"]]
    batches = [token_batch(seed=seed) for seed in range(2)]
    space = {"model": model, "batches": batches, "source_batches": batches, "optimiser": optimiser}
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, space)  # noqa: S102
    printed = capsys.readouterr().out
    assert "blas" in printed and "q_proj" in printed
    after = optimiser.param_groups[0]["params"]
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert any("forgetless_penalties" in key for key in model.state_dict())
    assert fl.penalty(model) > 0


def test_the_tested_version_is_the_one_that_is_stated():
    from forgetless.versions import tested

    assert tested("peft").replace("peft", "PEFT") in TEXT


def test_the_plugin_for_pefts_tests_swaps_in_what_it_makes(tmp_path):
    import os
    import subprocess
    import sys

    tests = str(Path(__file__).resolve().parents[1] / "support")
    (tmp_path / "test_it.py").write_text(
        "import peft, torch, pytest\n"
        "@pytest.mark.parametrize('config_cls', [peft.LoraConfig, peft.IA3Config])\n"
        "def test_it(config_cls):\n"
        "    model = torch.nn.Sequential(torch.nn.Linear(3, 3))\n"
        "    peft.get_peft_model(model, config_cls(target_modules=['0']))(torch.ones(1, 3))\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "peft_suite", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    for swap, counted in (("1", "{'op': 1}"), ("0", "{}")):
        env = {**os.environ, "PYTHONPATH": tests, "FORGETLESS_SWAP": swap}
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert "1 passed, 1 deselected" in done.stdout, done.stdout + done.stderr
        assert f"swapped-in layers: {counted}" in done.stdout
