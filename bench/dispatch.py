"""What one call costs before any arithmetic: forward and backward of one tiny layer, in eager mode, on one thread.

    python -m bench dispatch

The baseline is a bare ``torch.autograd.Function`` that does the same products and nothing else: no checks, no module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import forgetless as fl

from . import providers as peers
from .harness import FROZEN, PEFT, Results, begin, finish, interleave, one_thread, time_rows

M, N, K, R = 4, 16, 16, 4
CASE = f"M={M} N={N} K={K} R={R} float32, one thread"
BARE = "bare autograd.Function"


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        h = x @ down.T
        ctx.save_for_backward(x, weight, down, up, h)
        return linear(x, weight).addmm_(h, up.T)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        x, weight, down, up, h = ctx.saved_tensors
        g = dy @ up
        return (dy @ weight).addmm_(g, down), None, g.T @ x, dy.T @ h


def calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """One forward and backward each."""
    base = peers.frozen_linear(N, K, False, torch.float32, device)
    down, up = peers.random_factors(base, R)
    x, dy = torch.randn(M, K, device=device, requires_grad=True), torch.randn(M, N, device=device)
    weight, a, b = base.weight, down.clone().requires_grad_(True), up.clone().requires_grad_(True)

    def step(forward: Callable[[], Any], leaves: Sequence[Tensor] = (x, a, b)) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), leaves, dy)

    def of(module: nn.Module) -> Callable[[], Any]:
        return step(lambda: module(x), [x, *(p for p in module.parameters() if p.requires_grad)])

    op = torch.ops.forgetless.lowrank_linear
    result = {
        BARE: step(lambda: Bare.apply(x, weight, a, b)),
        FROZEN: of(base),
        "forgetless, op": step(lambda: fl.ops.lowrank_linear(x, weight, a, b)),
        "forgetless, layer": of(peers.lora_layer(base, down, up, 1.0, 0.0)),
        "forgetless, custom op": step(lambda: op(x, weight, a, b, None, None, [1.0, 1.0, 0.0])[0]),
        "eager PyTorch": of(peers.Eager(base, down, up, 1.0)),
    }
    if peers.have_peft():
        result[PEFT] = of(peers.peft_layer(base, down, up, 1.0, 0.0, autocast=True))
    return result


def main(arguments: list[str] | None = None) -> Results:
    options, device, results = begin(__doc__, "dispatch", arguments, 31, {"calls": 2}, calls=200)

    def repeated(call: Callable[[], Any]) -> None:
        for _ in range(options.calls):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    with one_thread(results):  # nothing here is worth a second thread
        runs = {name: partial(repeated, call) for name, call in calls(device).items()}
        times = interleave(runs, options.rounds, 1, "cpu", options.seconds)  # the host's clock, on any device
    one_call = {name: [[value / options.calls for value in part] for part in parts] for name, parts in times.items()}
    results["rows"] = time_rows(CASE, one_call, ("both",))
    return finish(results, options)
