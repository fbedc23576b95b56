"""compare.png: what each method forgot, what it learnt, how its loss fell. pareto.png: learnt against forgotten."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .metrics import drift_and_forgetting, front, main_rows, names, trajectory, whole
from .results import by_label
from .stats import half_of, interval, mean

#: Okabe and Ito's palette: told apart by colour-blind readers, and in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
#: Steps that a bold loss curve averages over; the thin one behind it does not.
WINDOW = 5
MARKS = ("o", "s", "^", "D")
STYLES = ("-", "--", ":", "-.")
Rows = dict[str, list[dict[str, Any]]]
Value = Callable[[dict[str, Any]], float | None]


def draw(results: dict[str, Any]) -> bytes:
    """The figure as PNG bytes. It needs no display and leaves no state in matplotlib behind."""
    groups = by_label(results)
    tasks, kept = names(results)
    figure = Figure(figsize=(max(11.0, 0.22 * len(groups) * (len(tasks) + len(kept))), 7.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, width_ratios=(max(1, len(kept) + len(tasks) - 1), len(tasks)))
    forgotten = figure.add_subplot(grid[0, 0])
    learnt = figure.add_subplot(grid[0, 1])
    curves = figure.add_subplot(grid[1, :])
    _bars(
        forgotten,
        groups,
        {
            **{name: _at("forgotten", name) for name in kept},
            **{f"{name}\nafter {tasks[-1]}": _at("forgotten", name) for name in tasks[:-1]},
        },
    )
    forgotten.set_title("forgotten: rise of the loss (lower is better)")
    _bars(learnt, groups, {name: _at("learnt", name) for name in tasks})
    learnt.set_title("learnt: fall of the loss (higher is better)")
    _curves(curves, groups, tasks)
    handles, labels = curves.get_legend_handles_labels()
    if handles:
        curves.legend(handles, labels, frameon=False, ncols=min(6, len(labels)), loc="upper right")
    model, device = results["model"]["name"], results["machine"]["device"]
    figure.suptitle(f"{model}, {results['options']['steps']} steps a task, {device}")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()


def draw_pareto(results: dict[str, Any]) -> bytes | None:
    """Learnt against forgotten along training and over a sweep, and drift against forgetting; None without rows."""
    tasks, kept = names(results)
    points = front(results)
    if not points:
        return None
    figure = Figure(figsize=(12, 6), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    colours: dict[str, str] = {}
    for point in points:
        colours.setdefault(point["family"], COLOURS[len(colours) % len(COLOURS)])
    marks = {family: MARKS[i // len(COLOURS) % len(MARKS)] for i, family in enumerate(colours)}
    groups: Rows = {}
    for row in whole(main_rows(results)):
        groups.setdefault(row["label"], []).append(row)
    for label, rows in groups.items():
        curves = [trajectory(row, results["base"], tasks, kept) for row in rows]
        length = min(map(len, curves))
        mean = [[sum(c[i][part] for c in curves) / len(curves) for i in range(length)] for part in ("learnt", "kept")]
        left.plot(*mean, color=colours[label], linewidth=1.0, alpha=0.6)
    for point in points:
        main = point["family"] == point["label"]
        x, y = point["learnt"], point["forgotten"]
        left.errorbar(
            x["mean"],
            y["mean"],
            xerr=half_of(x),
            yerr=half_of(y),
            color=colours[point["family"]],
            marker=marks[point["family"]],
            markersize=8 if main else 4,
            markerfacecolor=colours[point["family"]] if main else "white",
            linewidth=0.8,
            capsize=2,
            label=point["label"] if main else None,
            linestyle="none",
        )
    best = sorted((p["learnt"]["mean"], p["forgotten"]["mean"]) for p in points if p["front"])
    left.plot([p[0] for p in best], [p[1] for p in best], color="black", linewidth=0.8, linestyle=":")
    left.set_xlabel("learnt: sum over tasks of the fall of the loss (more to the right is better)")
    left.set_ylabel("forgotten: mean rise on kept texts (lower is better)")
    left.set_title("lines: along training; hollow: other weights; dotted: Pareto front")
    left.legend(frameon=False, fontsize=8)
    for row in whole(results["rows"]):
        if row["drift"] is not None:
            family = row.get("family") or row["label"]
            right.plot(row["drift"], row["forgotten_mean"], marks[family], color=colours[family], markersize=5)
    about = drift_and_forgetting(results)
    r = about["pearson"]
    right.set_title(f"drift and forgetting, {about['runs']} runs" + ("" if r is None else f": r = {r:.2f}"))
    right.set_xlabel("drift: mean of ‖ΔW x‖ / ‖x‖ over layers, on kept texts")
    for axis in (left, right):
        axis.axhline(0, color="black", linewidth=0.8)
    return _png(figure)


def _at(part: str, name: str) -> Value:
    return lambda row: row[part].get(name)


def _bars(axis: Any, groups: Rows, values: dict[str, Value]) -> None:
    width = 0.8 / max(1, len(groups))
    for i, (label, rows) in enumerate(groups.items()):
        for j, value in enumerate(values.values()):
            result = interval(value(row) for row in rows)
            if result is None:
                continue
            where = j + (i - (len(groups) - 1) / 2) * width
            colour = COLOURS[i % len(COLOURS)]
            axis.bar(where, result["mean"], 0.92 * width, yerr=half_of(result), capsize=2, color=colour, label=label)
    axis.set_xticks(range(len(values)), list(values))
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set_ylabel("nats per token")


def _curves(axis: Any, groups: Rows, tasks: list[str]) -> None:
    """Training loss over all tasks in a row: each method's mean over its seeds."""
    ends: list[int] = []
    for i, (label, rows) in enumerate(groups.items()):
        start = 0
        for j in range(len(tasks)):
            runs = [row["tasks"][j]["loss"] for row in rows if j < len(row["tasks"])]
            average = [math.nan if (m := mean(column)) is None else m for column in zip_longest(*runs)]
            colour, style = COLOURS[i % len(COLOURS)], STYLES[i // len(COLOURS) % len(STYLES)]
            steps = range(start + 1, start + len(average) + 1)
            axis.plot(steps, average, color=colour, linewidth=0.7, alpha=0.35)
            shown = label if j == 0 else None
            axis.plot(steps, smooth(average), color=colour, linestyle=style, linewidth=1.6, label=shown)
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
    axis.set_ylabel(f"training loss, nats per token\n(bold: mean of {WINDOW} steps)")


def smooth(values: list[float]) -> list[float]:
    """Mean over up to WINDOW values around each one."""
    half = WINDOW // 2
    parts = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]
