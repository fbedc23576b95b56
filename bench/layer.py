"""One low-rank layer, forward and backward, against every other way of computing it.

    python -m bench layer [--shapes smollm2.q 4096x4096] [--dtypes bfloat16 float32] [--dropout 0 0.1]
    python -m bench layer --sweep              ranks 8 to 128 and 512 to 16384 tokens, a file of its own
    python -m bench layer --against COMMIT     the same with that commit's library, interleaved

Providers: the frozen layer with the gradient of its input (an ideal adapter costs 1.00 of it), ours, PEFT with its
defaults and with adapters in the layer's dtype, the formula in eager PyTorch, and a 20-line autograd Function with
LoRAFusion's split. CURLoRA is compared with its authors' dense form. Backward is that of the input and of the adapter.
On CUDA ours is measured by every plan too, and the host's time beside the card's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import forgetless as fl

from . import harness
from .against import Measured, providers
from .bytes import peak_bytes, saved_bytes
from .harness import FROZEN, OURS, Results, Row, interleave, row, size_rows, time_rows
from .providers import NO_PEFT, curlora_layers, frozen_linear, lora_layers, random_factors
from .shapes import CPU, GPU, METHODS, Case, fitting, grid, shape_name, shape_of, sweeps

SCALE = 2.0
PHASES = ("forward", "backward")
FUSED = ("split", "full", "once")


class Layer:
    """One provider on one input. ``backend``: run the op on that one or by that plan, else as the op decides."""

    def __init__(self, module: nn.Module, base: nn.Module, x: Tensor, dy: Tensor, backend: str | None = None):
        self.module, self.base, self.x, self.dy = module, base, x.detach().requires_grad_(True), dy
        self.leaves = [self.x, *(p for p in module.parameters() if p.requires_grad)]
        self.backend: Callable[[], Any] = nullcontext if backend is None else partial(within, backend)
        self.y: Tensor | None = None

    @property
    def runs(self) -> Sequence[Callable[[], Any]]:
        return self.forward, self.backward

    def forward(self) -> None:
        with self.backend():
            self.y = self.module(self.x)

    def backward(self) -> tuple[Tensor, ...]:
        assert self.y is not None
        with self.backend():
            grads = torch.autograd.grad(self.y, self.leaves, self.dy)
        self.y = None
        return grads

    def both(self) -> tuple[Tensor, ...]:
        self.forward()
        return self.backward()

    def sizes(self) -> dict[str, int]:
        with self.backend():
            saved = saved_bytes(lambda: self.module(self.x), [self.module, self.base])
        return {"saved": saved, "peak": peak_bytes(self.both, self.x.device)}


def within(name: str) -> AbstractContextManager[Any]:
    """The block in which the op runs on that backend, or by that plan, without another in its place."""
    if name in FUSED:
        return mock.patch.dict(os.environ, FORGETLESS_PLAN=f"{name},strict")
    return fl.ops.backend(name)


def make(
    case: Mapping[str, Any], device: str = "cpu", compiled: bool = False, backends: Sequence[str] = ()
) -> tuple[dict[str, Layer], list[str]]:
    """The providers of one case, and a note for each that does not run.

    Args:
        case: the fields of a ``shapes.Case``.
        backends: or plans of ours, rows of their own beside what the op decides.
    """
    one, place = Case(**case), torch.device(device)
    torch.manual_seed(0)
    shape, dtype = shape_of(one.shape), one.torch_dtype
    base = frozen_linear(shape.N, shape.K, False, dtype, place)
    x, dy = (torch.randn(one.M, width, device=place).to(dtype) for width in (shape.K, shape.N))
    if one.method == "curlora":
        makers = curlora_layers(base, one.R)
    else:
        makers = lora_layers(base, *random_factors(base, one.R), SCALE, one.dropout, compiled)
    made, notes = {}, []
    for name, backend in [*((name, None) for name in makers), *((OURS, backend) for backend in backends)]:
        title = f"{name}, {backend}" if backend else name
        try:
            layer = Layer(makers[name](), base, x, dy, backend)
            layer.module.train()
            layer.both()
            made[title] = layer
        except Exception as error:  # a provider that fails is a missing row with its reason, not a missing table
            if title in (FROZEN, OURS):
                raise
            text = str(error).splitlines() or [""]
            notes.append(f"{one.name}: no {title}: {type(error).__name__}: {text[0]}")
    return made, notes


def other_backends(device: torch.device) -> tuple[str, ...]:
    """What ours is also measured on: BLAS, and every plan of the fused kernels."""
    return ("blas", *FUSED) if device.type == "cuda" else ()


def measure(
    case: Case, made: Mapping[str, Measured], device: torch.device, rounds: int, seconds: float | None, results: Results
) -> None:
    """The rows of one case."""
    times = interleave({name: one.runs for name, one in made.items()}, rounds, 2, device, seconds)
    rows = time_rows(case.name, times, PHASES)
    if device.type == "cuda":
        # the host alone: to issue the work, with nothing waiting on the card before it
        hosts = {name: [torch.cuda.synchronize, *one.runs] for name, one in made.items() if isinstance(one, Layer)}
        parts = {name: parts[1:] for name, parts in interleave(hosts, rounds, 1, "cpu", seconds).items()}
        rows += time_rows(case.name, parts, PHASES, "host time")
    for name, one in made.items():
        rows += size_rows(case.name, name, "both", {} if name == "torch.compile" else one.sizes())
    results["rows"] += rows
    results["cases"][case.name] = case.about()


def peaks(device: torch.device, dtypes: Iterable[torch.dtype], smoke: bool = False) -> list[Row]:
    """The machine's own peaks, measured: of square products per dtype, and of a copy, which moves its bytes twice."""

    def best(run: Callable[[], Any]) -> float:
        return min(interleave({"": run}, 2 if smoke else 7, 2, device)[""][0])

    cuda, rows = device.type == "cuda", []
    for dtype in dtypes:
        rates = []
        for n in (64,) if smoke else (4096, 8192) if cuda else (1024, 2048):
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            rates.append(2 * n**3 / best(partial(torch.mm, a, b.T, out=torch.empty_like(a))) * 1e-12)
        rows.append(row("machine", str(dtype).removeprefix("torch."), "product", "peak", max(rates), "TFLOP/s"))
    size = 1 << (20 if smoke else 30 if cuda else 28)
    source = torch.ones(size, dtype=torch.uint8).to(device)
    target = torch.empty_like(source)
    copied = 2 * size / best(lambda: target.copy_(source)) * 1e-9
    return [*rows, row("machine", "bytes", "copy", "peak", copied, "GB/s")]


