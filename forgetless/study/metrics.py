"""What follows from the rows of a comparison: continual-learning metrics, equal learning, drift against forgetting.

Everything here is a function of results.json, so that a report can be made again from the file alone. Losses are in
nats per token: where a paper defines a metric on accuracies, its sign is turned so that the meaning stays.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Iterable
from typing import Any

from .extras import Extras
from .stats import explained_by_groups, explained_by_line, interval, mean, minus, pareto, pearson, reached, spearman

Row = dict[str, Any]
#: Below this share of LoRA's learning an equal-learning comparison says little, and is marked.
ENOUGH = 0.5
#: A tuned weight must have learnt at least this share of what plain LoRA learnt.
ALMOST_ALL = 0.95


def continual(row: Row, base: Row, tasks: list[str], part: str = "losses") -> dict[str, float | None]:
    """Metrics of a task sequence from R[i][j], the loss on task j after task i was learnt.

    ``final`` is the mean over all tasks after the last; ``backward_transfer`` (Lopez-Paz and Ranzato 2017, eq. 3) the
    mean over earlier tasks of what later ones gained for it, R[j][j] - R[T][j], negative where it was lost;
    ``forward_transfer`` (eq. 4, against the untouched base) that of base[j] - R[j-1][j]; ``forgetting`` (Chaudhry et
    al. 2018) the mean over earlier tasks of R[T][j] - min over i < T of R[i][j]. With ``part="accuracies"`` signs are
    the papers' own. None where the row did not get there.
    """
    sign = -1.0 if part == "losses" else 1.0
    stages = [stage[part] for stage in row["stages"] if part in stage]
    names = ("final", "backward_transfer", "forward_transfer", "forgetting")
    if len(stages) < len(tasks) or part not in base:
        return dict.fromkeys(names)
    score = [[sign * stage[task] for task in tasks] for stage in stages]
    last, count = len(tasks) - 1, len(tasks)
    return {
        "final": sign * statistics.fmean(score[last]),
        "backward_transfer": mean(score[last][j] - score[j][j] for j in range(last)),
        "forward_transfer": mean(score[j - 1][j] - sign * base[part][tasks[j]] for j in range(1, count)),
        "forgetting": mean(max(score[i][j] for i in range(last)) - score[last][j] for j in range(last)),
    }


def trajectory(row: Row, base: Row, tasks: list[str], kept: list[str]) -> list[dict[str, float]]:
    """Points along a run: ``learnt``, the sum over tasks of the fall of their loss (finished ones: when learnt);
    ``kept``, the mean rise on kept texts; ``tasks``, the mean rise on earlier tasks since each was learnt."""
    points = [{"task": -1.0, "learnt": 0.0, "kept": 0.0, "tasks": 0.0}]
    done: dict[str, float] = {}
    ends = {stage["after"]: stage["losses"] for stage in row["stages"]}
    for i, task in enumerate(tasks):
        along = [p["losses"] for p in row.get("points", ()) if p["task"] == task]
        if task in ends:
            along.append(ends[task])
        for losses in along:
            falls = [base["losses"][t] - loss for t, loss in done.items()] + [base["losses"][task] - losses[task]]
            point = {
                "task": float(i),
                "learnt": sum(falls),
                "kept": mean(losses[name] - base["losses"][name] for name in kept) or 0.0,
                "tasks": mean(losses[t] - loss for t, loss in done.items()) or 0.0,
            }
            points.append(point)
        if task not in ends:
            break
        done[task] = ends[task][task]
    return points


def names(results: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Of the tasks, and of the kept texts."""
    of = {role: [d["name"] for d in results["domains"] if d["role"] == role] for role in ("task", "kept")}
    return of["task"], of["kept"]


def main_rows(results: dict[str, Any]) -> list[Row]:
    """The rows that were asked for, without those of a sweep."""
    return [row for row in results["rows"] if not row.get("family")]


def whole(rows: Iterable[Row]) -> list[Row]:
    """Those that finished all tasks with numbers."""
    return [row for row in rows if row["stopped"] == "finished" and row["forgotten_mean"] is not None]


def baseline(results: dict[str, Any]) -> str | None:
    """The label of plain LoRA, without a penalty and any other part, among the rows; the one with default settings."""
    parts = {field.name for field in dataclasses.fields(Extras)}
    labels = []
    for row in main_rows(results):
        settings = row["settings"]
        if settings["name"] == "lora" and not settings["penalties"] and not any(settings.get(part) for part in parts):
            labels.append(str(row["label"]))
    return min(labels, key=len, default=None)


def groups(rows: Iterable[Row]) -> dict[str, dict[int, Row]]:
    """label -> seed -> row."""
    result: dict[str, dict[int, Row]] = {}
    for row in rows:
        result.setdefault(row["label"], {})[row["seed"]] = row
    return result


def against_baseline(results: dict[str, Any]) -> list[tuple[str, dict[int, tuple[Row, Row]]]]:
    """Label and seed -> (row, row of plain LoRA with that seed), of every other method that has such seeds."""
    known = groups(whole(main_rows(results)))
    reference = known.pop(baseline(results) or "", {})
    pairs = {
        label: {seed: (rows[seed], reference[seed]) for seed in sorted(rows.keys() & reference.keys())}
        for label, rows in known.items()
    }
    return [(label, rows) for label, rows in pairs.items() if rows]


def learnt_sum(row: Row) -> float:
    """Sum over tasks of the fall of the loss when each was learnt."""
    return sum(row["learnt"].values())


