"""What each method forgot and learnt, as pictures: compare.png, pareto.png, and the panels of the report."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .metrics import drift_and_forgetting, front, main_rows, names, trajectory, whole
from .palette import colour, nth
from .results import by_label
from .stats import half_of, interval, mean

#: Steps that a bold loss curve averages over; the thin one behind it does not.
WINDOW = 5
#: Of the first, second, .. setting of a method.
MARKS = ("o", "s", "^", "D", "v", "P")
STYLES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")
#: A correlation over fewer runs says nothing.
ENOUGH_RUNS = 8
Rows = dict[str, list[dict[str, Any]]]
Value = Callable[[dict[str, Any]], float | None]


class Panel(NamedTuple):
    """One picture of the report: ``alt`` for who cannot see it, ``caption`` for what is drawn and nothing else."""

    alt: str
    caption: str
    png: bytes


def draw(results: dict[str, Any]) -> bytes:
    """The figure as PNG bytes. It needs no display and leaves no state in matplotlib behind."""
    groups = by_label(results)
    tasks, kept = names(results)
    figure = Figure(figsize=(max(11.0, 0.22 * len(groups) * (len(tasks) + len(kept))), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(max(1, len(kept) + len(tasks) - 1), len(tasks)))
    forgotten = figure.add_subplot(grid[0, 0])
    learned = figure.add_subplot(grid[0, 1])
    curves = figure.add_subplot(grid[1, :])
    _bars(forgotten, groups, _forgotten(tasks, kept))
    forgotten.set_title("forgotten: rise of the loss (lower is better)")
    _bars(learned, groups, {name: _at("learnt", name) for name in tasks})
    learned.set_title("learned: fall of the loss (higher is better)")
    _curves(curves, groups, tasks)
    handles, labels = curves.get_legend_handles_labels()
    if handles:
        curves.legend(handles, labels, frameon=False, ncols=min(6, len(labels)), loc="upper right")
    model, device = results["model"]["name"], results["machine"]["device"]
    figure.suptitle(f"{model}, {results['options']['steps']} steps a task, {device}")
    return png(figure)


def draw_pareto(results: dict[str, Any]) -> bytes | None:
    """Learned against forgotten along training and over a sweep, and drift against forgetting; None without rows."""
    points = front(results)
    if not points:
        return None
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.set_title(_learned_and_forgotten(left, results, points))
    left.legend(frameon=False, fontsize=8)
    marks = nth([point["family"] for point in points])
    for row in whole(results["rows"]):
        if row["drift"] is not None:
            family = row.get("family") or row["label"]
            right.plot(row["drift"], row["forgotten_mean"], _mark(marks[family]), color=colour(family), markersize=5)
    about = drift_and_forgetting(results)
    r = about["pearson"] if about["runs"] >= ENOUGH_RUNS else None
    right.set_title(f"drift and forgetting, {about['runs']} runs" + ("" if r is None else f": r = {r:.2f}"))
    right.set_xlabel("drift: mean of ‖ΔW x‖ / ‖x‖ over layers, on kept texts")
    right.axhline(0, color="black", linewidth=0.8)
    return png(figure)


def panels(results: dict[str, Any]) -> list[Panel]:
    """The pictures of the report, each small enough for a telephone; none without rows."""
    groups, points = by_label(results), front(results)
    tasks, kept = names(results)
    shown = []
    if points:
        figure, axis = _panel()
        caption = _learned_and_forgotten(axis, results, points)
        axis.margins(x=0.12, y=0.08)
        if len(groups) > 1:
            figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2 if len(groups) < 9 else 3)
        text = "Learned against forgotten: right and down is better" + (f" ({caption})" if caption else "")
        shown.append(Panel("learned against forgotten, a mark for each method", f"{text}.", png(figure, 160)))
    if any(row["forgotten"] for rows in groups.values() for row in rows):
        figure, axis = _panel()
        _bars(axis, groups, _forgotten(tasks, kept))
        text = "Forgotten: the rise of the loss on each text, lower is better."
        shown.append(Panel("forgetting of each text by each method", text, png(figure, 160)))
    if any(task["loss"] for rows in groups.values() for row in rows for task in row["tasks"]):
        figure, axis = _panel()
        _curves(axis, groups, tasks)
        text = f"Training loss; bold: mean of {WINDOW} steps."
        shown.append(Panel("training loss of each method", text, png(figure, 160)))
    return shown


def _panel() -> tuple[Figure, Any]:
    figure = Figure(figsize=(5.4, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def png(figure: Figure, dpi: int = 110) -> bytes:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=dpi)
    return out.getvalue()


def _mark(number: int) -> str:
    return MARKS[number % len(MARKS)]


def _learned_and_forgotten(axis: Any, results: dict[str, Any], points: list[dict[str, Any]]) -> str:
    """A mark per setting, a line along each method's training, the Pareto front; says which of these are drawn."""
    tasks, kept = names(results)
    marks = nth([point["family"] for point in points])
    groups: Rows = {}
    for row in whole(main_rows(results)):
        groups.setdefault(row["label"], []).append(row)
    for label, rows in groups.items():
        curves = [trajectory(row, results["base"], tasks, kept) for row in rows]
        length = min(map(len, curves))
        middle = [[sum(c[i][part] for c in curves) / len(curves) for i in range(length)] for part in ("learnt", "kept")]
        axis.plot(*middle, color=colour(label), linewidth=1.0, alpha=0.6)
    for point in points:
        main = point["family"] == point["label"]
        x, y = point["learnt"], point["forgotten"]
        axis.errorbar(
            x["mean"],
            y["mean"],
            xerr=half_of(x),
            yerr=half_of(y),
            color=colour(point["family"]),
            marker=_mark(marks[point["family"]]),
            markersize=8 if main else 4,
            markerfacecolor=colour(point["family"]) if main else "white",
            linewidth=0.8,
            capsize=2,
            label=point["label"] if main else None,
            linestyle="none",
        )
    said = ["lines: along training"]
    if any(point["family"] != point["label"] for point in points):
        said.append("hollow: other weights")
    best = sorted((p["learnt"]["mean"], p["forgotten"]["mean"]) for p in points if p["front"])
    if len(best) > 1:
        axis.plot([p[0] for p in best], [p[1] for p in best], color="black", linewidth=0.8, linestyle=":")
        said.append("dotted: Pareto front")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_xlabel("learned: fall of the loss, summed over tasks")
    axis.set_ylabel("forgotten: mean rise on kept texts")
    return "; ".join(said)


