"""Methods compared over the whole range of their strengths: what each forgets where it has learned as much as LoRA.

A family is a method with all its strengths (weights, scales, shares, learning rates). Its runs with one seed are points
(learned, forgotten), and the line between them is its frontier. Learning is measured in shares of what plain LoRA with
the same seed learned, so that seeds can be averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .metrics import Row, baseline, learnt_sum, main_rows, names, whole
from .options import BadInput
from .page import command_of
from .palette import method_of
from .stats import interval, mean

#: Shares of LoRA's learning at which families are compared.
SHARES = (0.9, 0.95, 0.98)
#: What one can do without a penalty or other text: the learning rate, weight decay, a smaller update.
FREE = ("lora", "lora+scaled", "lora+decay")
PARTS = ("kept", "task")


@dataclass(frozen=True)
class Point:
    """One run: the share of LoRA's learning, the mean rise on kept texts, the rise on the first task, in nats."""

    label: str
    learnt: float
    kept: float
    task: float


Frontiers = dict[str, dict[int, list[Point]]]


def combined(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of one task sequence as one: the rows of all, each label and seed once; "lines" are their commands.

    Raises:
        BadInput: two of one sequence do not start from the same base losses.
    """
    result: dict[tuple[str, ...], dict[str, Any]] = {}
    for part in parts:
        tasks = tuple(names(part)[0])
        joint = result.setdefault(tasks, {**part, "rows": [], "lines": []})
        if joint["base"]["losses"] != part["base"]["losses"]:
            raise BadInput(f"two comparisons of {', '.join(tasks)} start from different losses of the base model")
        joint["lines"].append(command_of(part))
        known = {(row["label"], row["seed"]) for row in joint["rows"]}
        joint["rows"] += [row for row in part["rows"] if (row["label"], row["seed"]) not in known]
    return list(result.values())


def frontiers(results: dict[str, Any]) -> Frontiers:
    """family -> seed -> its points by growing learning, of the seeds that plain LoRA has.

    Raises:
        BadInput: there is no row of plain LoRA.
    """
    tasks, kept = names(results)
    rows = whole(main_rows(results))
    label = baseline(results)
    lora = {row["seed"]: learnt_sum(row) for row in rows if row["label"] == label}
    if not lora:
        raise BadInput("a frontier wants rows of plain LoRA to compare with: add --method lora")
    result: Frontiers = {}
    for row in rows:
        if row["seed"] in lora:
            point = Point(row["label"], learnt_sum(row) / lora[row["seed"]], *_forgotten(row, tasks, kept))
            result.setdefault(method_of(row["label"]), {}).setdefault(row["seed"], []).append(point)
    for seeds in result.values():
        for points in seeds.values():
            points.sort(key=lambda point: point.learnt)
    return result


def _forgotten(row: Row, tasks: list[str], kept: list[str]) -> tuple[float, float]:
    return mean(row["forgotten"][name] for name in kept) or 0.0, mean(row["forgotten"][t] for t in tasks[:-1]) or 0.0


def reading(points: Sequence[Point], share: float, part: str) -> float | None:
    """The least that the family forgets where it has learned ``share``: at a point that has learned as much, or on a
    line between two points; None where it never learns so much."""
    known: list[tuple[float, float]] = [(point.learnt, getattr(point, part)) for point in points]
    values = [y for x, y in known if x >= share]
    for x0, y0 in known:
        values += [y0 + (share - x0) / (x1 - x0) * (y1 - y0) for x1, y1 in known if x0 < share < x1]
    return min(values, default=None)


def at_share(frontier: Frontiers, share: float) -> dict[str, dict[str, Any]]:
    """family -> part -> the interval over seeds of ``reading``; None where one seed does not learn so much."""
    result: dict[str, dict[str, Any]] = {}
    for family, seeds in frontier.items():
        result[family] = {}
        for part in PARTS:
            values = [reading(points, share, part) for points in seeds.values()]
            result[family][part] = None if None in values else interval(values)
    return result


def against(frontier: Frontiers, ours: str, other: str, share: float, part: str) -> dict[str, Any] | None:
    """Paired over the seeds that both have: the difference with its interval, and the ratio of the means.

    None where one of them does not learn so much; the ratio is None where the other forgets nothing.
    """
    seeds = sorted(frontier[ours].keys() & frontier[other].keys())
    pairs = [tuple(reading(frontier[f][seed], share, part) for f in (ours, other)) for seed in seeds]
    if not pairs or any(None in pair for pair in pairs):
        return None
    mine, theirs = (mean(column) or 0.0 for column in zip(*pairs, strict=True))
    difference = interval(a - b for a, b in pairs if a is not None and b is not None)
    return {"difference": difference, "ratio": mine / theirs if theirs > 0 else None, "seeds": len(seeds)}


def best(table: dict[str, dict[str, Any]], families: Iterable[str], part: str) -> str | None:
    """The family among these that forgets least on the mean; None where none of them learns so much."""
    known = {f: table[f][part]["mean"] for f in families if f in table and table[f][part] is not None}
    return min(known, key=lambda family: known[family], default=None)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """All comparisons of one sequence at all shares: each family with the best free one, and with plain LoRA."""
    frontier = frontiers(results)
    entry: dict[str, Any] = {}
    for share in SHARES:
        table = at_share(frontier, share)
        free = {part: best(table, FREE, part) for part in PARTS}
        rows: dict[str, Any] = {}
        for family in frontier:
            rows[family] = {
                part: {
                    "value": table[family][part],
                    "best_free": (other := free[part]) and against(frontier, family, other, share, part),
                    "lora": against(frontier, family, "lora", share, part),
                }
                for part in PARTS
            }
        entry[f"{share:g}"] = {"free": free, "families": rows}
    return entry
