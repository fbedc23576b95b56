"""DDP and FSDP2: two processes with half a batch each do what one does with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_study import tiny_model
from two_processes import METHODS, TOKENS, prepared, step

import forgetless as fl

HERE = Path(__file__).parent


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp(request.param)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE / "two_processes.py"), request.param, str(folder)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder


@pytest.mark.parametrize("name", list(METHODS))
def test_the_same_step_as_in_one_process(done: tuple[str, Path], name: str) -> None:
    """Loss, and every parameter after the step: the penalty counts once, and bases are alike in all processes."""
    engine, folder = done
    model = prepared(name)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    loss = step(model, model, TOKENS)
    assert load_file(folder / f"{name}.safetensors")["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for saved in [folder / name] if engine == "fsdp" else [folder / f"{name}-{rank}" for rank in (0, 1)]:
        there = dict(fl.load(tiny_model(), saved).named_parameters())
        for n, parameter in model.named_parameters():
            if parameter.requires_grad:
                moved = (parameter - before[n]).norm()
                assert moved > 0
                assert (there[n] - parameter).norm() <= 1e-4 * moved, n
