"""Has anything become slower since the committed results? ``pytest bench --benchmark-only``: ratios, never a time.

A case compares our time over the frozen layer's (or over a bare autograd Function's) with the same ratio in
bench/results; it fails beyond ``WORSE`` times of it. Both are ratios of the fastest rounds, since other work on the
machine only makes a round slower. The committed file must be of the same kind of machine. pytest-benchmark stores the
times, for who wants to compare two commits on one machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from forgetless_bench import dispatch, layer
from forgetless_bench.harness import FROZEN, OURS, RESULTS, Results, interleave, machine, read, select, tag
from forgetless_bench.shapes import Case

WORSE = 1.3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: A busy machine makes a ratio worse at random: the best of so many tries counts.
TRIES = 3
#: FLOPs of the largest layer that is tried.
LARGEST = 2e10


def committed(kind: str) -> Results | None:
    path = RESULTS / f"{kind}-{tag(DEVICE)}.json"
    return read(path) if path.exists() else None


def ratio_then(kind: str, case: str, provider: str, floor: str, *same: str) -> float:
    """The committed ratio; skips unless it is of a machine like this one. ``same`` names what else must agree."""
    results = committed(kind)
    if results is None:
        pytest.skip("no committed results for this kind of machine; run: python -m bench all")
    now, then = machine(), results["machine"]
    for key in ("processor", "gpu", "cores", *same):
        if now[key] != then[key]:
            pytest.skip(f"the committed results are of another machine: {key} {then[key]}, here {now[key]}")
    rows = {row["provider"]: row["low"] for row in select(results, case=case, phase="both", metric="time")}
    return rows[provider] / rows[floor]


def layer_cases() -> list[Any]:
    cases = (committed("layer") or {"cases": {}})["cases"].values()
    small = [c for c in cases if 4.0 * c["M"] * c["N"] * c["K"] < LARGEST]
    made = [Case(**{key: c[key] for key in Case.__dataclass_fields__}) for c in small]
    return [pytest.param(case, id=case.name) for case in made] or [pytest.param(None, id="none")]


@pytest.mark.parametrize("case", layer_cases())
def test_layer(benchmark: Any, case: Case | None) -> None:
    if case is None:
        pytest.skip("no committed results for this kind of machine; run: python -m bench all")
    then = ratio_then("layer", case.name, OURS, FROZEN, "threads")
    made, _ = layer.make({key: getattr(case, key) for key in Case.__dataclass_fields__}, str(DEVICE))
    runs = {name: made[name].both for name in (FROZEN, OURS)}
    ratio = best(lambda: over(interleave(runs, 15, 2, DEVICE), OURS, FROZEN), then)
    benchmark.extra_info["times_frozen"] = ratio
    benchmark.pedantic(runs[OURS], rounds=5)
    assert ratio <= WORSE * then


@pytest.mark.parametrize("name", ["forgetless, op", "forgetless, layer", "forgetless, custom op"])
def test_dispatch(benchmark: Any, name: str) -> None:
    then = ratio_then("dispatch", dispatch.CASE, name, dispatch.BARE)
    calls = dispatch.calls(DEVICE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {key: dispatch.repeated(calls[key], 100, DEVICE) for key in (dispatch.BARE, name)}
        ratio = best(lambda: over(interleave(runs, 11), name, dispatch.BARE), then)
        benchmark.extra_info["times_bare"] = ratio
        benchmark.pedantic(calls[name], rounds=20, iterations=10)
    finally:
        torch.set_num_threads(threads)
    assert ratio <= WORSE * then


def over(times: dict[str, list[list[float]]], name: str, floor: str) -> float:
    return min(times[name][0]) / min(times[floor][0])


def best(measure: Callable[[], float], then: float) -> float:
    """The lowest of up to ``TRIES`` ratios; one that is good enough ends it."""
    ratio = measure()
    for _ in range(TRIES - 1):
        if ratio <= WORSE * then:
            break
        ratio = min(ratio, measure())
    return ratio