def equal_learning(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Each method against plain LoRA where both had learnt the same, seed by seed.

    Forgetting is read off both curves (``trajectory``: evaluations along training) at the greatest learning that both
    reached, where each first reaches it, linear between evaluations. Ratios are taken per seed and averaged with a
    t-interval; a ratio is left out (None) where LoRA itself forgot nothing there.
    """
    tasks, kept = names(results)
    base = results["base"]
    result = []
    for label, rows in against_baseline(results):
        curves = [[trajectory(row, base, tasks, kept) for row in both] for both in rows.values()]
        pairs = [_at_equal(*both) for both in curves]
        entry: dict[str, Any] = {"label": label, "seeds": list(rows), "share": interval(p["share"] for p in pairs)}
        entry["enough"] = entry["share"]["mean"] >= ENOUGH
        for part in ("kept", "tasks"):
            mine, lora = [p[part][0] for p in pairs], [p[part][1] for p in pairs]
            entry[part] = {
                "method": interval(mine),
                "lora": interval(lora),
                "difference": interval(minus(a, b) for a, b in zip(mine, lora, strict=True)),
                "ratio": _ratio(mine, lora),
            }
        result.append(entry)
    return result


def _at_equal(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> dict[str, Any]:
    most = [max(p["learnt"] for p in curve) for curve in (ours, theirs)]
    x = min(most)
    result: dict[str, Any] = {"share": x / most[1] if most[1] > 0 else 0.0}
    for part in ("kept", "tasks"):
        result[part] = [reached([p["learnt"] for p in curve], [p[part] for p in curve], x) for curve in (ours, theirs)]
    return result


def _ratio(mine: list[float | None], lora: list[float | None]) -> dict[str, Any] | None:
    pairs = [(a, b) for a, b in zip(mine, lora, strict=True) if a is not None and b is not None and b > 0]
    return interval(a / b for a, b in pairs) if len(pairs) == len(mine) else None


def paired(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per method, the difference to plain LoRA of the same seed: learnt, forgotten, earlier tasks, drift."""
    tasks, _ = names(results)
    values: dict[str, Callable[[Row], float | None]] = {
        "learnt": learnt_sum,
        "forgotten": lambda row: row["forgotten_mean"],
        "tasks": lambda row: mean(row["forgotten"][task] for task in tasks[:-1]),  # since each was learnt
        "drift": lambda row: row["drift"],
    }
    return [
        {"label": label, "seeds": list(rows)}
        | {name: interval(minus(value(a), value(b)) for a, b in rows.values()) for name, value in values.items()}
        for label, rows in against_baseline(results)
    ]


def drift_and_forgetting(results: dict[str, Any]) -> dict[str, Any]:
    """Whether drift tells forgetting better than the method's name does, over all runs, those of a sweep included."""
    rows = [row for row in whole(results["rows"]) if row["drift"] is not None]
    drift, lost = [row["drift"] for row in rows], [row["forgotten_mean"] for row in rows]
    return {
        "runs": len(rows),
        "pearson": pearson(drift, lost),
        "spearman": spearman(drift, lost),
        "explained_by_drift": explained_by_line(drift, lost),
        "explained_by_method": explained_by_groups([row.get("family") or row["label"] for row in rows], lost),
    }


def front(results: dict[str, Any]) -> list[dict[str, Any]]:
    """(learnt, forgotten) of every label, sweep included, means over seeds, and whether it is on the Pareto front."""
    result: list[dict[str, Any]] = []
    for label, rows in groups(whole(results["rows"])).items():
        first = next(iter(rows.values()))
        learnt, lost = (interval(map(value, rows.values())) for value in (learnt_sum, lambda r: r["forgotten_mean"]))
        assert learnt is not None and lost is not None
        result.append({"label": label, "family": first.get("family") or label, "learnt": learnt, "forgotten": lost})
    on = pareto([(p["learnt"]["mean"], p["forgotten"]["mean"]) for p in result])
    return [{**point, "front": best} for point, best in zip(result, on, strict=True)]


def tuned(results: dict[str, Any]) -> list[dict[str, Any]]:
    """Per swept family the setting that forgets least among those that learn nearly all that plain LoRA does.

    Taken on the seeds of the sweep alone, so that every setting of a family is judged by the same runs.
    """
    rows = whole(results["rows"])
    seeds = {row["seed"] for row in rows if row.get("family")}
    known = groups(row for row in rows if row["seed"] in seeds)
    reference = known.get(baseline(results) or "", {})
    if not seeds or not reference:
        return []
    enough = ALMOST_ALL * statistics.fmean(map(learnt_sum, reference.values()))
    families: dict[str, list[dict[str, Any]]] = {}
    for label, runs in known.items():
        family = next(iter(runs.values())).get("family") or label
        learnt = statistics.fmean(map(learnt_sum, runs.values()))
        lost = statistics.fmean(row["forgotten_mean"] for row in runs.values())
        families.setdefault(family, []).append({"label": label, "learnt": learnt, "forgotten": lost})
    result = []
    for family, settings in families.items():
        fit = [s for s in settings if s["learnt"] >= enough]
        best = min(fit, key=lambda s: s["forgotten"]) if fit else None
        result.append({"family": family, "settings": len(settings), "best": best})
    return result


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """All of the above, for results.json."""
    tasks, _ = names(results)
    base = results["base"]
    rows = groups(whole(main_rows(results)))
    metrics: dict[str, dict[str, Any]] = {}
    for label, runs in rows.items():
        metrics[label] = {}
        for part in ("losses", "accuracies"):
            each = [continual(row, base, tasks, part) for row in runs.values()]
            metrics[label][part] = {key: interval(e[key] for e in each) for key in each[0]}
    return {
        "baseline": baseline(results),
        "confidence": 0.95,
        "continual": metrics,
        "paired_with_baseline": paired(results),
        "equal_learning": equal_learning(results),
        "drift_and_forgetting": drift_and_forgetting(results),
        "front": front(results),
        "tuned": tuned(results),
    }
