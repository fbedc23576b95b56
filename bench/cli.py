"""``forgetless bench`` and ``python -m bench``: one command a benchmark, ``all`` of them, or what a GPU run needs."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

#: name -> (module, what it does). Modules are imported when asked for.
BENCHES = {
    "lowrank": "one layer, forward and backward, against every other way of computing it",
    "penalty": "value and gradient of the penalties over a whole model",
    "step": "a training step of a whole model",
    "memory": "what is kept for the backward pass, and the peak",
    "dispatch": "what a call costs before any arithmetic",
}
OTHERS = {
    "qlora": "training on a base in NF4, with PEFT and swapped in; needs bitsandbytes",
    "reliability": "how much was tried to break it, and what held: counts for docs/reliability.md",
    "all": "every benchmark above, one after the other",
    "gpu": "on a CUDA machine: the correctness checks, then every benchmark, in at most ten minutes",
    "tables": "write README's measured section, and docs/benchmarks.md from results",
    "plots": "draw the results into docs/images",
}


def usage() -> str:
    rows = [f"  {name:<13}{text}" for name, text in {**BENCHES, **OTHERS}.items()]
    return "\n".join(
        [
            "usage: forgetless bench COMMAND [--smoke] [--out FOLDER] [options of the command]",
            "",
            *rows,
            "",
            "Options of a command: forgetless bench COMMAND --help. --smoke: tiny sizes, shows that it runs.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name, *rest = arguments
    if name not in BENCHES and name not in OTHERS:
        print(f"error: unknown benchmark {name!r}, wants one of {', '.join([*BENCHES, *OTHERS])}", file=sys.stderr)
        return 2
    try:
        if name == "all":
            return run_all(rest)
        module = importlib.import_module(f".{name}", __package__)
        found = module.main(rest)
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return found if isinstance(found, int) else 0


def run_all(rest: Sequence[str]) -> int:
    """Every benchmark with the shared options."""
    made = argparse.ArgumentParser(prog="forgetless bench all", description=OTHERS["all"])
    made.add_argument("--smoke", action="store_true")
    for option in ("--out", "--rounds", "--seconds", "--device"):
        made.add_argument(option)
    if str(made.parse_args(rest).out).endswith(".json"):
        made.error("--out: wants a folder, there are several files")
    for name in BENCHES:
        print(f"\n== {name}: {BENCHES[name]}", flush=True)
        importlib.import_module(f".{name}", __package__).main(list(rest))
    return 0
