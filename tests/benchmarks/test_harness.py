"""Timing, statistics, bytes and result files."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from forgetless_bench import harness, layer
from forgetless_bench.bytes import peak_bytes, peak_rss, saved_bytes

CPU = torch.device("cpu")
#: The study's results have a form of their own.
STUDY = ("compare-", "forgetting-")


def test_a_time_is_the_median_of_its_rounds():
    row = harness.time_row("case", "ours", "both", [4.0, 1.000049, 2.0, 7.0])
    assert row["value"] == 3.0, "of an even number the middle two"
    assert (row["low"], row["unit"], row["metric"]) == (1.000049, "s", "time")
    assert row["spread"] == pytest.approx((1.0 + (3.0 - 1.000049)) / 2) and row["rounds"] == [4.0, 1.0, 2.0, 7.0]
    assert harness.median_and_spread([1.0, 2.0, 10.0]) == (2.0, 1.0)


def test_the_sum_of_the_parts_is_taken_in_every_round():
    rows = harness.time_rows("case", {"a": [[1.0, 2.0, 3.0], [9.0, 1.0, 2.0]]}, ("forward", "backward"))
    assert [(row["phase"], row["value"]) for row in rows] == [("forward", 2.0), ("backward", 2.0), ("both", 5.0)]


def test_providers_take_turns_and_warm_up_is_not_counted():
    calls: list[str] = []
    runs = {"a": lambda: calls.append("a"), "b": [lambda: calls.append("b1"), lambda: calls.append("b2")]}
    result = harness.interleave(runs, 2, 1)
    rounds = ["".join(calls[i : i + 3]) for i in (0, 3, 6)]
    assert len(calls) == 9 and all(one in ("ab1b2", "b1b2a") for one in rounds)
    assert [len(part) for part in result["a"]] == [2] and [len(part) for part in result["b"]] == [2, 2]
    assert gc.isenabled()


def test_every_round_has_an_order_of_its_own():
    calls: list[str] = []
    runs = {name: (lambda name=name: calls.append(name)) for name in "abcd"}
    harness.interleave(runs, 20, 0)
    orders = {"".join(calls[i : i + 4]) for i in range(0, 80, 4)}
    assert len(orders) > 5 and all(sorted(order) == list("abcd") for order in orders)
    harness.interleave(runs, 20, 0)
    assert calls[:80] == calls[80:]


def test_a_time_budget_ends_a_comparison_but_not_before_three_rounds(monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(harness.time, "perf_counter", lambda: float(next(ticks)))
    result = harness.interleave({"a": lambda: None}, 9, 1, seconds=0.5)
    assert len(result["a"][0]) == harness.MIN_ROUNDS
    assert harness.interleave({"a": lambda: None}, 9, 1, seconds=1e9)["a"] == [[1.0] * 9]


def test_garbage_collection_comes_back_after_an_error():
    with pytest.raises(ZeroDivisionError):
        harness.interleave({"a": lambda: 1 // 0}, 1)
    assert gc.isenabled()


def test_cuda_times_are_those_between_events(monkeypatch):
    clock = iter([1.0, 4.0, 9.0])

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(clock)

        def elapsed_time(self, other):
            return other.at - self.at  # milliseconds

    ranges = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.nvtx, "range", lambda name: ranges.append(name) or contextlib.nullcontext())
    assert harness.cuda_times("ours", [lambda: None, lambda: None]) == [0.003, 0.005]
    assert ranges == ["ours"]


def test_saved_bytes_counts_each_storage_once_and_no_weights():
    x = torch.randn(10, 10, requires_grad=True)
    assert saved_bytes(lambda: (x * x).sum()) == 400
    linear = nn.Linear(10, 10)
    assert saved_bytes(lambda: linear(x), [linear]) == 400
    assert saved_bytes(lambda: linear(x)) == 800
    assert saved_bytes(lambda: x.exp().exp()) == 800  # each keeps its result


def test_counting_leaves_nothing_behind():
    x = torch.randn(10, requires_grad=True)
    refs = []

    def forward():
        refs.append(weakref.ref(y := x.exp()))
        return y.exp()

    assert saved_bytes(forward) == 80
    assert refs[0]() is None


def test_peak_bytes_is_exact():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b * 2

    assert peak_bytes(run, CPU) in range(8000, 8200)
    assert peak_bytes(run, CPU) == peak_bytes(run, CPU)


def test_peak_rss_sees_a_large_buffer():
    result = peak_rss(lambda: torch.ones(1 << 24))
    assert result is None or result > 0.9 * (1 << 26)


def rows(*rounds: list[float]) -> list[dict[str, Any]]:
    return [harness.time_row("case", "a", "both", times) for times in rounds]


def test_overheads_are_compared_within_rounds():
    # the machine gets slower from round to round: the share of every round is 1/4, that of the medians is not
    floor, slow = [1.0, 2.0, 10.0, 3.0, 30.0], [3, 4, 3, 4, 4]
    ours, theirs = ([f + s * part for f, s in zip(floor, slow, strict=True)] for part in (0.5, 2.0))
    assert harness.overhead(*rows(ours, theirs, floor)) == (0.25, 0.0)
    # a round in which theirs is below the floor is left out; half of all and there is no share
    times = [[1.5, 2.5, 2.0, 9.0], [3.0, 3.0, 4.0, 0.5], [1.0, 2.0, 1.0, 1.0]]
    middle, spread = harness.overhead(*rows(*times))
    assert (middle, spread) == (pytest.approx(1 / 3), pytest.approx(1 / 3 - 1 / 4))
    times[1] = [3.0, 1.0, 4.0, 0.5]
    assert harness.overhead(*rows(*times)) is None
    # theirs is above the floor, but by less than it varies
    assert harness.overhead(*rows([1.5] * 3, [1.1, 0.8, 1.9], [1.0] * 3)) is None


def test_peaks():
    peaks = {row["provider"]: row["value"] for row in layer.peaks(torch.device("cpu"), [torch.float32], smoke=True)}
    assert set(peaks) == {"float32", "bytes"} and min(peaks.values()) > 0


def test_options_have_the_type_of_their_default(capsys):
    own = {"steps": 8, "lr": 0.5, "batch": (4, 128), "ranks": [16], "no_rss": False, "dtype": {"choices": ["a", "b"]}}
    assert vars(harness.parse("", "x", [], **own)) == {**own, "dtype": None}
    given = "--steps 2 --lr 1 --batch 1 2 --ranks 8 16 --no-rss --dtype b".split()
    chosen = vars(harness.parse("", "x", given, **own))
    assert chosen == {"steps": 2, "lr": 1.0, "batch": [1, 2], "ranks": [8, 16], "no_rss": True, "dtype": "b"}
    for wrong in (["--batch", "1"], ["--steps", "x"], ["--dtype", "c"]):
        with pytest.raises(SystemExit):
            harness.parse("", "x", wrong, **own)
    assert capsys.readouterr().err.count("error: forgetless bench x: ") == 3


def test_a_published_command_names_no_folder():
    given = ["--smoke", "--out", "somewhere", "--out=x", "--rounds", "3"]
    assert harness.without_out(given) == ["--smoke", "--rounds", "3"]
    assert harness.without_out(["--out", "x"]) == [] == harness.without_out(["--out=x"])


def test_files_are_written_whole_a_row_a_line_and_without_nan(tmp_path):
    path = tmp_path / "new" / "a.json"
    data = {"schema": 3, "notes": [], "rows": rows([1.0, 2.0], [3.0, -2.5e-05])}
    harness.write_json(path, data)
    with pytest.raises(ValueError):
        harness.write_json(path, {"rows": [{"value": float("nan")}]})
    assert json.loads(path.read_text()) == data and harness.read(path) == data
    assert sum('"case"' in line for line in path.read_text().splitlines()) == 2
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("data", [{"schema": 2}, {"schema": 3, "smoke": True}, {}])
def test_other_schemas_and_smoke_runs_are_refused(data, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    with pytest.raises(harness.BadInput, match="a.json"):
        harness.read(path)


TIMED = ("low", "spread", "count", "rounds")
FIELDS = {"case": str, "provider": str, "phase": str, "metric": str, "value": (int, float), "unit": str}


@pytest.mark.parametrize(
    "path", [p for p in sorted(harness.RESULTS.glob("*.json")) if not p.name.startswith(STUDY)], ids=lambda p: p.stem
)
def test_committed_results_have_the_schema(path):
    results = harness.read(path)
    assert set(results) >= {"kind", "created", "command", "commit", "machine", "versions", "notes", "cases", "rows"}
    assert results["rows"]
    for row in results["rows"]:
        timed = row["metric"] in ("time", "host time")
        assert list(row) == [*FIELDS, *(TIMED if timed else ())], row
        for name, kind in FIELDS.items():
            assert isinstance(row[name], kind), row
        if timed and row["rounds"]:
            assert row["value"] == pytest.approx(statistics.median(row["rounds"]), rel=1e-3), row
            assert len(row["rounds"]) == row["count"], row
    if results["kind"] in ("layer", "sweep"):
        assert {row["case"] for row in results["rows"]} - {"machine"} == set(results["cases"])
