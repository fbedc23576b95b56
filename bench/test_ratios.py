"""Has anything become slower since the committed results? ``pytest bench/``: ratios within one run, never a time.

What is asked for is our time over the frozen layer's (or over a bare autograd function's), against the same ratio in
bench/results; a case fails beyond ``WORSE`` times of it. Both are ratios of the fastest rounds, since other work on the
machine only ever makes a round slower. The committed file must be of the same kind of machine.
pytest-benchmark keeps the times themselves, for those who want to compare two commits on one machine.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from forgetless_bench import dispatch, lowrank
from forgetless_bench.cases import Case
from forgetless_bench.harness import RESULTS, interleave, machine, tag

WORSE = 1.3
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
#: A busy machine makes a ratio worse at random: the best of so many tries counts.
TRIES = 3
CASE = ("case", "method", "M", "R", "dtype", "dropout")
#: FLOPs of the largest layer that is tried.
LARGEST = 2e10


def committed(bench: str) -> dict[str, Any]:
    path = RESULTS / f"{bench}-{tag(DEVICE)}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def here(results: dict[str, Any], *more: str) -> None:
    """Skip unless the results are of a machine like this one; ``more`` names what else must agree."""
    if not results:
        pytest.skip("no committed results for this kind of machine; run: python -m bench all")
    now, then = machine(), results["machine"]
    for key in ("processor", "gpu", "cores", *more):
        if now[key] != then[key]:
            pytest.skip(f"the committed results are of another machine: {key} {then[key]}, here {now[key]}")


def layer_cases() -> list[Any]:
    rows = [r for r in committed("lowrank").get("rows", []) if not r["graph"]]
    floors = {tuple(r[key] for key in CASE): r["both"]["low"] for r in rows if r["provider"] == "frozen"}
    rows = [r for r in rows if r["provider"] == "forgetless" and 4.0 * r["M"] * r["N"] * r["K"] < LARGEST]
    rows = [{**r, "ratio": r["both"]["low"] / floors[tuple(r[key] for key in CASE)]} for r in rows]
    ids = [f"{r['case']}-{r['method']}-M{r['M']}-R{r['R']}-{r['dtype']}-{r['dropout']}" for r in rows]
    return [pytest.param(row, id=name) for row, name in zip(rows, ids, strict=True)] or [pytest.param({}, id="none")]


@pytest.mark.parametrize("row", layer_cases())
def test_layer(benchmark: Any, row: dict[str, Any]) -> None:
    here(committed("lowrank"), "threads")
    case = Case(row["case"], row["M"], row["R"], getattr(torch, row["dtype"]), row["dropout"], row["method"])
    made, _ = lowrank.layers(case, DEVICE, compiled=False)
    runs = {name: made[name].both for name in ("frozen", "forgetless")}
    ratio = best(lambda: over(interleave(runs, 15, 2, None, DEVICE), "forgetless", "frozen"), row["ratio"])
    benchmark.extra_info["times_frozen"] = ratio
    benchmark.pedantic(runs["forgetless"], rounds=5)
    assert ratio <= WORSE * row["ratio"]


@pytest.mark.parametrize("name", ["forgetless, op", "forgetless, layer", "forgetless, custom op"])
def test_dispatch(benchmark: Any, name: str) -> None:
    results = committed("dispatch")
    here(results)
    then = over(results["seconds"], name, dispatch.BARE)
    found = dispatch.calls(DEVICE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = {key: dispatch.many(found[key], 100, DEVICE) for key in (dispatch.BARE, name)}
        ratio = best(lambda: over(interleave(runs, 11), name, dispatch.BARE), then)
        benchmark.extra_info["times_bare"] = ratio
        benchmark.pedantic(found[name], rounds=20, iterations=10)
    finally:
        torch.set_num_threads(threads)
    assert ratio <= WORSE * then


def over(times: dict[str, Any], name: str, floor: str) -> float:
    return times[name]["low"] / times[floor]["low"]


def best(measure: Any, then: float) -> float:
    """The lowest of up to ``TRIES`` ratios; one that is good enough ends it."""
    found = measure()
    for _ in range(TRIES - 1):
        if found <= WORSE * then:
            break
        found = min(found, measure())
    return found
