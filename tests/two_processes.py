"""Run by torchrun in two processes: a step of training on half a batch each. Writes what each engine came to.

torchrun --nproc-per-node 2 tests/two_processes.py ddp|fsdp FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
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
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
