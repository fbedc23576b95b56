"""One training step of a whole model: frozen, with our adapters, with the peers', on the same weights and data.

    python -m bench step [--rounds 7] [--dropout 0 0.1] [--methods lora clora curlora] [--curves 0]

The frozen model with gradients of its inputs is the floor: an ideal adapter costs 1.00x of it. With ``--curves N`` both
libraries also train N steps from the same start, and PEFT once more in float32, to show whose rounding costs what.
Our share of PEFT's overhead is taken within every round; its median over the rounds is what is reported.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import forgetless as fl

from . import models
from .baselines import have_peft
from .harness import finish, interleave, number, parser, peaks, shares, start, table

METHODS = ("lora", "clora", "curlora")


def providers(base: Any, inputs: Tensor, ids: Tensor, dropouts: list[float], methods: list[str], k: int) -> dict:
    """name -> a step."""

    def step(model: Any, penalty: Any = None) -> Any:
        return models.step(model, inputs, ids, penalty)

    found = {"frozen": step(models.twin(base).train())}
    peft = have_peft()
    for p in dropouts if "lora" in methods else ():
        found[f"forgetless, dropout {p:g}"] = step(models.our_lora(base, p))
        if peft:
            found[f"PEFT, dropout {p:g}"] = step(models.peft_lora(base, p))
            found[f"PEFT bf16 adapters, dropout {p:g}"] = step(models.peft_lora(base, p, autocast=False))
    if "clora" in methods:
        for basis in ("orthogonal", "hadamard"):
            model = models.our_clora(base, basis, k)
            found[f"forgetless CLoRA, {basis}"] = step(model, lambda model=model: fl.penalty(model))
        if peft:
            model = models.peft_lora(base, 0.0)
            found["PEFT + authors' CLoRA"] = step(model, models.authors_clora(model, k))
    if "curlora" in methods:
        found["forgetless CURLoRA"] = step(models.ours(base, fl.CURLoRA(models.RANK)))
        found["authors' CURLoRA"] = step(models.authors_curlora(base))
    return found


def curve(model: nn.Module, ids: Tensor, steps: int) -> list[float]:
    """Losses of ``steps`` AdamW steps on one batch."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    return losses


def share_start(ours: nn.Module, theirs: nn.Module) -> None:
    """Give our adapters PEFT's random A: the same start for both."""
    a = {name: p for name, p in theirs.named_parameters() if "lora_A" in name}
    with torch.no_grad():
        for name, layer in fl.adapters(ours).items():
            (match,) = [p for key, p in a.items() if f".{name}.lora_A." in key]
            layer.adapter.down.copy_(match)


def curves(base: Any, ids: Tensor, steps: int) -> dict[str, Any]:
    """Losses from the same start, without dropout: both libraries beside the bfloat16 model, PEFT beside it in float32.

    The last one shows what the others' rounding costs: the model's weights are the same numbers in both dtypes.
    """
    theirs, ours = models.peft_lora(base, 0.0), models.our_lora(base, 0.0)
    exact = models.peft_lora(copy.deepcopy(base).float(), 0.0)
    share_start(ours, theirs)
    with torch.no_grad():
        starts = {name: p for name, p in theirs.named_parameters() if "lora_" in name}
        for name, p in exact.named_parameters():
            if name in starts:
                p.copy_(starts[name])
    found = {name: curve(m, ids, steps) for name, m in (("forgetless", ours), ("peft", theirs), ("float32", exact))}
    pairs = (("forgetless", "peft"), ("forgetless", "float32"), ("peft", "float32"))
    apart = {
        f"{one}, {other}": max(abs(a - b) for a, b in zip(found[one], found[other], strict=True))
        for one, other in pairs
    }
    print(f"loss curves over {steps} steps, at most apart: " + "; ".join(f"{k} {v:.4f} nats" for k, v in apart.items()))
    return {**found, "largest_difference": apart}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "step", 7)
    made.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    made.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--curves", type=int, default=0, metavar="STEPS")
    options = made.parse_args(arguments)
    k = models.K
    if options.smoke:
        options.rounds, options.batch, k = 2, (2, 8), 8
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = start("step", options, arguments)
    if not have_peft():
        result["notes"].append("PEFT is not installed: its rows are missing; pip install 'forgetless[bench]'")
    base, name = models.smollm2(device, options.smoke)
    inputs, ids = models.batch(base, *options.batch)
    runs = providers(base, inputs, ids, options.dropout, options.methods, k)
    result["peaks"] = peaks(device, [torch.bfloat16], options.smoke)
    times = interleave(runs, options.rounds, 2, None, device, options.seconds)
    floor = times["frozen"]["median"]
    flops = step_flops(base, ids.numel())
    for row in times.values():
        row["times_frozen"] = row["median"] / floor
        row["tflops"] = flops / row["median"] * 1e-12
        row["share_of_peak"] = row["tflops"] / result["peaks"]["tflops_bfloat16"]
    found = {}
    for p in options.dropout:
        names = [f"{library}, dropout {p:g}" for library in ("forgetless", "PEFT")]
        if all(name in times for name in names):
            found[f"{p:g}"] = shares(*(times[name] for name in names), times["frozen"])
    result.update(
        model=f"{name}, bfloat16, all linear layers, rank {models.RANK}",
        batch=list(options.batch),
        rounds=options.rounds,
        seconds=times,
        overhead_over_peft={p: one["share"] for p, one in found.items()},
        overhead_over_peft_spread={p: one["spread"] for p, one in found.items()},
        overhead_over_peft_of_medians={p: one["of_medians"] for p, one in found.items()},
    )
    columns = ("provider", "seconds", "+-", "x frozen", "TFLOP/s", "of peak")
    keys = {"median": 3, "spread": 3, "times_frozen": 2, "tflops": 3, "share_of_peak": 2}
    print(table(columns, [[name, *(number(row[k], d) for k, d in keys.items())] for name, row in times.items()]))
    for p, one in found.items():
        text = f"{number(one['share'])} +- {number(one['spread'])} of PEFT's, median over {one['rounds']} rounds"
        print(f"dropout {p}: our overhead is {text}; of the medians {number(one['of_medians'])}")
    if options.curves and have_peft():
        result["curves"] = curves(base, ids, options.curves)
    return finish(result, options)


def step_flops(base: nn.Module, tokens: int) -> float:
    """FLOPs of the frozen linear layers, head included, forward and for the inputs' gradients: the floor's own work."""
    weights = sum(m.weight.numel() for m in base.modules() if isinstance(m, nn.Linear))
    return 4.0 * tokens * weights


if __name__ == "__main__":
    main()