def main(arguments: list[str] | None = None) -> Results:
    cuda = torch.cuda.is_available()
    options, device, results = harness.begin(
        __doc__, "layer", arguments, 9, {"shapes": ["tiny.q"], "tokens": [8], "ranks": [4]},
        shapes={"nargs": "+", "type": shape_name, "default": list(GPU if cuda else CPU), "help": "names, or NxK"},
        tokens=[8192 if cuda else 512],
        ranks=[16],
        dtypes=["bfloat16"] if cuda else ["bfloat16", "float32"],
        dropout=harness.DROPOUT,
        methods={"nargs": "+", "choices": METHODS, "default": list(METHODS)},
        sweep={"action": "store_true", "help": "instead: a shape by rank, one by tokens; own file"},
        compile={"action": "store_true", "help": "torch.compile of the formula too"},
        budget={"type": float, "help": "leave out the cases that have not begun after so many seconds"},
        against=harness.AGAINST,
    )  # fmt: skip
    started = time.monotonic()
    if options.smoke:
        options.dtypes = options.dtypes[:1]
    if options.sweep:
        results["kind"] = "sweep"
    results["notes"] += NO_PEFT
    cases = sweeps(options, device, results["notes"]) if options.sweep else grid(options)
    cases = fitting(cases, device, results["notes"])
    results["rows"] += peaks(device, dict.fromkeys(case.torch_dtype for case in cases), options.smoke)
    with providers(options.against, "layer", results) as made_by:
        shared = {"device": options.device, "compiled": options.compile, "backends": other_backends(device)}
        for index, case in enumerate(cases):
            if options.budget is not None and time.monotonic() - started > options.budget:
                results["notes"].append(f"{len(cases) - index} cases left out: out of time")
                break
            measure(case, made_by(case=asdict(case), **shared), device, options.rounds, options.seconds, results)
            harness.save(results, options)
            print(f"measured {case.name}", flush=True)
            if options.compile:
                torch._dynamo.reset()
    return harness.finish(results, options)
