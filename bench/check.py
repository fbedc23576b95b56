"""Whether the kernels compute right on this device: ``python -m bench check [--kernels NAME ..]``.

Against float64, the error of a launcher's results may be twice that of BLAS in the same dtype. One kernel that is
wrong, does not compile or faults is a row, and the others are checked all the same. On a CPU it needs
TRITON_INTERPRET=1.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from forgetless.ops import blas, dispatch, reference

from .harness import BadInput, Results, begin, finish, row, save

Operands = dict[str, Tensor]
#: kernel -> its results by one module, from operands and (p, seed).
KERNELS: dict[str, Callable[[Any, Operands, Any], Sequence[Tensor | None]]] = {
    "project": lambda run, t, drop: [run.project(t["x"], t["down"], 0.5, *drop)],
    "matmul_lowrank": lambda run, t, drop: [run.matmul_lowrank(t["x"], t["weight"], t["h"], t["up"], t["bias"], *drop)],
    "matmul_lowrank_t": lambda run, t, drop: [  # as dx reads it
        run.matmul_lowrank(t["dy"], t["weight"].T, t["h"], t["down"].T, None, *drop)
    ],
    "outer": lambda run, t, drop: [run.outer(t["h"], t["x"], *drop)],
    "project_outer": lambda run, t, drop: run.project_outer(t["dy"], t["up"], t["h"], 0.5),
    "dx_and_ddown": lambda run, t, drop: run.dx_and_ddown([t["dy"]], [t["weight"]], t["h"], [t["down"]], t["x"], *drop),
    **{
        plan: lambda run, t, drop, plan=plan: run.linear_lowrank(  # type: ignore[misc]
            t["x"], t["weight"], t["down"], t["up"], t["bias"], 0.5, *drop, plan=plan
        )
        for plan in ("split", "full", "once")
    },
}
#: M, N, K, R: aligned as models are, ragged, one token, a large rank.
SIZES = ((512, 256, 384, 16), (70, 50, 130, 24), (1, 64, 64, 8), (300, 320, 512, 128))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
P = 0.25
WRONG = "wrong: "


def operands(size: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device) -> Operands:
    """Results of unit size; factors in float32."""
    M, N, K, R = size
    generator = torch.Generator().manual_seed(M + N + K + R)
    shapes = {"x": (M, K), "dy": (M, N), "weight": (N, K), "h": (M, R), "bias": (N,), "down": (R, K), "up": (N, R)}
    made = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    return {name: t.to(device, torch.float32 if name in ("down", "up") else dtype) for name, t in made.items()}


def share_of_limit(kernel: str, t: Operands, drop: Any) -> float:
    """The largest error of a result over what it may be: 1 is the most."""
    run, worst = KERNELS[kernel], 0.0
    exact = run(reference, {name: value.double() for name, value in t.items()}, drop)
    for ours, theirs, truth in zip(run(dispatch.kernels, t, drop), run(blas, t, drop), exact, strict=True):
        assert ours is not None and theirs is not None and truth is not None
        error, other, size = ((some - truth).abs().max().item() for some in (ours, theirs, torch.zeros_like(truth)))
        limit = 2 * other + 4 * torch.finfo(torch.float32).eps * size
        worst = max(worst, error / limit if error <= limit else 1 + error)
    return worst


def checked(kernel: str, smoke: bool, device: torch.device, results: Results) -> bool:
    """Add the rows of one kernel, and a note for each that is wrong; whether the device is still there."""
    sizes, dtypes = (SIZES[1:2], DTYPES[:1]) if smoke else (SIZES, DTYPES)
    seed = torch.tensor([12, -34], dtype=torch.int32, device=device)
    for size, dtype, p in itertools.product(sizes, dtypes, (0.0, P)):
        case = f"M,N,K,R={','.join(map(str, size))} {str(dtype).removeprefix('torch.')} dropout {p:g}"
        value: float | None = None
        try:
            value = share_of_limit(kernel, operands(size, dtype, device), (p, seed if p else None))
            wrong = "" if value <= 1 else f"{value:.3g} of its limit"
        except Exception as error:  # whatever a compiler, a driver or a card raises
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        results["rows"].append(row(case, kernel, "check", "error", value, "of the limit"))
        if wrong:
            results["notes"].append(f"{WRONG}{kernel}, {case}: {wrong}")
            if value is None and not answers(device):
                return False
    return True


def answers(device: torch.device) -> bool:
    """Whether the device still computes: after a fault, every call of the process fails."""
    try:
        return torch.ones(1, device=device).sum().item() == 1.0
    except RuntimeError:
        return False


def main(arguments: list[str] | None = None) -> int:
    kernels = {"nargs": "+", "choices": KERNELS, "default": list(KERNELS)}
    options, device, results = begin(__doc__, "check", arguments, 1, kernels=kernels)
    if dispatch.kernels is None:
        raise BadInput("Triton is not installed: there is no kernel to check")
    for kernel in options.kernels:
        alive = checked(kernel, options.smoke, device, results)
        save(results, options)
        if not alive:
            break
    finish(results, options)
    return int(any(note.startswith(WRONG) for note in results["notes"]))
