"""Everything a GPU can tell us, in one command and at most ten minutes: ``python -m bench gpu``.

First correctness: our layers against float64 on this device, then the tests of the kernels and of the op, natively.
Nothing is timed if one of them fails. Then every benchmark, into bench/results/<benchmark>-<gpu>.json, ready to be
committed. Without a GPU it says what is missing; no number is made up.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import forgetless as fl
from forgetless.ops import reference

from . import dispatch, lowrank, memory, penalty, step, tables
from .harness import RESULTS, short, tag, write_json

TESTS = ("tests/triton_kernels/test_kernels.py", "tests/ops/test_ops.py")
#: (M, N, K, R, dropout): aligned, ragged, one token, none.
CHECKS = ((256, 512, 256, 16, 0.0), (257, 515, 131, 9, 0.1), (1, 64, 96, 8, 0.0), (0, 64, 64, 8, 0.1))
NAMES = ("y", "dx", "ddown", "dup")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forgetless bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything, default 10")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-tests", action="store_true", help="only the checks of this module, not pytest")
    parser.add_argument("--smoke", action="store_true", help="rehearse it at tiny sizes, on a CPU if need be")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        print(missing())
        if not options.smoke:
            return 1
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    checks: dict[str, Any] = {"float64": check(device)}
    print(f"{len(checks['float64'])} comparisons with float64: all within their bounds", flush=True)
    checks["pytest"] = "left out" if options.no_tests or options.smoke else run_tests(0.4 * (end - begin))
    print(f"tests: {checks['pytest']}", flush=True)
    if checks["pytest"].startswith("failed"):
        print("nothing was timed", file=sys.stderr)
        return 1
    shared = ["--smoke"] if options.smoke else ["--out", str(options.out)]
    for bench, budget in ((dispatch, "10"), (penalty, "15"), (step, "30"), (memory, None)):
        name = bench.__name__.rpartition(".")[2]
        if time.monotonic() > end - 60:
            print(f"note: {name} left out: out of time")
            continue
        print(f"\n== {name}", flush=True)
        try:
            bench.main([*shared, *(["--seconds", budget] if budget else [])])
        except ImportError as error:  # transformers or peft is not there
            print(f"note: {name} left out: {error}")
    for title, more in (("lowrank", []), ("lowrank --sweep", ["--sweep"])):
        if time.monotonic() > end - 20:
            print(f"note: {title} left out: out of time")
            continue
        print(f"\n== {title}", flush=True)
        lowrank.main([*shared, *more, "--seconds", "3"], deadline=end - 15)
    checks["seconds"] = round(time.monotonic() - begin)
    if options.smoke:
        return 0
    write_json(options.out / f"checks-{tag(device)}.json", {"benchmark": "checks", **checks})
    print(f"done in {checks['seconds']} s; now: python -m bench tables && python -m bench plots, then commit")
    return 0


def missing() -> str:
    names = ", ".join(f"{name}-<gpu>.json" for name in ("lowrank", "sweep", "penalty", "step", "memory", "dispatch"))
    lines = [
        "No CUDA device here: the GPU rows are missing, and nothing is invented in their place.",
        f"Missing: {names} in bench/results.",
        "To fill them: on a machine with an NVIDIA GPU of sm_80 or later, run  python -m bench gpu",
        "(checks first, at most ten minutes), commit the JSON, and run  python -m bench tables.",
    ]
    have = [path.name for path in tables.results_of("lowrank") if path.stem != "lowrank-cpu"]
    if have:
        lines.append(f"Measured so far: {', '.join(have)}")
    return "\n".join(lines)


def run_tests(budget: float) -> str:
    """The suite of the kernels and of the op, on this device; from a source checkout only."""
    root = Path(__file__).parent.parent
    tests = [test for test in TESTS if (root / test).exists()]
    if not tests:
        return "left out: no tests beside this package, run from a source checkout"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(run, cwd=root, capture_output=True, text=True, timeout=budget)
    except subprocess.TimeoutExpired:
        return f"not finished after {budget:.0f} s"
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    if done.returncode:
        print("\n".join(lines[-30:]), file=sys.stderr)
    return ("passed: " if done.returncode == 0 else "failed: ") + lines[-1].strip("= ")


def check(device: torch.device) -> dict[str, float]:
    """Our op against float64 on a device: error of ours over that of eager PyTorch in the same dtype.

    Raises:
        RuntimeError: ours errs more than twice as much as eager does, in the worst element.
    """
    found = {}
    for title, error, limit in comparisons(device):
        if not error <= limit:  # NaN is not
            raise RuntimeError(f"{title}: error {error:.3e}, limit {limit:.3e}; nothing was timed")
        found[title] = error / limit if limit else 0.0
    return found


def comparisons(
    device: torch.device, cases: Sequence[tuple[int, int, int, int, float]] = CHECKS
) -> Iterator[tuple[str, float, float]]:
    """Title, our worst error against float64 and twice that of eager PyTorch, for y and every gradient of the op."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for M, N, K, R, p in cases:
            ours, eager, truth = outcomes(M, N, K, R, p, dtype, device)
            for name, a, b, t in zip(NAMES, ours, eager, truth, strict=True):
                title = f"{name} {short(dtype)} M={M} N={N} K={K} R={R} dropout={p}"
                if not a.numel():
                    yield title, 0.0, 0.0
                    continue
                mine, theirs = ((x.double() - t).abs().max().item() for x in (a, b))
                yield title, mine, 2 * theirs + 4 * torch.finfo(torch.float32).eps * t.abs().max().item()


def outcomes(
    M: int, N: int, K: int, R: int, p: float, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """y, dx, ddown and dup by the op, by eager PyTorch in ``dtype``, and in float64."""
    gen = torch.Generator().manual_seed(M + N + K + R)
    seed = torch.tensor([12, -34], dtype=torch.int32, device=device)
    sizes = ((M, K), (N, K), (R, K), (N, R), (M, N))
    tensors = [(torch.randn(size, generator=gen) / size[-1] ** 0.5).to(device, dtype) for size in sizes]
    keep = torch.ones(M, K, dtype=torch.bool, device=device)
    if p and M:
        keep = reference.keep_mask(seed, p, M, K)
    realised = reference.drop_threshold(p) / reference.LEVELS
    scale = 0.5

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x, weight, down, up, dy = (t.to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
        dropped = leaves[0] * keep * (1.0 / (1.0 - realised))
        y = leaves[0] @ weight.T + scale * ((dropped @ leaves[1].T) @ leaves[2].T)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    x, weight, down, up, dy = tensors
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    y = fl.ops.lowrank_linear(leaves[0], weight, leaves[1], leaves[2], None, scale, p, seed)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], eager(dtype), eager(torch.float64)


if __name__ == "__main__":
    raise SystemExit(main())
