"""Run by torchrun in two processes: a step of training on half a batch each. Writes what each engine came to.

With ddp also ``forgetless finetune``, to its end and told to stop in one process.

torchrun --nproc-per-node 2 tests/support/two_processes.py ddp|fsdp FOLDER
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import stir, tiny_llama, token_batch
from safetensors.torch import save_file
from tiny_study import tiny_model
from torch import Tensor, nn

import forgetless as fl

METHODS = {
    "clora": fl.CLoRA(rank=4, alpha=8, k=8, penalties=(fl.OutputDeviation(0.3), fl.WeightDeviation(0.2))),
    "curlora": fl.CURLoRA(rank=4, penalties=(fl.Decay(0.1),)),
    "lalora": fl.LaLoRA(rank=4, alpha=8, weight=10.0, penalties=(fl.SourceDeviation(0.5),)),
}
TOKENS = torch.arange(4 * 12).reshape(4, 12) * 7 % 250


def prepared(name: str) -> nn.Module:
    """The tiny model with an adapter that has moved, the same in every process."""
    model = tiny_model()
    torch.manual_seed(1)
    fl.adapt(model, METHODS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    if name == "lalora":
        fl.calibrate(model, [{"input_ids": TOKENS[:, :6], "labels": TOKENS[:, :6]}])
    return model.train()


def step(model: nn.Module, run: nn.Module, tokens: Tensor) -> Tensor:
    """One step of SGD on the task and the penalty: the loss."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = run(input_ids=tokens, labels=tokens).loss + fl.penalty(model)
    loss.backward()
    optimizer.step()
    return loss.detach()


def finetune(folder: Path, name: str, *more: str) -> int:
    """``forgetless finetune`` on a tiny model, dropout off: the exit code."""
    from forgetless.cli.main import main

    sizes = ["--steps", "3", "--batch-size", "4", "--accumulate", "2", "--max-length", "24", "--lr", "1e-2"]
    sizes += ["--keep", str(folder / "prose.jsonl")]
    given = ["--model", str(folder / "model"), "--data", str(folder / "upper.jsonl"), "--device", "cpu"]
    method = ["--method", "clora:k=4,rank=4", "--dtype", "float32"]
    return main(["finetune", *given, *sizes, *method, "--out", str(folder / name), *more])


def told_to_stop(rank: int) -> None:
    """The second process gets a signal after two steps."""
    from forgetless.cli.console import Ui

    @contextmanager
    def training(self: Ui, title: str, steps: int) -> Iterator[Callable[[Any], None]]:
        yield lambda step: signal.raise_signal(signal.SIGTERM) if rank == 1 and step.number == 2 else None

    Ui.training = training


CUT = {
    "clora": fl.CLoRA(rank=4, alpha=8, k=8, penalties=(fl.OutputDeviation(0.3), fl.WeightDeviation(0.2))),
    "curlora": fl.CURLoRA(rank=4, penalties=(fl.Decay(0.1),)),
}


def whole_model() -> nn.Module:
    """Two heads of keys and values, so that attention can be cut in two."""
    return tiny_llama(num_key_value_heads=2, hidden_size=32)


