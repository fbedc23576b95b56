"""What is kept for the backward pass, and the peak: of one layer, and of a whole training step.

    python -m bench memory [--dropout 0 0.1] [--batch 4 128] [--no-rss]

Saved: distinct storages that autograd packs in the forward pass, weights and adapters left out, the input of the layer
counted where it is kept. Peak: the most that torch's allocator held above what it held before. Peak RSS: the resident
set of a fresh process for each provider, around one step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from typing import Any

import torch

import forgetless as fl

from . import models
from .baselines import have_peft
from .bytes import peak_bytes, peak_rss, saved_bytes
from .cases import Case
from .harness import finish, number, parser, share, short, start, table
from .lowrank import PRODUCTS, layers, rival
from .shapes import CPU, GPU, SHAPES

MIB = 2**20


def builders(dropouts: list[float]) -> dict[str, Any]:
    """name -> base model to adapted model."""
    found: dict[str, Any] = {"frozen": lambda base: models.twin(base).train()}
    for p in dropouts:
        found[f"forgetless, dropout {p:g}"] = lambda base, p=p: models.our_lora(base, p)
        if have_peft():
            found[f"PEFT, dropout {p:g}"] = lambda base, p=p: models.peft_lora(base, p)
            found[f"PEFT bf16 adapters, dropout {p:g}"] = lambda base, p=p: models.peft_lora(base, p, autocast=False)
    found["forgetless CURLoRA"] = lambda base: models.ours(base, fl.CURLoRA(models.RANK))
    found["authors' CURLoRA"] = models.authors_curlora
    return found


def layer_rows(shapes: list[str], M: int, R: int, dropouts: list[float], device: torch.device) -> list[dict[str, Any]]:
    rows = []
    for shape in shapes:
        for method, p in [("lora", p) for p in dropouts] + [("curlora", 0.0)]:
            case = Case(shape, M, R, torch.bfloat16, p, method)
            made, base = layers(case, device, compiled=False)
            group = {}
            made.pop(PRODUCTS, None)  # keeps h, and has no peak but its results
            for name, layer in made.items():
                group[name] = {
                    "saved_bytes": saved_bytes(partial(layer.module, layer.x), [layer.module, base]),
                    "peak_bytes": peak_bytes(layer.both, device),
                }
            other = rival(method, list(group))
            for name, row in group.items():
                row.update(case=shape, M=M, R=R, dtype=short(case.dtype), dropout=p, method=method, provider=name)
                theirs = group[other]["saved_bytes"] if other else 0
                row["saved_over_rival"] = row["saved_bytes"] / theirs if theirs else None
                rows.append(row)
    return rows


def probe(name: str, options: Any) -> int | None:
    """Peak RSS of one provider's step, in this process; a step of a few tokens first, so that libraries are loaded."""
    device = torch.device("cpu")
    torch.manual_seed(0)
    base, _ = models.smollm2(device, options.smoke)
    model = builders(options.dropout)[name](base)
    models.step(model, *models.batch(base, 1, 8))()
    return peak_rss(models.step(model, *models.batch(base, *options.batch)))


def probed(name: str, options: Any) -> int | None:
    """The same in a fresh process."""
    run = [sys.executable, "-m", f"{__package__}.memory", "--probe", name]
    run += ["--batch", *map(str, options.batch), "--dropout", *map(str, options.dropout)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "memory", 1)
    made.add_argument("--dropout", nargs="+", type=float, default=[0.0, 0.1])
    made.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    made.add_argument("--shapes", nargs="+", choices=sorted(SHAPES))
    made.add_argument("--no-rss", action="store_true", help="no fresh processes")
    made.add_argument("--probe", help="used by the benchmark itself")
    options = made.parse_args(arguments)
    if options.smoke:
        options.batch = (2, 8)
    if options.probe:
        print(json.dumps(probe(options.probe, options)))
        return {}
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = start("memory", options, arguments)
    if not have_peft():
        result["notes"].append("PEFT is not installed: its rows are missing; pip install 'forgetless[bench]'")
    shapes = options.shapes or list(["tiny"] if options.smoke else GPU if device.type == "cuda" else CPU)
    M = 8 if options.smoke else 8192 if device.type == "cuda" else 512
    R = 4 if options.smoke else models.RANK
    result["layers"] = layer_rows(shapes, M, R, options.dropout, device)
    columns = ("layer", "provider", "saved MiB", "of rival's", "peak MiB")
    rows = [
        [
            f"{r['case']} {r['method']} dropout {r['dropout']:g}",
            r["provider"],
            number(r["saved_bytes"] / MIB, 3),
            number(r["saved_over_rival"]),
            number(r["peak_bytes"] / MIB, 3),
        ]
        for r in result["layers"]
    ]
    print(table(columns, rows) + "\n")
    base, name = models.smollm2(device, options.smoke)
    inputs, ids = models.batch(base, *options.batch)
    steps: dict[str, dict[str, Any]] = {}
    for title, build in builders(options.dropout).items():
        model = build(base)
        leaf = inputs.detach().requires_grad_(True)
        forward = partial(model, inputs_embeds=leaf, labels=ids)
        steps[title] = {
            "saved_bytes": saved_bytes(forward, [model, base]),
            "peak_bytes": peak_bytes(models.step(model, inputs, ids), device),
            "peak_rss": None,
        }
        del model, forward
        if device.type == "cpu" and not options.no_rss:
            steps[title]["peak_rss"] = probe(title, options) if options.smoke else probed(title, options)
    result.update(model=f"{name}, bfloat16, all linear layers, rank {models.RANK}", batch=list(options.batch))
    result["step"] = steps
    result["saved_over_peft"], result["saved_overhead_over_peft"] = {}, {}
    for p in options.dropout if have_peft() else ():
        mine, theirs = (steps[f"{library}, dropout {p:g}"]["saved_bytes"] for library in ("forgetless", "PEFT"))
        result["saved_over_peft"][f"{p:g}"] = mine / theirs
        result["saved_overhead_over_peft"][f"{p:g}"] = share(mine, theirs, steps["frozen"]["saved_bytes"])
    columns = ("whole step", "saved MiB", "peak MiB", "peak RSS MiB")
    rows = [
        [title, *(number(row[k] and row[k] / MIB, 1) for k in ("saved_bytes", "peak_bytes", "peak_rss"))]
        for title, row in steps.items()
    ]
    print(table(columns, rows))
    for p, ratio in result["saved_over_peft"].items():
        beyond = number(result["saved_overhead_over_peft"][p])
        print(f"dropout {p}: we save {ratio:.2f} of PEFT's bytes; of what is saved beyond the frozen model's, {beyond}")
    return finish(result, options)


if __name__ == "__main__":
    main()
