"""``forgetless bench`` and ``python -m bench``: one command a benchmark, ``all`` of them, or what a GPU run needs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import Any

from .harness import BadInput, parse

#: name -> what it does. The module of that name has ``main(arguments)``, step has memory; it is imported when asked
#: for. First what ``all`` runs.
BENCHES = {
    "layer": "one layer, forward and backward, against every other way of computing it",
    "penalty": "value and gradient of the penalties over a whole model",
    "step": "a training step of a whole model",
    "memory": "what is saved for the backward pass, and the peak",
    "dispatch": "what a call costs before any arithmetic",
}
OTHERS = {
    "qlora": "training on a base in NF4, with PEFT and swapped in; needs bitsandbytes",
    "host": "what a layer costs the host on the CUDA path, without a GPU; needs Triton and transformers",
    "leaderboard": "PEFT's MetaMathQA setting with our methods; needs a model, its data and a GPU",
    "all": "every benchmark above, one after the other",
    "check": "every kernel against float64 on this device",
    "gpu": "on a CUDA machine: check, then every benchmark, the most important first, in ten minutes",
    "targets": "compile every kernel for every card, without one; what fits, what spills",
    "static": "bytes, FLOPs and predicted times of every kernel",
    "penalised": "bytes, FLOPs and predicted time of the penalties of a step of Llama-3-8B",
    "report": "write every table of README and docs from the JSON in bench/results",
}


USAGE = f"""usage: forgetless bench COMMAND [--smoke] [--out FOLDER] [options of the command]

{chr(10).join(f"  {name:<10}{text}" for name, text in {**BENCHES, **OTHERS}.items())}

Options of a command: forgetless bench COMMAND --help. --smoke: tiny sizes, shows that it runs.
layer and step take --against COMMIT: the same with that commit's library, interleaved in one run.
Microbenchmarks, one kernel on one shape too: pytest bench --benchmark-only."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    name, *rest = arguments
    if name not in BENCHES and name not in OTHERS:
        print(f"error: unknown benchmark {name!r}, choose from {', '.join([*BENCHES, *OTHERS])}", file=sys.stderr)
        return 2
    try:
        result = run_all(rest) if name == "all" else run(name, rest)
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return result if isinstance(result, int) else 0


def run(name: str, arguments: list[str]) -> Any:
    module, function = ("step", "memory") if name == "memory" else (name, "main")
    return getattr(importlib.import_module(f".{module}", __package__), function)(arguments)


def run_all(arguments: list[str]) -> int:
    """Every benchmark with the shared options."""
    shared: dict[str, Any] = {name: {} for name in ("out", "rounds", "seconds", "device")}
    if str(parse(OTHERS["all"], "all", arguments, smoke=False, **shared).out).endswith(".json"):
        raise BadInput("--out: needs a folder, there are several files")
    for name, text in BENCHES.items():
        print(f"\n== {name}: {text}", flush=True)
        run(name, arguments)
    return 0
