"""What one call costs before any arithmetic: forward and backward of one tiny layer, in eager mode.

    python -m bench dispatch

The yardstick is a bare ``torch.autograd.Function`` that does the same products and nothing else: no checks, no module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

import forgetless as fl

from . import baselines
from .harness import finish, four_digits, interleave, number, parser, start, table

M, N, K, R = 4, 16, 16, 4
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
    base = baselines.frozen_linear(N, K, False, torch.float32, device)
    down, up = baselines.random_factors(base, R)
    x = torch.randn(M, K, device=device, requires_grad=True)
    dy = torch.randn(M, N, device=device)
    weight = base.weight
    a, b = down.clone().requires_grad_(True), up.clone().requires_grad_(True)

    def timed(forward: Callable[[], Tensor], wanted: list[Tensor]) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(forward(), wanted, dy)

    def of(module: nn.Module) -> Callable[[], Any]:
        return timed(lambda: module(x), [x, *(p for p in module.parameters() if p.requires_grad)])

    op = torch.ops.forgetless.lowrank_linear
    found = {
        BARE: timed(lambda: Bare.apply(x, weight, a, b), [x, a, b]),
        "frozen": of(base),
        "forgetless, op": timed(lambda: fl.ops.lowrank_linear(x, weight, a, b), [x, a, b]),
        "forgetless, layer": of(baselines.our_lora(base, down, up, 1.0, 0.0)),
        "forgetless, custom op": timed(lambda: op(x, weight, a, b, None, None, [1.0, 1.0, 0.0])[0], [x, a, b]),
        "eager PyTorch": of(baselines.Eager(base, down, up, 1.0)),
    }
    if baselines.have_peft():
        found["PEFT"] = of(baselines.peft_layer(base, down, up, 1.0, 0.0, autocast=True))
    return found


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    made = parser(__doc__, "dispatch", 31)
    made.add_argument("--calls", type=int, default=200, help="calls per timed round")
    options = made.parse_args(arguments)
    if options.smoke:
        options.rounds, options.calls = 2, 2
    device = torch.device(options.device)
    torch.manual_seed(0)
    result = start("dispatch", options, arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # nothing here is worth a second thread
    try:
        runs = {name: many(call, options.calls, device) for name, call in calls(device).items()}
        times = interleave(runs, options.rounds, 1, None, "cpu", options.seconds)  # the host's clock, on any device
    finally:
        torch.set_num_threads(threads)
    for row in times.values():
        for key in ("median", "low", "spread"):
            row[key] /= options.calls
        row["each"] = [four_digits(value / options.calls) for value in row["each"]]
    floor = times[BARE]["median"]
    for row in times.values():
        row["times_bare"] = row["median"] / floor
    result.update(layer={"M": M, "N": N, "K": K, "R": R, "dtype": "float32"}, calls=options.calls, seconds=times)
    result["machine"]["threads"] = 1
    rows = [
        [name, number(row["median"] * 1e6, 1), number(row["spread"] * 1e6, 1), number(row["times_bare"])]
        for name, row in times.items()
    ]
    print(table(("forward and backward", "us", "+-", "x bare"), rows))
    return finish(result, options)


def many(call: Callable[[], Any], count: int, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            call()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return run


if __name__ == "__main__":
    main()
