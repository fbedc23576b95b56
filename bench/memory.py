"""What a whole training step saves for its backward pass, and its peak; of one layer, ``bench layer`` has both.

    python -m bench memory [--dropout 0 0.1] [--batch 4 128] [--no-rss]

Saved: distinct storages that autograd packs in the forward pass, without weights and adapters. Peak: the most that
torch's allocator had out, above what it had before. RSS: the peak resident set of a fresh process for each provider,
around one step.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from . import providers as peers
from .bytes import peak_rss
from .harness import BATCH, DROPOUT, Results, begin, finish, size_rows
from .providers import NO_PEFT, have_peft
from .step import Step, case_of


def probe(name: str, options: Any) -> int | None:
    """Peak RSS of one provider's step, in this process; a step of a few tokens first, so that libraries are loaded."""
    torch.manual_seed(0)
    base, _ = peers.smollm2(torch.device("cpu"), options.smoke)
    model = peers.models(options.dropout)[name](base)
    peers.step(model, *peers.batch(base, 1, 8))()
    return peak_rss(peers.step(model, *peers.batch(base, *options.batch)))


def main(arguments: list[str] | None = None) -> Results:
    options, device, results = begin(
        __doc__, "memory", arguments, 1, {"batch": (2, 8)}, batch=BATCH, dropout=DROPOUT, no_rss=False
    )
    if not have_peft():
        results["notes"].append(NO_PEFT)
    base, name = peers.smollm2(device, options.smoke)
    inputs, ids = peers.batch(base, *options.batch)
    for title, build in peers.models(options.dropout).items():
        sizes: dict[str, Any] = dict(Step(build(base), inputs, ids).sizes())
        if device.type == "cpu" and not options.no_rss:
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                sizes["peak RSS"] = (
                    probe(title, options) if options.smoke else fresh.submit(probe, title, options).result()
                )
        results["rows"] += size_rows(case_of(name, options), title, "step", sizes)
    return finish(results, options)
