"""Everything that a GPU can tell, in one command and at most ten minutes: ``python -m bench gpu``.

First correctness: our op against float64 on this device, then the tests of the kernels and of the op, natively.
Nothing is timed if one of them fails. Then every benchmark, into bench/results/<benchmark>-<gpu>.json, ready to be
committed. Without a GPU it says what is missing; no number is made up.
"""

from __future__ import annotations

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

from . import dispatch, layer, memory, penalty, step
from .harness import RESULTS, ROOT, Parser, Row, row, short, start, tag, write_json

TESTS = ("tests/triton_kernels/test_kernels.py", "tests/ops/test_ops.py")
#: (M, N, K, R, dropout): aligned, ragged, one token, none.
CHECKS = ((256, 512, 256, 16, 0.0), (257, 515, 131, 9, 0.1), (1, 64, 96, 8, 0.0), (0, 64, 64, 8, 0.1))
NAMES = ("y", "dx", "ddown", "dup")
#: Module, its arguments, and the seconds that must be left when it starts.
BENCHES: tuple[tuple[Any, list[str], int], ...] = (
    (dispatch, ["--seconds", "10"], 60),
    (penalty, ["--seconds", "15"], 60),
    (step, ["--seconds", "30"], 60),
    (memory, [], 60),
    (layer, ["--seconds", "3"], 20),
    (layer, ["--seconds", "3", "--sweep"], 20),
)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="forgetless bench gpu", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything, default 10")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--no-tests", action="store_true", help="only the checks of this module, not pytest")
    parser.add_argument("--smoke", action="store_true", help="rehearse it at tiny sizes, on a CPU if need be")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(options.device)
    if device.type == "cpu":
        print(missing())
        if not options.smoke:
            return 1
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    results = start("checks", options, arguments)
    results["rows"] = check(device)
    print(f"{len(results['rows'])} comparisons with float64: all within their bounds", flush=True)
    tests = "left out" if options.no_tests or options.smoke else run_tests(0.4 * (end - begin))
    print(f"tests: {tests}", flush=True)
    if tests.startswith("failed"):
        print("nothing was timed", file=sys.stderr)
        return 1
    run_all(["--smoke"] if options.smoke else ["--out", str(options.out)], end)
    if options.smoke:
        return 0
    results["notes"] += [f"tests: {tests}", f"the whole run took {time.monotonic() - begin:.0f} s"]
    write_json(options.out / f"checks-{tag(device)}.json", results)
    print("done; now: python -m bench report, then commit")
    return 0


def run_all(shared: Sequence[str], end: float) -> None:
    """Every benchmark that time allows, until ``end`` (``time.monotonic``)."""
    for bench, more, least in BENCHES:
        name = " ".join([bench.__name__.rpartition(".")[2], *more])
        if time.monotonic() > end - least:
            print(f"note: {name} left out: out of time")
            continue
        print(f"\n== {name}", flush=True)
        try:
            if bench is layer:
                layer.main([*shared, *more], deadline=end - 15)
            else:
                bench.main([*shared, *more])
        except ImportError as error:  # transformers or peft is not there
            print(f"note: {name} left out: {error}")


def missing() -> str:
    names = ", ".join(f"{name}-<gpu>.json" for name in ("layer", "sweep", "penalty", "step", "memory", "dispatch"))
    lines = [
        "No CUDA device here: the GPU rows are missing, and nothing is invented in their place.",
        f"Missing: {names} in bench/results.",
        "To fill them: on a machine with an NVIDIA GPU of sm_80 or later, run  python -m bench gpu",
        "(checks first, at most ten minutes), commit the JSON, and run  python -m bench report.",
    ]
    have = sorted(path.name for path in RESULTS.glob("layer-*.json") if path.stem != "layer-cpu")
    return "\n".join(lines + ([f"Measured so far: {', '.join(have)}"] if have else []))


def run_tests(budget: float) -> str:
    """The suite of the kernels and of the op, on this device; from a source checkout only."""
    tests = [test for test in TESTS if (ROOT / test).exists()]
    if not tests:
        return "left out: no tests beside this package, run from a source checkout"
    run = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=budget)
    except subprocess.TimeoutExpired:
        return f"not finished after {budget:.0f} s"
    lines = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()
    if done.returncode:
        print("\n".join(lines[-30:]), file=sys.stderr)
    return ("passed: " if done.returncode == 0 else "failed: ") + lines[-1].strip("= ")


def check(device: torch.device) -> list[Row]:
    """Our op against float64 on a device: error of ours over its limit.

    Raises:
        RuntimeError: ours errs more than twice as much as eager does, in the worst element.
    """
    rows = []
    for title, error, limit in comparisons(device):
        if not error <= limit:  # NaN is not
            raise RuntimeError(f"{title}: error {error:.3e}, limit {limit:.3e}; nothing was timed")
        rows.append(row(title, "forgetless", "check", "error of limit", error / limit if limit else 0.0, "1"))
    return rows


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
    rate = reference.drop_threshold(p) / reference.LEVELS
    scale = 0.5

    def eager(dtype: torch.dtype) -> list[Tensor]:
        x, weight, down, up, dy = (t.to(dtype) for t in tensors)
        leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
        dropped = leaves[0] * keep * (1.0 / (1.0 - rate))
        y = leaves[0] @ weight.T + scale * ((dropped @ leaves[1].T) @ leaves[2].T)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy)]

    x, weight, down, up, dy = tensors
    leaves = [t.detach().requires_grad_(True) for t in (x, down, up)]
    y = fl.ops.lowrank_linear(leaves[0], weight, leaves[1], leaves[2], None, scale, p, seed)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)], eager(dtype), eager(torch.float64)


if __name__ == "__main__":
    raise SystemExit(main())
