"""DDP and FSDP2: two processes with half a batch each do what one does with all of it; finetune too."""

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import token_batch
from safetensors.torch import load_file
from tiny_study import tiny_model, write_model, write_texts
from torch import nn
from two_processes import CUT, METHODS, TOKENS, adapted, finetune, prepared, step, whole_model

import forgetless as fl

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def gloo() -> None:
    """The processes talk through it; some builds of torch come without."""
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def done(request: pytest.FixtureRequest, gloo: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "ddp":
        write_model(folder / "model")
        write_texts(folder)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    path = os.pathsep.join([str(HERE.parent / "support"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(HERE.parent / "support" / "two_processes.py"), request.param, str(folder)],
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


@pytest.mark.parametrize("done", ["ddp"], indirect=True)
def test_finetune_is_the_run_of_one_process(done: tuple[str, Path]) -> None:
    """Batches are divided, the numbers are the whole batch's, and the first process writes."""
    folder = done[1]
    assert finetune(folder, "alone") == 0
    ours, theirs = (json.loads((folder / name / "training.json").read_text()) for name in ("finetuned", "alone"))
    assert (ours["processes"], theirs["processes"]) == (2, 1)
    for key in ("loss", "penalty", "grad_norm", "after"):
        assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    assert len(ours["loss"]) == 3 and min(ours["penalty"]) > 0
    ours, theirs = (dict(fl.load(tiny_model(), folder / n).named_parameters()) for n in ("finetuned", "alone"))
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("done", ["ddp"], indirect=True)
def test_a_signal_to_one_process_stops_both_and_saves(done: tuple[str, Path]) -> None:
    log = json.loads((done[1] / "stopped" / "training.json").read_text())
    assert log["stopped"] == "interrupted" and len(log["loss"]) == 2 and "step 2 of 3" in log["note"]
    assert fl.adapters(fl.load(tiny_model(), done[1] / "stopped"))


@pytest.mark.parametrize("done", ["ddp"], indirect=True)
def test_processes_that_were_stopped_go_on_together_bit_for_bit(done: tuple[str, Path]) -> None:
    whole, continued = (done[1] / name for name in ("finetuned", "continued"))
    ours, theirs = (json.loads((folder / "training.json").read_text()) for folder in (continued, whole))
    assert all(ours[key] == theirs[key] for key in ("loss", "penalty", "grad_norm", "drift", "after"))
    name = "adapter_model.safetensors"
    assert (whole / name).read_bytes() == (continued / name).read_bytes()
    assert not (continued / ".unfinished").exists()


@pytest.mark.parametrize("done", ["ddp"], indirect=True)
@pytest.mark.parametrize("name", list(CUT))
def test_tensor_parallelism_is_the_step_of_one_process(done: tuple[str, Path], name: str) -> None:
    """Loss with penalties, drift, every parameter after the step, and logits; the rest is asserted over there."""
    model = adapted(whole_model(), name)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    loss = model(**token_batch((9, 9))).loss + fl.penalty(model)
    loss.backward()
    drifts = list(fl.drift(model).values())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    there = load_file(done[1] / f"cut-{name}.safetensors")
    assert there["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert there["drift"].tolist() == pytest.approx(drifts, rel=1e-4)
    torch.testing.assert_close(there["logits"], model(**token_batch((9, 9))).logits.detach(), rtol=1e-4, atol=1e-5)
    saved = dict(fl.load(whole_model(), done[1] / f"cut-{name}").named_parameters())
    for n, parameter in model.named_parameters():
        if parameter.requires_grad:
            moved = (parameter - before[n]).norm()
            assert moved > 0 and (saved[n] - parameter).norm() <= 1e-3 * moved, n


@pytest.fixture
def one_rank(gloo: None) -> Iterator[Any]:
    """A mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, 1], ids=["column-wise", "row-wise"])
@pytest.mark.parametrize("name", list(CUT))
def test_autocast_does_not_round_the_fold_of_a_cut_weight(one_rank: Any, name: str, dim: int) -> None:
    """CURLoRA's up is a product itself."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    base = nn.Sequential(nn.Linear(48, 40))
    cut = parallelize_module(copy.deepcopy(base), one_rank, {"0": (ColwiseParallel, RowwiseParallel)[dim]()})
    plain, layer = (adapted(model, name, ["0"])[0] for model in (base, cut))
    start = plain.weight.clone()
    lost = plain.fold()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.fold() == pytest.approx(lost, rel=1e-3)
    moved = (plain.weight - start).norm()
    assert layer.cut.dim == dim and moved > 0.1
    assert (layer.weight.to_local() - plain.weight).norm() <= 1e-5 * moved
