"""What the penalties cost: value and gradient over all linear layers of SmolLM2-135M, once per optimiser step.

    python -m bench penalty [--k 256] [--batch 4 128]

CLoRA's penalty, ours with every basis against the authors' loop over modules on the same factors; then every penalty as
a share of the training step it is added to, both timed in the same rounds. OutputDeviation needs h of a forward pass:
its row is the penalty alone, on h as a leaf, and "step with OutputDeviation" is the step it belongs to. Last what
``fl.calibrate`` costs, against the plain forward and backward (forward for SourceDeviation) of the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import forgetless as fl

from . import models
from .baselines import CloraAuthors
from .harness import finish, interleave, number, parser, start, table

AUTHORS = "authors' CLoRA"
STEP = "training step, LoRA"


def value_and_gradient(value: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        value().backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def stir(model: Any) -> None:
    """Away from the start, where half of what the penalties look at is zero."""
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            layer.adapter.up.normal_(std=0.02)


def specs(k: int) -> dict[str, Any]:
    return {
        "NullSpace, orthogonal": fl.NullSpace(k=k),
        "NullSpace, shared": fl.NullSpace(k=k, basis="shared"),
        "NullSpace, hadamard": fl.NullSpace(k=k, basis="hadamard"),
        "Laplace": fl.Laplace(),
        "Laplace, tri_kfac": fl.Laplace(curvature="tri_kfac"),
        "SourceDeviation, diag": fl.SourceDeviation(),
        "SourceDeviation, q = 64": fl.SourceDeviation(covariance=64),
        "OutputDeviation": fl.OutputDeviation(),
        "WeightDeviation": fl.WeightDeviation(),
        "Decay": fl.Decay(),
    }


def basis_bytes(model: Any) -> int:
    """Bytes that the attached penalties hold beside the adapters."""
    buffers = [b for layer in fl.adapters(model).values() for b in layer.adapter.penalties.buffers()]
    return sum({b.data_ptr(): b.numel() * b.element_size() for b in buffers}.values())


def prepare(base: Any, spec: Any, inputs: Tensor, ids: Tensor) -> tuple[Any, list[Tensor]]:
    """A model with that penalty, ready to be asked for it, and the leaves of its gradient."""
    model = models.our_lora(base, 0.0, (spec,))
    stir(model)
    states = [state for layer in fl.adapters(model).values() for state in layer.adapter.penalty_states()]
    if any(state.statistics for state in states):
        fl.calibrate(model, [{"input_ids": ids[:2, :32], "labels": ids[:2, :32]}])
    leaves = [p for p in model.parameters() if p.requires_grad]
    if any(state.needs_hidden for state in states):
        model(inputs_embeds=inputs)
        for layer in fl.adapters(model).values():
            assert layer.trace is not None and layer.trace.hidden is not None
            layer.trace.hidden = layer.trace.hidden.detach().requires_grad_(True)
            leaves.append(layer.trace.hidden)
    return model, leaves


def calibration(base: Any, ids: Tensor, options: Any) -> dict[str, Any]:
    """What measuring costs, against the plain pass of the same sequences through the same adapted model."""
    sequences, tokens = (4, 8) if options.smoke else (32, ids.shape[1])
    ids = torch.randint(0, base.config.vocab_size, (sequences, tokens), device=ids.device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(options.batch[0])]
    plain = models.our_lora(base, 0.0).eval()
    trained = [p for p in plain.parameters() if p.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                plain(**batch)

    def backward() -> None:
        for batch in batches:
            torch.autograd.grad(plain(**batch).loss, trained)

    forms = {
        "Laplace": (fl.Laplace(), "forward and backward"),
        "Laplace, kfac": (fl.Laplace(curvature="kfac"), "forward and backward"),
        "SourceDeviation, diag": (fl.SourceDeviation(), "forward"),
        "SourceDeviation, q = 64": (fl.SourceDeviation(covariance=64), "forward"),
    }
    runs: dict[str, Any] = {"forward": forward, "forward and backward": backward}
    for title, (spec, _) in forms.items():
        model = models.our_lora(base, 0.0, (spec,)).eval()
        runs[f"calibrate {title}"] = lambda model=model: fl.calibrate(model, batches)
    found = interleave(runs, min(options.rounds, 3), 1, None, ids.device, options.seconds)
    for title, (_, against) in forms.items():
        found[f"calibrate {title}"]["times_plain"] = found[f"calibrate {title}"]["median"] / found[against]["median"]
    return {"sequences": sequences, "tokens": tokens, "seconds": found}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "penalty", 9)
    made.add_argument("--k", type=int, default=models.K)
    made.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    options = made.parse_args(arguments)
    if options.smoke:
        options.rounds, options.k, options.batch = 2, 8, (2, 8)
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = start("penalty", options, arguments)
    base, name = models.smollm2(device, options.smoke)
    inputs, ids = models.batch(base, *options.batch)
    runs: dict[str, Any] = {}
    held: dict[str, int] = {}
    for title, spec in specs(options.k).items():
        model, leaves = prepare(base, spec, inputs, ids)
        runs[title] = value_and_gradient(lambda model=model: fl.penalty(model), leaves)
        runs[title]()  # stacks the bases
        held[title] = basis_bytes(model)
    plain = models.our_lora(base, 0.0)
    stir(plain)
    factors = [(layer.adapter.down, layer.adapter.up) for layer in fl.adapters(plain).values()]
    loop = CloraAuthors.drawn(factors, options.k, next(base.parameters()).dtype)
    runs[AUTHORS] = value_and_gradient(loop, [t for pair in factors for t in pair])
    held[AUTHORS] = loop.bytes()
    deviating = models.our_lora(base, 0.0, (fl.OutputDeviation(),))
    steps = {
        STEP: models.step(plain, inputs, ids),
        "step with OutputDeviation": models.step(deviating, inputs, ids, lambda: fl.penalty(deviating)),
    }
    both = interleave({**runs, **steps}, options.rounds, 2, None, device, options.seconds)
    times, step_times = {t: both[t] for t in runs}, {t: both[t] for t in steps}
    whole = step_times[STEP]["median"]
    for title, row in times.items():
        row.update(share_of_step=row["median"] / whole, times_authors=times[AUTHORS]["median"] / row["median"])
        row["bytes_held"] = held[title]
    for row in step_times.values():
        row["share_of_step"] = row["median"] / whole
    result.update(
        model=f"{name}, {len(factors)} linear layers, rank {models.RANK}, k {options.k}",
        batch=list(options.batch),
        seconds={**times, **step_times},
        clora_speedup={
            basis: times[AUTHORS]["median"] / times[f"NullSpace, {basis}"]["median"]
            for basis in ("orthogonal", "shared", "hadamard")
        },
        calibration=calibration(base, ids, options),
    )
    rows = [
        [
            title,
            number(row["median"] * 1e3, 2),
            number(row["spread"] * 1e3, 2),
            number(100 * row["share_of_step"], 1),
            number(row.get("times_authors"), 1) if title.startswith("NullSpace") else "-",
            number(row["bytes_held"] / 2**20, 1) if "bytes_held" in row else "-",
        ]
        for title, row in result["seconds"].items()
    ]
    print(table(("penalty, value and gradient", "ms", "+-", "% of a step", "x faster", "held MiB"), rows))
    found = result["calibration"]
    rows = [
        [title, number(row["median"], 2), number(row["spread"], 2), number(row.get("times_plain"), 2)]
        for title, row in found["seconds"].items()
    ]
    heading = f"{found['sequences']} sequences of {found['tokens']} tokens"
    print(f"\n{table((heading, 's', '+-', 'x plain'), rows)}")
    return finish(result, options)


if __name__ == "__main__":
    main()
