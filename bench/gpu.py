"""Everything that a GPU can tell, in one command and in the minutes it is given: ``python -m bench gpu --minutes 9``.

Each part runs in a process of its own, the most important first, and writes bench/results/<part>-<gpu>.json, ready to
be committed, as it goes: a part that fails, faults or is out of time costs the others nothing. First every kernel is
checked against float64; one that is wrong is named, and the rest is measured. Needs no network, and neither PEFT nor
transformers: what needs them is left out. Without a GPU it says what is missing; no number is made up.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from .check import KERNELS
from .harness import RESULTS, Results, parse, tag, write_json

#: How a module is run in a process of its own.
PYTHON = (sys.executable, "-m")


#: The most important first: its command line, and the most it may take of the time that is left when it starts.
#: Rank 16 and bfloat16; without dropout first.
PARTS = {
    "layer": ("layer --compile --seconds 1", 0.6),
    "step": ("step --seconds 10", 0.5),
    "memory": ("memory", 0.4),
    "penalty": ("penalty --seconds 10", 0.5),
    "dispatch": ("dispatch --seconds 5", 0.5),
    "sweep": ("layer --sweep --seconds 1", 0.9),
}
#: Of the time, the most that the checks may take; and the seconds that a part needs to begin at all.
CHECKS, LEAST = 0.3, 20


def main(arguments: list[str] | None = None) -> int:
    options = parse(__doc__, "gpu", arguments, minutes=10.0, out=RESULTS, smoke=False)
    if not torch.cuda.is_available():
        print(missing())
        return 1
    begin = time.monotonic()
    end = begin + 60 * options.minutes
    shared = ["--out", str(options.out), *(["--smoke"] if options.smoke else [])]
    failed = check_kernels(shared, options.out, begin + CHECKS * (end - begin))
    failed += [name for name in PARTS if not measure(name, shared, end)]
    print(f"done in {time.monotonic() - begin:.0f} s; now: python -m bench report, then commit")
    for name in failed:
        print(f"note: {name} failed or was left out, see above")
    return 0


def check_kernels(shared: Sequence[str], out: Path, end: float) -> list[str]:
    """Every kernel against float64, in one result file; those that there is no result of.

    A kernel that faults leaves its process without a card: the kernels after it are checked in a new one.
    """
    path = out / f"check-{tag(torch.device('cuda'))}.json"
    todo, lost = list(KERNELS), []
    merged: Results = {}
    while todo and time.monotonic() < end:
        path.unlink(missing_ok=True)
        run("check", [*shared, "--kernels", *todo], end - time.monotonic())
        results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"rows": [], "notes": []}
        merged = {**results, **{key: merged.get(key, []) + results[key] for key in ("rows", "notes")}}
        done = {row["provider"] for row in results["rows"]}
        if not done:  # the process died of the first
            lost.append(todo.pop(0))
        todo = [kernel for kernel in todo if kernel not in done]
    if merged.get("rows"):
        merged["notes"] += [f"{kernel} was not checked" for kernel in (*lost, *todo)]
        write_json(path, merged)
    return [f"check of {kernel}" for kernel in (*lost, *todo)]


def measure(name: str, shared: Sequence[str], end: float) -> bool:
    """Run one part in its share of the time that is left; whether it came to its end."""
    line, share = PARTS[name]
    command, *arguments = line.split()
    seconds = share * (end - time.monotonic())
    if seconds < LEAST:
        print(f"note: {name} left out: out of time")
        return False
    budget = ["--budget", f"{0.8 * seconds:.0f}"] if command == "layer" else []
    return run(command, [*arguments, *budget, *shared], seconds) == 0


def run(name: str, arguments: Sequence[str], seconds: float) -> int | None:
    """The exit code of one benchmark in a process of its own; None if it was stopped after so many seconds."""
    command = [*PYTHON, str(__package__), name, *arguments]
    print(f"\n== {' '.join([name, *arguments])}", flush=True)
    try:
        code = subprocess.run(command, timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        print(f"note: {name} was stopped after {seconds:.0f} s; what it had measured is written")
        return None
    if code:
        print(f"note: {name} ended with exit code {code}")
    return code


def missing() -> str:
    names = ", ".join(f"{name}-<gpu>.json" for name in ("check", *PARTS))
    return (
        f"No CUDA device here: {names} are missing, and nothing is invented in their place.\n"
        "To fill them: on a machine with an NVIDIA GPU of sm_80 or later, run  python -m bench gpu --minutes 9\n"
        "(the most important first), then  python -m bench report, and commit."
    )
