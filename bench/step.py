"""One training step of a whole model: frozen, with our adapters, with the peers', on the same weights and data.

    python -m bench step [--rounds 7] [--dropout 0 0.1] [--methods lora clora curlora]
    python -m bench step --against COMMIT     the same with that commit's library, interleaved

The frozen model with gradients of its inputs is the floor: an ideal adapter costs 1.00 of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import forgetless as fl

from . import providers as peers
from .against import Both, providers
from .harness import OURS, Results, finish, interleave, parser, start, time_rows
from .providers import NO_PEFT, have_peft

METHODS = ("lora", "clora", "curlora")


@dataclass
class Step:
    """One provider: forward and backward of its model."""

    runs: Sequence[Callable[[], Any]]

    def sizes(self) -> dict[str, int]:
        return {}


def make(
    batch: Sequence[int], dropout: Sequence[float], methods: Sequence[str], k: int, smoke: bool, device: str = "cpu"
) -> tuple[dict[str, Step], list[str]]:
    """name -> a step of that model; and notes."""
    torch.manual_seed(0)
    base, _ = peers.smollm2(torch.device(device), smoke)
    inputs, ids = peers.batch(base, *batch)
    peft = have_peft()

    def step(model: Any, penalty: Any = None) -> Step:
        return Step([peers.step(model, inputs, ids, penalty)])

    builders = peers.models(dropout if "lora" in methods else (), "curlora" in methods)
    made = {name: step(build(base)) for name, build in builders.items()}
    if "clora" in methods:
        for basis in ("orthogonal", "hadamard"):
            model = peers.clora_model(base, basis, k)
            made[f"{OURS} CLoRA, {basis}"] = step(model, partial(fl.penalty, model))
        if peft:
            model = peers.peft_model(base, 0.0)
            made["PEFT + authors' CLoRA"] = step(model, peers.authors_clora(model, k))
    return made, [] if peft else [NO_PEFT]


def main(arguments: list[str] | None = None) -> Results:
    made = parser(__doc__, "step", 7)
    made.add_argument("--batch", type=int, nargs=2, default=(4, 128), metavar=("SEQUENCES", "TOKENS"))
    made.add_argument("--dropout", type=float, nargs="+", default=[0.0, 0.1])
    made.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    made.add_argument("--against", metavar="COMMIT", help="measure that commit of the library too")
    options = made.parse_args(arguments)
    k = peers.K
    if options.smoke:
        options.rounds, options.batch, k = 2, (2, 8), 8
    device = torch.device(options.device)
    results = start("step", options, arguments)
    spec = {name: getattr(options, name) for name in ("batch", "dropout", "methods", "smoke", "device")}
    with ExitStack() as stack:
        both = stack.enter_context(Both(options.against)) if options.against else None
        steps = providers(both, "step", {**spec, "k": k}, results)
        times = interleave({name: one.runs for name, one in steps.items()}, options.rounds, 2, device, options.seconds)
    _, name = peers.smollm2(device, options.smoke)
    case = f"{name}, bfloat16, all linear layers, rank {peers.RANK}, {'×'.join(map(str, options.batch))} tokens"
    results["rows"] += time_rows(case, times, ("step",))
    return finish(results, options)
