"""Statistics and metrics on numbers that can be worked out by hand."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest

from forgetless.study import metrics, stats


def test_t_intervals_are_the_textbook_ones() -> None:
    assert stats.interval([]) is None and stats.interval([None, math.nan]) is None
    assert stats.interval([2.0, None]) == {"mean": 2.0, "low": None, "high": None, "n": 1}
    found = stats.interval([1.0, 2.0, 3.0])
    assert found == pytest.approx({"mean": 2.0, "low": 2 - 4.302653 / 3**0.5, "high": 2 + 4.302653 / 3**0.5, "n": 3})
    assert stats.half_of(stats.interval([1.0])) is None and stats.half_of(found) == pytest.approx(4.302653 / 3**0.5)
    for freedom, quantile in [(1, 12.7062), (30, 2.0423), (31, 2.0395), (60, 2.0003), (1000, 1.9623)]:
        values = [float(i % 7) for i in range(freedom + 1)]
        error = statistics.stdev(values) / len(values) ** 0.5
        assert stats.half_of(stats.interval(values)) / error == pytest.approx(quantile, abs=2e-4)
    assert stats.interval([1.0, 1.0]) == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 2}


def test_correlations() -> None:
    x = [1.0, 2.0, 3.0, 4.0]
    assert stats.pearson(x, [2.0, 4.0, 6.0, 8.0]) == pytest.approx(1)
    assert stats.pearson(x, [1.0, 4.0, 9.0, 16.0]) == pytest.approx(0.98437, abs=1e-4)
    assert stats.spearman(x, [-1.0, -4.0, -9.0, -16.0]) == pytest.approx(-1)
    # ranks 2.5, 1, 2.5 and 1, 2, 3: equal values share the mean of their ranks
    assert stats.spearman([5.0, 1.0, 5.0], [1.0, 2.0, 3.0]) == pytest.approx(0.0)
    assert stats.spearman([5.0, 1.0, 5.0], [3.0, 1.0, 2.0]) == pytest.approx(3**0.5 / 2)
    assert stats.spearman(x[:2], x[:2]) is None and stats.spearman(x, [1.0] * 4) is None
    assert stats.pearson(x[:2], x[:2]) is None and stats.pearson(x, [1.0] * 4) is None
    assert stats.explained_by_line(x, [2.0, 4.0, 6.0, 8.0]) == pytest.approx(1)
    groups = ["a", "a", "b", "b"]
    assert stats.explained_by_groups(groups, [1.0, 1.0, 3.0, 3.0]) == pytest.approx(1)
    # total 5, within 1: 1 - (1 / 2) / (5 / 3)
    assert stats.explained_by_groups(groups, [0.0, 1.0, 2.0, 3.0]) == pytest.approx(0.7)
    assert stats.explained_by_groups(["a", "b"], [0.0, 1.0]) is None


def test_where_a_curve_reaches_a_value() -> None:
    xs, ys = [0.0, 2.0, 1.0, 4.0], [0.0, 1.0, 5.0, 2.0]
    assert stats.reached(xs, ys, 1.0) == 0.5, "the first time"
    assert stats.reached(xs, ys, 2.0) == 1.0 and stats.reached(xs, ys, 3.0) == pytest.approx(3.0)
    assert stats.reached(xs, ys, 5.0) is None and stats.reached(xs, ys, 0.0) == 0.0


def test_the_pareto_front() -> None:
    points = [(3.0, 0.3), (2.0, 0.1), (2.0, 0.2), (1.0, 0.15), (3.0, 0.3)]
    assert stats.pareto(points) == [True, True, False, False, True]


TASKS, KEPT = ["a", "b", "c"], ["news", "code"]
BASE = {"losses": {"a": 4.0, "b": 3.0, "c": 5.0, "news": 3.0, "code": 2.0}}


def stage(after: str, a: float, b: float, c: float, news: float, code: float) -> dict[str, Any]:
    return {"after": after, "losses": {"a": a, "b": b, "c": c, "news": news, "code": code}}


def row(label: str, seed: int, lost: float, method: str = "lora", **more: Any) -> dict[str, Any]:
    """Learns 2, 1 and 2 nats, forgets ``lost`` of the kept texts in equal steps and of task a half a nat."""
    stages = [
        stage("a", 2.0, 2.9, 5.1, 3 + lost / 3, 2 + lost / 3),
        stage("b", 1.9, 2.0, 4.9, 3 + 2 * lost / 3, 2 + 2 * lost / 3),
        stage("c", 2.5, 2.2, 3.0, 3 + lost, 2 + lost),
    ]
    middle = {"a": 3.0, "news": 3 + lost / 6, "code": 2 + lost / 6}
    found = {
        "label": label, "seed": seed, "family": None, "stopped": "finished", "stages": stages,
        "points": [{"task": "a", "step": 3, "losses": middle}], "settings": {"name": method, "penalties": []},
        "learnt": {"a": 2.0, "b": 1.0, "c": 2.0}, "forgotten_mean": lost, "drift": lost / 2,
        "forgotten": {"a": 0.5, "b": 0.2, "news": lost, "code": lost},
    }  # fmt: skip
    return found | more


def results(rows: list[dict[str, Any]]) -> dict[str, Any]:
    domains = [{"name": n, "role": "task"} for n in TASKS] + [{"name": n, "role": "kept"} for n in KEPT]
    return {"domains": domains, "base": BASE, "rows": rows}


def test_continual_metrics_are_the_papers_definitions() -> None:
    found = metrics.continual(row("LoRA", 0, 0.3), BASE, TASKS)
    assert found["final"] == pytest.approx((2.5 + 2.2 + 3.0) / 3)
    assert found["backward_transfer"] == pytest.approx(-((2.5 - 2.0) + (2.2 - 2.0)) / 2)
    assert found["forward_transfer"] == pytest.approx(((3.0 - 2.9) + (5.0 - 4.9)) / 2)
    assert found["forgetting"] == pytest.approx(((2.5 - 1.9) + (2.2 - 2.0)) / 2), "from the best, after task b"
    short = row("LoRA", 0, 0.3)
    short["stages"].pop()
    assert set(metrics.continual(short, BASE, TASKS).values()) == {None}
    exact = {"stages": [{"accuracies": {"a": 0.8, "b": 0.1}}, {"accuracies": {"a": 0.5, "b": 0.9}}]}
    found = metrics.continual(exact, {"accuracies": {"a": 0.2, "b": 0.3}}, ["a", "b"], "accuracies")
    assert found == pytest.approx(
        {"final": 0.7, "backward_transfer": -0.3, "forward_transfer": -0.2, "forgetting": 0.3}
    )


def test_the_trajectory_sums_what_was_learnt() -> None:
    points = metrics.trajectory(row("LoRA", 0, 0.6), BASE, TASKS, KEPT)
    assert [p["learnt"] for p in points] == pytest.approx([0, 1, 2, 3, 5])
    assert [p["kept"] for p in points] == pytest.approx([0, 0.1, 0.2, 0.4, 0.6])
    assert [p["tasks"] for p in points] == pytest.approx([0, 0, 0, -0.1, (0.5 + 0.2) / 2])


def test_equal_learning_reads_both_curves_at_the_same_place() -> None:
    rows = [row("LoRA", seed, 0.6) for seed in (0, 1)] + [row("X", seed, 0.15, "x") for seed in (0, 1)]
    for r in rows[2:]:  # learns only 1 nat of the last task: LoRA is read half-way through it
        r["stages"][2]["losses"]["c"] = 4.0
        r["learnt"]["c"] = 1.0
    (found,) = metrics.equal_learning(results(rows))
    assert found["label"] == "X" and found["seeds"] == [0, 1] and found["enough"]
    assert found["share"]["mean"] == pytest.approx(4 / 5)
    assert found["kept"]["method"]["mean"] == pytest.approx(0.15)
    assert found["kept"]["lora"]["mean"] == pytest.approx(0.5), "between 0.4 at 3 nats and 0.6 at 5"
    assert found["kept"]["ratio"] == pytest.approx({"mean": 0.3, "low": 0.3, "high": 0.3, "n": 2})
    assert found["kept"]["difference"]["mean"] == pytest.approx(-0.35)
    assert found["tasks"]["lora"]["mean"] == pytest.approx((-0.1 + 0.35) / 2)


def test_no_ratio_where_lora_forgot_nothing() -> None:
    rows = [row("LoRA", 0, -0.1), row("X", 0, 0.1, "x")]
    (found,) = metrics.equal_learning(results(rows))
    assert found["kept"]["ratio"] is None and found["kept"]["difference"]["mean"] == pytest.approx(0.2)
    assert metrics.equal_learning(results(rows[1:])) == [], "nothing to compare with"


def test_runs_that_broke_and_runs_of_a_sweep_are_left_out() -> None:
    rows = [row("LoRA", 0, 0.6), row("X", 0, 0.3, "x"), row("X @ 3", 0, 0.2, "x", family="X")]
    rows.append(row("Y", 0, 0.1, "y", stopped="diverged"))
    found = metrics.summary(results(rows))
    assert found["baseline"] == "LoRA" and list(found["continual"]) == ["LoRA", "X"]
    assert [p["label"] for p in found["paired_with_baseline"]] == ["X"]
    assert found["paired_with_baseline"][0]["forgotten"]["mean"] == pytest.approx(-0.3)
    assert [(p["label"], p["front"]) for p in found["front"]] == [("LoRA", False), ("X", False), ("X @ 3", True)]
    assert found["drift_and_forgetting"]["runs"] == 3
    assert found["drift_and_forgetting"]["pearson"] == pytest.approx(1)


def test_tuning_wants_nearly_all_of_the_learning() -> None:
    rows = [row("LoRA", 0, 0.6), row("X", 0, 0.3, "x"), row("X @ 3", 0, 0.1, "x", family="X")]
    assert {t["family"]: t["best"]["label"] for t in metrics.tuned(results(rows))} == {"LoRA": "LoRA", "X": "X @ 3"}
    rows[2]["learnt"]["c"] = 1.0
    assert {t["family"]: t["best"]["label"] for t in metrics.tuned(results(rows))} == {"LoRA": "LoRA", "X": "X"}
    assert metrics.tuned(results(rows[:2])) == [], "nothing was swept"
