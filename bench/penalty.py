"""What the penalties cost: value and gradient over all linear layers of SmolLM2-135M, once per optimizer step.

    python -m bench penalty [--k 256] [--batch 4 128]

CLoRA's penalty, ours with every basis against the authors' loop over modules on the same factors; then every penalty
beside the training step it is added to, both timed in the same rounds. OutputDeviation needs h of a forward pass: its
row is the penalty alone, on h as a leaf, and "step with OutputDeviation" is the step it belongs to. Phase "calibrate"
is ``fl.calibrate``, beside the plain forward and backward (forward for SourceDeviation) of the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import forgetless as fl

from . import providers as peers
from .harness import Results, Row, finish, interleave, parser, row, start, time_rows
from .providers import CloraAuthors

AUTHORS = "authors' CLoRA"
STEP = "training step, LoRA"


def value_and_gradient(value: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        value().backward()
        for leaf in leaves:
            leaf.grad = None

    return run


def randomize(model: Any) -> None:
    """At the start B is zero, and with it half of what the penalties compute."""
    with torch.no_grad():
        for layer in fl.adapters(model).values():
            up: Any = layer.adapter.up
            up.normal_(std=0.02)


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


def state_bytes(model: Any) -> int:
    """Bytes that the attached penalties store beside the adapters."""
    buffers = [b for layer in fl.adapters(model).values() for b in layer.adapter.penalties.buffers()]
    return sum({b.data_ptr(): b.numel() * b.element_size() for b in buffers}.values())


def prepare(base: Any, spec: Any, inputs: Tensor, ids: Tensor) -> tuple[Any, list[Tensor]]:
    """A model with that penalty whose statistics are there, and the leaves of its gradient."""
    model = peers.lora_model(base, 0.0, (spec,))
    randomize(model)
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


def calibration(base: Any, ids: Tensor, options: Any) -> list[Row]:
    """What measuring costs, beside the plain pass of the same sequences through the same adapted model."""
    sequences, tokens = (4, 8) if options.smoke else (32, ids.shape[1])
    ids = torch.randint(0, base.config.vocab_size, (sequences, tokens), device=ids.device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(options.batch[0])]
    plain = peers.lora_model(base, 0.0).eval()
    trained = [p for p in plain.parameters() if p.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            for batch in batches:
                plain(**batch)

    def backward() -> None:
        for batch in batches:
            torch.autograd.grad(plain(**batch).loss, trained)

    runs: dict[str, Any] = {"forward": forward, "forward and backward": backward}
    for title, spec in {
        "Laplace": fl.Laplace(),
        "Laplace, kfac": fl.Laplace(curvature="kfac"),
        "SourceDeviation, diag": fl.SourceDeviation(),
        "SourceDeviation, q = 64": fl.SourceDeviation(covariance=64),
    }.items():
        model = peers.lora_model(base, 0.0, (spec,)).eval()
        runs[title] = partial(fl.calibrate, model, batches)
    times = interleave(runs, min(options.rounds, 3), 1, ids.device, options.seconds)
    return time_rows(f"{sequences} sequences of {tokens} tokens", times, ("calibrate",))


def main(arguments: list[str] | None = None) -> Results:
    made = parser(__doc__, "penalty", 9)
    made.add_argument("--k", type=int, default=peers.K)
    made.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    options = made.parse_args(arguments)
    if options.smoke:
        options.rounds, options.k, options.batch = 2, 8, (2, 8)
    device = torch.device(options.device)
    torch.manual_seed(0)
    results = start("penalty", options, arguments)
    base, name = peers.smollm2(device, options.smoke)
    inputs, ids = peers.batch(base, *options.batch)
    penalties: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    for title, spec in specs(options.k).items():
        model, leaves = prepare(base, spec, inputs, ids)
        penalties[title] = value_and_gradient(partial(fl.penalty, model), leaves)
        penalties[title]()
        sizes[title] = state_bytes(model)
    plain = peers.lora_model(base, 0.0)
    randomize(plain)
    adapters: list[Any] = [layer.adapter for layer in fl.adapters(plain).values()]
    factors = [(adapter.down, adapter.up) for adapter in adapters]
    loop = CloraAuthors.drawn(factors, options.k, next(base.parameters()).dtype)
    penalties[AUTHORS] = value_and_gradient(loop, [t for pair in factors for t in pair])
    sizes[AUTHORS] = loop.bytes()
    deviating = peers.lora_model(base, 0.0, (fl.OutputDeviation(),))
    steps = {
        STEP: peers.step(plain, inputs, ids),
        "step with OutputDeviation": peers.step(deviating, inputs, ids, lambda: fl.penalty(deviating)),
    }
    times = interleave({**penalties, **steps}, options.rounds, 2, device, options.seconds)
    tokens = "×".join(map(str, options.batch))
    case = f"{name}, {len(factors)} linear layers, rank {peers.RANK}, k {options.k}, {tokens} tokens"
    results["rows"] += time_rows(case, {title: times[title] for title in penalties}, ("penalty",))
    results["rows"] += time_rows(case, {title: times[title] for title in steps}, ("step",))
    results["rows"] += [row(case, title, "penalty", "state", size, "B") for title, size in sizes.items()]
    results["rows"] += calibration(base, ids, options)
    return finish(results, options)