def _at(part: str, name: str) -> Value:
    return lambda row: row[part].get(name)


def _forgotten(tasks: list[str], kept: list[str]) -> dict[str, Value]:
    """The bars of forgetting: their titles and values."""
    return {name: _at("forgotten", name) for name in kept} | {
        f"{name}\nafter {tasks[-1]}": _at("forgotten", name) for name in tasks[:-1]
    }


def _bars(axis: Any, groups: Rows, values: dict[str, Value]) -> None:
    width = 0.8 / max(1, len(groups))
    numbers = nth(list(groups))
    for i, (label, rows) in enumerate(groups.items()):
        hatch = HATCHES[numbers[label] % len(HATCHES)]
        style: dict[str, Any] = {"color": colour(label), "hatch": hatch, "edgecolor": "white", "linewidth": 0.0}
        for j, value in enumerate(values.values()):
            result = interval(value(row) for row in rows)
            if result is None:
                continue
            where = j + (i - (len(groups) - 1) / 2) * width
            axis.bar(where, result["mean"], 0.92 * width, yerr=half_of(result), capsize=2, label=label, **style)
    axis.set_xticks(range(len(values)), list(values), rotation=30 if len(values) > 4 else 0)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("nats per token")


def _curves(axis: Any, groups: Rows, tasks: list[str]) -> None:
    """Training loss over all tasks in a row: each method's mean over its seeds."""
    ends: list[int] = []
    numbers = nth(list(groups))
    for label, rows in groups.items():
        start = 0
        for j in range(len(tasks)):
            runs = [row["tasks"][j]["loss"] for row in rows if j < len(row["tasks"])]
            average = [math.nan if (m := mean(column)) is None else m for column in zip_longest(*runs)]
            steps = range(start + 1, start + len(average) + 1)
            axis.plot(steps, average, color=colour(label), linewidth=0.7, alpha=0.35)
            style = {"linestyle": STYLES[numbers[label] % len(STYLES)], "label": label if j == 0 else None}
            axis.plot(steps, smooth(average), color=colour(label), linewidth=1.6, **style)
            start += len(average)
            ends = ends if j < len(ends) else [*ends, start]
            ends[j] = max(ends[j], start)
    for end in ends[:-1]:
        axis.axvline(end + 0.5, color="black", linewidth=0.8, linestyle=":")
    for begin, end, task in zip([0, *ends], ends, tasks, strict=False):
        axis.annotate(
            task, ((begin + end) / 2 + 0.5, 1.0), xycoords=("data", "axes fraction"), ha="center", va="bottom"
        )
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("training loss, nats per token")


def smooth(values: list[float]) -> list[float]:
    """Mean over up to WINDOW values around each one."""
    half = WINDOW // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