def cut(model: nn.Module, end: str = "") -> nn.Module:
    """Tensor parallelism over both processes."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
    into, out_of = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
    plan = {f"model.layers.*.*.{name}{end}": ColwiseParallel() for name in into}
    plan |= {f"model.layers.*.*.{name}{end}": RowwiseParallel() for name in out_of}
    return parallelize_module(model, mesh, plan)


def adapted(model: nn.Module, name: str, targets: Any = "all-linear", seed: int = 1) -> nn.Module:
    """With an adapter that has moved."""
    torch.manual_seed(seed)
    return stir(fl.adapt(model, CUT[name], targets), 0.1).train()


def tensor_parallel(folder: Path, rank: int) -> None:
    """A step, the drift, and what is saved, merged and refused."""
    for name in CUT:
        model = adapted(cut(whole_model()), name, seed=1 + rank)  # other draws, that the first process's replace
        batch = token_batch((9, 9))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loss = model(**batch).loss + fl.penalty(model)
        loss.backward()
        drifts = fl.drift(model)
        optimizer.step()
        fl.save(model, folder / f"cut-{name}")
        alike = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        for mine in alike:
            theirs = mine.clone()
            torch.distributed.broadcast(theirs, 0)
            assert torch.equal(mine, theirs)
        again = fl.load(cut(whole_model()), folder / f"cut-{name}")
        want = model(**batch).logits
        torch.testing.assert_close(again(**batch).logits, want)
        torch.testing.assert_close(fl.merge(again)(**batch).logits, want, rtol=1e-4, atol=1e-5)
        if rank == 0:
            drifts = torch.tensor(list(drifts.values()))
            save_file(
                {"loss": loss.detach(), "drift": drifts, "logits": want.detach()}, folder / f"cut-{name}.safetensors"
            )
    dropping = fl.adapt(cut(whole_model()), fl.LoRA(rank=4, dropout=0.3)).train()
    torch.manual_seed(rank)  # ranks' generators differ, masks must not
    loss = stir(dropping)(**batch).loss
    theirs = loss.detach().clone()
    torch.distributed.broadcast(theirs, 0)
    assert torch.equal(loss, theirs)
    for wrong, said in ((fl.calibrate, "calibrate the model whole"), (fl.consolidate, "consolidate the model whole")):
        model = fl.adapt(cut(whole_model()), fl.LaLoRA(rank=2))
        with pytest.raises(ValueError, match=said):
            wrong(model, [batch])
    model = fl.adapt(whole_model(), fl.LoRA(rank=2))
    cut(model, ".base")  # too late
    with pytest.raises(ValueError, match="parallelize_module first, then fl.adapt"):
        model(**batch)


IN_THE_PASS = {
    "clora": METHODS["clora"],
    "hadamard": fl.CLoRA(rank=4, k=12, basis="hadamard"),
    "source": fl.LoRA(rank=4, penalties=(fl.SourceDeviation(0.5), fl.SourceDeviation(0.2, covariance=3))),
}


def gathers_once(mesh: Any, rank: int) -> None:
    """FSDP2: the penalty takes the factors that the forward pass has gathered, or those of now where it cannot."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.debug import CommDebugMode

    tokens = TOKENS[2 * rank : 2 * rank + 2]
    batch = {"input_ids": tokens, "labels": tokens}

    def sharded(spec: Any, keep: bool = False) -> nn.Module:
        model = stir(fl.adapt(tiny_model(), spec), 0.1).train()
        if spec is IN_THE_PASS["source"]:
            fl.calibrate(model, [{"input_ids": TOKENS[:, :6]}])
            fl.penalty(model)  # asks whether there are statistics
        for block in model.model.layers:
            fully_shard(block, mesh=mesh, reshard_after_forward=not keep)
        return fully_shard(model, mesh=mesh)

    def gradients(model: nn.Module) -> list[Tensor]:
        return [p.grad.full_tensor() for p in model.parameters() if p.grad is not None]

    for name, spec in IN_THE_PASS.items():
        made: dict[bool, tuple[Tensor, list[Tensor]]] = {}
        for keep in (False, True):
            for fuse in (True, False):
                counts = []
                for penalised in (False, True):
                    model = fl.fuse_penalty(sharded(spec, keep), fuse)
                    with CommDebugMode() as seen:
                        loss = model(**batch).loss
                        loss = loss + fl.penalty(model) if penalised else loss
                        loss.backward()
                    counts.append(seen.get_total_counts())
                assert (counts[0] == counts[1]) == (fuse or keep), (name, keep, fuse, counts)
                made[fuse] = loss.detach(), gradients(model)
            torch.testing.assert_close(made[True][0], made[False][0], rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(made[True][1], made[False][1], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    model = sharded(IN_THE_PASS["hadamard"])
    model(**batch)
    before = fl.penalty(model).detach()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    torch.testing.assert_close(fl.penalty(model).detach(), 4 * before)
    model(**batch).loss.backward()
    torch.testing.assert_close(fl.penalty(model).detach(), 4 * before)
    model(**batch)
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=1.0, foreach=True).step()
    moved = fl.penalty(model).detach()
    model(**batch)
    torch.testing.assert_close(fl.penalty(model).detach(), moved)
    assert moved < 3.6 * before
    with pytest.raises(RuntimeError, match="were gathered for the forward pass and are gone"):
        fl.penalty(model).backward()


def how_to(title: str, **space: Any) -> None:
    """The block under a heading of docs/distributed.md."""
    text = (
        (Path(__file__).resolve().parents[2] / "docs" / "distributed.md")
        .read_text(encoding="utf-8")
        .split(f"## {title}\n")[1]
    )
    exec(re.findall(r"```python\n(.*?)```", text, flags=re.S)[0], {"torch": torch, "fl": fl, **space})  # noqa: S102


def main(engine: str, folder: Path) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.init_device_mesh("cpu", (2,)) if engine == "fsdp" else None
    for name in METHODS:
        model = prepared(name)
        if engine == "ddp":
            run = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.model.layers:
                fully_shard(block, mesh=mesh)
            run = fully_shard(model, mesh=mesh)
        loss = step(model, run, TOKENS[2 * rank : 2 * rank + 2])
        dist.all_reduce(loss)
        fl.save(model, folder / name if engine == "fsdp" else folder / f"{name}-{rank}")
        if rank == 0:
            save_file({"loss": loss / 2}, folder / f"{name}.safetensors")
    batch = token_batch((9, 9))
    if engine == "fsdp":
        gathers_once(mesh, rank)
        model = fl.adapt(whole_model(), METHODS["clora"])
        how_to("FSDP2", model=model, batch=batch, folder=folder / "how-to")
    if engine == "ddp":
        how_to("DDP", model=fl.adapt(whole_model(), METHODS["clora"]), batch=batch)
        mesh = dist.init_device_mesh("cpu", (2,))
        how_to("Tensor parallelism", model=whole_model(), mesh=mesh, batch=batch, folder=folder / "how-to")
        assert all((folder / "how-to" / name).exists() for name in ("adapter_config.json", "forgetless.json"))
        tensor_parallel(folder, rank)
        assert finetune(folder, "finetuned") == 0
        assert finetune(folder, "odd", "--batch-size", "5") == 2
        told_to_stop(rank)
        assert finetune(folder, "stopped") == 130
        assert finetune(folder, "continued", "--save-every", "1") == 130
        assert finetune(folder, "continued", "--save-every", "1") == 0
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
