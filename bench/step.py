"""One training step of a whole model: frozen, with our LoRA, with PEFT's, on the same weights and data.

    python -m bench.step [--rounds 7] [--dropout 0 0.1] [--curves 0] [--out bench/results/step-cpu.json]

The frozen model with gradients of its inputs is the floor: an ideal adapter costs 1.00x of it. With ``--curves N`` both
libraries also train N steps from the same start, to show that they follow the same loss curve.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import forgetless as fl

from .harness import RESULTS, interleave, machine, write_json

RANK, ALPHA = 16, 32


def peft_model(base: nn.Module, dropout: float) -> nn.Module:
    """PEFT's LoRA with its defaults: float32 adapters beside a bfloat16 base."""
    import peft

    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, target_modules="all-linear")
    model = peft.PeftModel(copy.deepcopy(base), config)
    return model.train()


def our_model(base: nn.Module, dropout: float) -> nn.Module:
    return fl.adapt(copy.deepcopy(base), fl.LoRA(RANK, ALPHA, dropout)).train()


def step(model: nn.Module, inputs: Tensor, labels: Tensor) -> Callable[[], Any]:
    """Forward and backward, input gradients included, as in the middle of a deeper model."""

    def run() -> None:
        x = inputs.detach().requires_grad_(True)
        model(inputs_embeds=x, labels=labels).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


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


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    parser.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    parser.add_argument("--curves", type=int, default=0, metavar="STEPS")
    parser.add_argument("--out", type=Path, default=RESULTS / "step-cpu.json")
    options = parser.parse_args(arguments)

    from forgetless.study.models import load_model

    torch.manual_seed(0)
    base, _ = load_model()
    base.requires_grad_(False)
    device = next(base.parameters()).device
    ids = torch.randint(0, base.config.vocab_size, tuple(options.batch), device=device)
    inputs = base.get_input_embeddings()(ids).detach()
    providers = {"frozen": step(base.train(), inputs, ids)}
    for p in options.dropout:
        providers[f"forgetless, dropout {p:g}"] = step(our_model(base, p), inputs, ids)
        providers[f"PEFT, dropout {p:g}"] = step(peft_model(base, p), inputs, ids)
    times = interleave(providers, options.rounds, warmup=2)
    floor = times["frozen"]["median"]
    for row in times.values():
        row["times_frozen"] = row["median"] / floor
    shares = {}
    for p in options.dropout:
        ours, theirs = (times[f"{name}, dropout {p:g}"]["median"] - floor for name in ("forgetless", "PEFT"))
        shares[f"{p:g}"] = ours / theirs
    result: dict[str, Any] = {
        "benchmark": "step",
        "model": "SmolLM2-135M, bfloat16, all linear layers, rank 16",
        "batch": list(options.batch),
        "rounds": options.rounds,
        "machine": machine(),
        "seconds": times,
        "overhead_over_peft": shares,
    }
    for name, row in times.items():
        print(f"{name:26s} {row['median']:.3f} s  +-{row['spread']:.3f}   {row['times_frozen']:.2f}x frozen")
    for p, share in shares.items():
        print(f"dropout {p}: our overhead is {share:.2f} of PEFT's")
    if options.curves:
        theirs_model, ours_model = peft_model(base, 0.0), our_model(base, 0.0)
        share_start(ours_model, theirs_model)
        ours_curve = curve(ours_model, ids, options.curves)
        theirs_curve = curve(theirs_model, ids, options.curves)
        apart = max(abs(a - b) for a, b in zip(ours_curve, theirs_curve, strict=True))
        result["curves"] = {"forgetless": ours_curve, "peft": theirs_curve, "largest_difference": apart}
        print(f"loss curves over {options.curves} steps: at most {apart:.4f} nats apart")
    write_json(options.out, result)
    print(f"written to {options.out}")
    return result


if __name__ == "__main__":
    main()
