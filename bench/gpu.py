"""Everything that a GPU can tell, in one command and at most ten minutes: ``python -m bench gpu``.

First correctness: ``forgetless doctor``, then the tests of the kernels and of the op, natively on this device.
Nothing is timed if one of them fails. Then every benchmark, into bench/results/<benchmark>-<gpu>.json, ready to be
committed. Without a GPU it says what is missing; no number is made up.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from . import dispatch, layer, memory, penalty, step
from .harness import RESULTS, ROOT, Parser

TESTS = ("tests/triton_kernels/test_kernels.py", "tests/ops/test_ops.py")
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
    parser.add_argument("--no-tests", action="store_true", help="no pytest, only forgetless doctor")
    parser.add_argument("--smoke", action="store_true", help="rehearse it at tiny sizes, on a CPU if need be")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(missing())
        if not options.smoke:
            return 1
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    if not options.smoke and not correct(0.4 * (end - begin), tests=not options.no_tests):
        print("nothing was timed", file=sys.stderr)
        return 1
    run_all(["--smoke"] if options.smoke else ["--out", str(options.out)], end)
    print(f"done in {time.monotonic() - begin:.0f} s; now: python -m bench report, then commit")
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
    return (
        f"No CUDA device here: {names} are missing, and nothing is invented in their place.\n"
        "To fill them: on a machine with an NVIDIA GPU of sm_80 or later, run  python -m bench gpu\n"
        "(checks first, at most ten minutes), then  python -m bench report, and commit."
    )


def correct(budget: float, tests: bool) -> bool:
    """``forgetless doctor``, then the tests of the kernels and of the op, on this device; of the tests those that lie
    beside this package, in at most ``budget`` seconds."""
    runs = [[sys.executable, "-m", "forgetless", "doctor"]]
    paths = [test for test in TESTS if (ROOT / test).exists()] if tests else []
    if paths:
        runs.append([sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *paths])
    end = time.monotonic() + budget
    for run in runs:
        print(f"== {' '.join(run[2:])}", flush=True)
        try:
            if subprocess.run(run, cwd=ROOT, timeout=max(1.0, end - time.monotonic())).returncode:
                return False
        except subprocess.TimeoutExpired:
            print(f"note: not finished in {budget:.0f} s")
    return True
