"""One training step of a whole model: frozen, with our adapters, with the peers', on the same weights and data.

    python -m bench step [--rounds 7] [--dropout 0 0.1] [--methods lora clora curlora]
    python -m bench step --against COMMIT     the same with that commit's library, interleaved
    python -m bench memory [--dropout 0 0.1] [--batch 4 128] [--no-rss]     what it saves, and its peak

The frozen model with gradients of its inputs is the floor: an ideal adapter costs 1.00 of it. Saved: distinct storages
that autograd packs in the forward pass, without weights and adapters. Peak: the most that torch's allocator had out,
above what it had before. RSS: the peak resident set of a fresh process for each provider, around one step. Of one layer
``bench layer`` has both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from torch import Tensor

import forgetless as fl

from . import providers as peers
from .against import providers
from .bytes import peak_bytes, peak_rss, saved_bytes
from .harness import AGAINST, BATCH, DROPOUT, OURS, Results, begin, finish, interleave, size_rows, time_rows
from .providers import NO_PEFT, have_peft

METHODS = ("lora", "clora", "curlora")


class Step(NamedTuple):
    """One provider: forward and backward of its model."""

    model: Any
    inputs: Tensor
    ids: Tensor
    penalty: Callable[[], Tensor] | None = None

    @property
    def runs(self) -> Sequence[Callable[[], Any]]:
        return [peers.step(self.model, self.inputs, self.ids, self.penalty)]

    def sizes(self) -> dict[str, int]:
        forward = partial(self.model, inputs_embeds=self.inputs.detach().requires_grad_(True), labels=self.ids)
        return {"saved": saved_bytes(forward, [self.model]), "peak": peak_bytes(self.runs[0], self.inputs.device)}


def make(
    batch: Sequence[int], dropout: Sequence[float], methods: Sequence[str], k: int, smoke: bool, device: str = "cpu"
) -> tuple[dict[str, Step], list[str]]:
    """name -> a step of that model; and notes."""
    torch.manual_seed(0)
    base, _ = peers.smollm2(torch.device(device), smoke)
    inputs, ids = peers.batch(base, *batch)
    builders = peers.models(dropout if "lora" in methods else (), "curlora" in methods)
    made = {name: Step(build(base), inputs, ids) for name, build in builders.items()}
    if "clora" in methods:
        for basis in ("orthogonal", "hadamard"):
            model = peers.adapted(base, fl.CLoRA(peers.RANK, peers.ALPHA, k=k, basis=basis))
            made[f"{OURS} CLoRA, {basis}"] = Step(model, inputs, ids, partial(fl.penalty, model))
        if have_peft():
            model = peers.peft_model(base, 0.0)
            made["PEFT + authors' CLoRA"] = Step(model, inputs, ids, peers.authors_clora(model, k))
    return made, NO_PEFT


def case_of(name: str, options: Any) -> str:
    """What ran, in words."""
    return f"{name}, bfloat16, all linear layers, rank {peers.RANK}, {'×'.join(map(str, options.batch))} tokens"


def main(arguments: list[str] | None = None) -> Results:
    methods = {"nargs": "+", "choices": METHODS, "default": list(METHODS)}
    own = {"batch": BATCH, "dropout": DROPOUT, "methods": methods}
    options, device, results = begin(__doc__, "step", arguments, 7, {"batch": (2, 8)}, **own, against=AGAINST)
    with providers(options.against, "step", results) as made_by:
        spec = {name: getattr(options, name) for name in (*own, "smoke", "device")}
        steps = made_by(k=8 if options.smoke else peers.K, **spec)
        times = interleave({name: one.runs for name, one in steps.items()}, options.rounds, 2, device, options.seconds)
    results["rows"] += time_rows(case_of(peers.smollm2(device, options.smoke)[1], options), times, ("step",))
    return finish(results, options)


def probe(name: str, options: Any) -> int | None:
    """Peak RSS of one provider's step, in this process; a step of a few tokens first, so that libraries are loaded."""
    torch.manual_seed(0)
    base, _ = peers.smollm2(torch.device("cpu"), options.smoke)
    model = peers.models(options.dropout)[name](base)
    peers.step(model, *peers.batch(base, 1, 8))()
    return peak_rss(peers.step(model, *peers.batch(base, *options.batch)))


def memory(arguments: list[str] | None = None) -> Results:
    options, device, results = begin(
        __doc__, "memory", arguments, 1, {"batch": (2, 8)}, batch=BATCH, dropout=DROPOUT, no_rss=False
    )
    results["notes"] += NO_PEFT
    base, name = peers.smollm2(device, options.smoke)
    inputs, ids = peers.batch(base, *options.batch)
    for title, build in peers.models(options.dropout).items():
        sizes: dict[str, Any] = dict(Step(build(base), inputs, ids).sizes())
        if device.type == "cpu" and not options.no_rss:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                sizes["peak RSS"] = (
                    probe(title, options) if options.smoke else fresh.submit(probe, title, options).result()
                )
        results["rows"] += size_rows(case_of(name, options), title, "step", sizes)
    return finish(results, options)
