"""What the penalties cost: value and gradient over all linear layers of SmolLM2-135M, once per optimizer step.

    python -m bench penalty [--k 256] [--batch 4 128]

CLoRA's penalty, ours with every basis against the authors' loop over modules on the same factors; then every penalty
beside the training step it is added to, both timed in the same rounds. OutputDeviation needs h of a forward pass: its
row is the penalty alone, on h as a leaf, and "step with OutputDeviation" is the step it belongs to. Phase "calibrate"
is ``fl.calibrate``, beside the plain forward and backward (forward for SourceDeviation) of the same sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import forgetless as fl

from . import providers as peers
from .harness import BATCH, Results, Row, begin, finish, interleave, size_rows, time_rows
from .providers import CloraAuthors

AUTHORS = "authors' CLoRA"
STEP = "training step, LoRA"


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


class Value:
    """One penalty on a model whose statistics are there: its value, its gradient, and the bytes that it stores.

    Args:
        name: of ``specs(k)``, or the authors' loop.
        batches: what ``fl.calibrate`` measures, if the penalty asks for statistics.
        x: input embeddings of a forward pass, where the penalty asks for its h.
    """

    def __init__(self, name: str, base: Any, k: int, batches: Sequence[Any], x: Tensor, rank: int = peers.RANK):
        spec = None if name == AUTHORS else specs(k)[name]
        self.model = peers.lora_model(base, 0.0, () if spec is None else (spec,), rank)
        layers = list(fl.adapters(self.model).values())
        adapters: list[Any] = [layer.adapter for layer in layers]
        with torch.no_grad():
            for adapter in adapters:  # at the start B is zero, and with it half of what the penalties compute
                adapter.up.normal_(std=0.02)
        self.leaves = [p for p in self.model.parameters() if p.requires_grad]
        self.value: Callable[[], Tensor] = partial(fl.penalty, self.model)
        if spec is None:
            factors = [(adapter.down, adapter.up) for adapter in adapters]
            self.value = loop = CloraAuthors.drawn(factors, k, next(base.parameters()).dtype)
            self.bytes = loop.bytes()
            return
        states = [state for adapter in adapters for state in adapter.penalty_states()]
        if any(state.statistics for state in states):
            fl.calibrate(self.model, batches)
        buffers = [b for adapter in adapters for b in adapter.penalties.buffers()]
        self.bytes = sum({b.data_ptr(): b.numel() * b.element_size() for b in buffers}.values())
        if any(state.needs_hidden for state in states):
            self.model(inputs_embeds=x)
            for layer in layers:
                assert layer.trace is not None and layer.trace.hidden is not None
                layer.trace.hidden = layer.trace.hidden.detach().requires_grad_(True)
                self.leaves.append(layer.trace.hidden)

    def __call__(self) -> None:
        self.value().backward()
        for leaf in self.leaves:
            leaf.grad = None


def calibration(base: Any, ids: Tensor, options: Any) -> list[Row]:
    """What measuring costs, beside the plain pass of the same sequences through the same adapted model."""
    sequences, tokens = (4, 8) if options.smoke else (32, ids.shape[1])
    ids = torch.randint(0, base.config.vocab_size, (sequences, tokens), device=ids.device)
    batches = [{"input_ids": part, "labels": part} for part in ids.split(options.batch[0])]
    plain = peers.lora_model(base, 0.0).eval()
    trained = [p for p in plain.parameters() if p.requires_grad]

    def passes(backward: bool) -> None:
        with torch.set_grad_enabled(backward):
            for batch in batches:
                loss = plain(**batch).loss
                if backward:
                    torch.autograd.grad(loss, trained)

    runs: dict[str, Any] = {"forward": partial(passes, False), "forward and backward": partial(passes, True)}
    measured = {"Laplace, kfac": fl.Laplace(curvature="kfac"), **specs(1)}
    for title in ("Laplace", "Laplace, kfac", "SourceDeviation, diag", "SourceDeviation, q = 64"):
        model = peers.lora_model(base, 0.0, (measured[title],)).eval()
        runs[title] = partial(fl.calibrate, model, batches)
    times = interleave(runs, min(options.rounds, 3), 1, ids.device, options.seconds)
    return time_rows(f"{sequences} sequences of {tokens} tokens", times, ("calibrate",))


def main(arguments: list[str] | None = None) -> Results:
    tiny = {"k": 8, "batch": (2, 8)}
    options, device, results = begin(__doc__, "penalty", arguments, 9, tiny, k=peers.K, batch=BATCH)
    base, name = peers.smollm2(device, options.smoke)
    inputs, ids = peers.batch(base, *options.batch)
    batch = {"input_ids": ids[:2, :32], "labels": ids[:2, :32]}
    penalties = {title: Value(title, base, options.k, [batch], inputs) for title in (*specs(1), AUTHORS)}
    deviating = peers.lora_model(base, 0.0, (fl.OutputDeviation(),))
    steps = {
        STEP: peers.step(peers.lora_model(base, 0.0), inputs, ids),
        "step with OutputDeviation": peers.step(deviating, inputs, ids, lambda: fl.penalty(deviating)),
    }
    times = interleave({**penalties, **steps}, options.rounds, 2, device, options.seconds)
    tokens, layers = "×".join(map(str, options.batch)), len(fl.adapters(deviating))
    case = f"{name}, {layers} linear layers, rank {peers.RANK}, k {options.k}, {tokens} tokens"
    for phase, group in (("penalty", penalties), ("step", steps)):
        results["rows"] += time_rows(case, {title: times[title] for title in group}, (phase,))
    for title, one in penalties.items():
        results["rows"] += size_rows(case, title, "penalty", {"state": one.bytes})
    results["rows"] += calibration(base, ids, options)
    return finish(results, options)
