"""What a whole training step saves for its backward pass, and its peak; of one layer, ``bench layer`` has both.

    python -m bench memory [--dropout 0 0.1] [--batch 4 128] [--no-rss]

Saved: distinct storages that autograd packs in the forward pass, without weights and adapters. Peak: the most that
torch's allocator had out, above what it had before. RSS: the peak resident set of a fresh process for each provider,
around one step.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

from . import providers as peers
from .bytes import peak_rss
from .harness import BATCH, DROPOUT, Results, begin, finish, parser, row
from .providers import NO_PEFT, have_peft
from .step import Step, case_of


def probe(name: str, options: Any) -> int | None:
    """Peak RSS of one provider's step, in this process; a step of a few tokens first, so that libraries are loaded."""
    torch.manual_seed(0)
    base, _ = peers.smollm2(torch.device("cpu"), options.smoke)
    model = peers.models(options.dropout)[name](base)
    peers.step(model, *peers.batch(base, 1, 8))()
    return peak_rss(peers.step(model, *peers.batch(base, *options.batch)))


def probe_elsewhere(name: str, options: Any) -> int | None:
    """The same in a fresh process."""
    run = [sys.executable, "-m", str(__package__), "memory", "--probe", name]
    run += ["--batch", *map(str, options.batch), "--dropout", *map(str, options.dropout)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> Results:
    made = parser(__doc__, "memory", 1, batch=BATCH, dropout=DROPOUT)
    made.add_argument("--no-rss", action="store_true", help="no fresh processes")
    made.add_argument("--probe", help="used by the benchmark itself")
    options, device, results = begin(made, "memory", arguments, batch=(2, 8))
    if options.probe:
        print(json.dumps(probe(options.probe, options)))
        return {}
    if not have_peft():
        results["notes"].append(NO_PEFT)
    base, name = peers.smollm2(device, options.smoke)
    inputs, ids = peers.batch(base, *options.batch)
    for title, build in peers.models(options.dropout).items():
        sizes: dict[str, Any] = dict(Step(build(base), inputs, ids).sizes())
        if device.type == "cpu" and not options.no_rss:
            sizes["peak RSS"] = probe(title, options) if options.smoke else probe_elsewhere(title, options)
        known = {metric: size for metric, size in sizes.items() if size is not None}
        results["rows"] += [row(case_of(name, options), title, "step", key, n, "B") for key, n in known.items()]
    return finish(results, options)
