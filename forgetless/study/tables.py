"""The tables of a comparison, and how a table is written: on the terminal, as HTML, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

from rich import box
from rich.markup import escape as plain_markup
from rich.table import Table as RichTable

from .metrics import names, summary
from .results import by_label
from .stats import half_of, interval, minus
from .stats import mean as average

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is aligned to the left, figures to the right. ``best`` are marked: (row, column)."""

    columns: list[str]
    rows: list[list[str]]
    best: frozenset[tuple[int, int]] = frozenset()

    def rich(self, title: str | None = None) -> RichTable:
        """For the terminal; the best in bold."""
        shown = RichTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for i, column in enumerate(self.columns):
            shown.add_column(plain_markup(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
        for i, row in enumerate(self.rows):
            cells = [plain_markup(cell) for cell in row]
            shown.add_row(*(f"[bold]{cell}[/bold]" if (i, j) in self.best else cell for j, cell in enumerate(cells)))
        return shown

    def html(self, words: bool = False, swatch: Callable[[str], str] | None = None) -> str:
        """With escaped cells, the name of its column with each: a narrow screen shows a row as a list.

        Args:
            words: every column to the left.
            swatch: the colour of a row, by its first cell.
        """
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        lines = []
        for i, row in enumerate(self.rows):
            cells = []
            for j, (column, cell) in enumerate(zip(self.columns, row, strict=True)):
                square = f'<i style="background:{swatch(cell)}"></i>' if j == 0 and swatch else ""
                kind = "best" if (i, j) in self.best else "none" if cell == NOTHING else ""
                kind = f' class="{kind}"' if kind else ""
                cells.append(f'<td{kind} data-label="{escape(column)}">{square}{escape(cell)}</td>')
            lines.append(f"<tr>{''.join(cells)}</tr>")
        kind = ' class="words"' if words else ""
        return f'<div class="wide"><table{kind}><tr>{head}</tr>\n{chr(10).join(lines)}</table></div>'

    def markdown(self) -> str:
        """As a Markdown table, the best in bold."""
        bar = ["---"] + ["---:"] * (len(self.columns) - 1)
        rows = [
            [f"**{cell}**" if (i, j) in self.best else cell for j, cell in enumerate(row)]
            for i, row in enumerate(self.rows)
        ]
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.columns, bar, *rows])


def figure(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def change(values: list[float | None], digits: int = 3) -> str:
    """Mean change with its sign and, of several seeds, half its 95 % t-interval."""
    result = interval(values)
    if result is None:
        return NOTHING
    half = half_of(result)
    return f"{result['mean']:+.{digits}f}" + (f" ±{half:.{digits}f}" if half is not None else "")


def mean(values: list[float | None], digits: int = 2) -> str:
    """Mean of what is known, or a dash."""
    result = interval(values)
    return figure(None if result is None else result["mean"], digits)


def between(figures: dict[str, Any] | None, digits: int = 2, sign: bool = False) -> str:
    """A mean and its interval from ``stats.interval``: "0.33 (0.21 to 0.45)"."""
    if figures is None:
        return NOTHING
    form = f"{'+' if sign else ''}.{digits}f"
    shown = f"{figures['mean']:{form}}"
    return shown if figures["low"] is None else f"{shown} ({figures['low']:{form}} to {figures['high']:{form}})"


#: A column of the main table: its title, the base's cell, the cell of a method from its rows of all seeds, and what
#: is lowest in the best of them (None: no better or worse).
Seeds = list[dict[str, Any]]
Column = tuple[str, str, Callable[[Seeds], str], "Callable[[Seeds], float | None] | None"]


def main_table(results: dict[str, Any]) -> Table:
    """One row for the base and one per method: loss and its change per domain, and what it cost."""
    columns = main_columns(results)
    groups = {
        label + ("" if all(row["stopped"] == "finished" for row in seeds) else " (diverged)"): seeds
        for label, seeds in by_label(results).items()
    }
    rows = [["base", *(base for _, base, _, _ in columns)]]
    rows += [[label, *(cell(seeds) for *_, cell, _ in columns)] for label, seeds in groups.items()]
    best = set()
    for j, (*_, low) in enumerate(columns, start=1):
        values = {i: low(seeds) for i, seeds in enumerate(groups.values(), start=1)} if low else {}
        known = {i: value for i, value in values.items() if value is not None}
        if len(set(known.values())) > 1:
            best |= {(i, j) for i, value in known.items() if value == min(known.values())}
    return Table(["method", *(title for title, *_ in columns)], rows, frozenset(best))


def main_columns(results: dict[str, Any]) -> list[Column]:
    """The columns beside the method's name."""
    tasks, kept = names(results)
    base = results["base"]

    def loss(name: str) -> str:
        return figure(base["losses"].get(name))

    def low(*path: str) -> Callable[[Seeds], float | None]:
        return lambda seeds: average(_at(row, path) for row in seeds)

    columns: list[Column] = [
        (f"{task} learned", loss(task), partial(_learned, task=task), low("when_learnt", task)) for task in tasks
    ]
    columns += [
        (f"{task} at the end", NOTHING, partial(_after, name=task, digits=2), low("final", task)) for task in tasks[:-1]
    ]
    columns += [(name, loss(name), partial(_after, name=name, digits=3), low("final", name)) for name in kept]
    if "facts" in base:
        columns.append(("facts", "/".join(map(str, base["facts"])), _facts, lambda seeds: minus(0.0, _right(seeds))))
    columns += [
        ("forgetting", NOTHING, lambda s: change([row["forgotten_mean"] for row in s]), low("forgotten_mean")),
        ("drift", NOTHING, lambda s: mean([row["drift"] for row in s], 3), None),
        ("trainable", NOTHING, lambda s: f"{s[0]['trainable']:,}", None),
        ("s/step", NOTHING, lambda s: mean([row["seconds_per_step"] for row in s]), low("seconds_per_step")),
        ("peak MiB", NOTHING, lambda s: mean([row["peak_mib"] for row in s], 0), low("peak_mib")),
    ]
    return columns


def _at(row: dict[str, Any], path: tuple[str, ...]) -> float | None:
    value: Any = row
    for name in path:
        value = None if value is None else value.get(name)
    return value


def _learned(seeds: Seeds, task: str) -> str:
    after = mean([row["when_learnt"].get(task) for row in seeds])
    return f"{after} ({change([minus(0.0, row['learnt'].get(task)) for row in seeds], 2)})"


def _after(seeds: Seeds, name: str, digits: int) -> str:
    loss = mean([row["final"].get(name) for row in seeds])
    return f"{loss} ({change([row['forgotten'].get(name) for row in seeds], digits)})"


def _right(seeds: Seeds) -> float | None:
    return average(row["stages"][-1]["facts"][0] for row in seeds if row["stages"])


def _facts(seeds: Seeds) -> str:
    right = _right(seeds)
    if right is None:
        return NOTHING
    asked = next(row["stages"][-1]["facts"][1] for row in seeds if row["stages"])
    return f"{right:g}/{asked}" if right == int(right) else f"{right:.1f}/{asked}"


def settings_table(results: dict[str, Any]) -> Table:
    """What each method ran with."""
    rows = []
    for label, seeds in by_label(results).items():
        settings = {k: v for k, v in seeds[0]["settings"].items() if k != "penalties" or v}
        text = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in settings.items())
        rows.append([label, ", ".join(str(row["seed"]) for row in seeds), text])
    return Table(["method", "seeds", "settings"], rows)


def domains_table(results: dict[str, Any]) -> Table:
    """The texts, where they are from and under which licence."""
    keys = ("name", "role", "title", "train", "held_out", "source", "licence")
    return Table([k.replace("_", " ") for k in keys], [[str(d[k]) for k in keys] for d in results["domains"]])


def further_tables(results: dict[str, Any]) -> list[tuple[str, Table]]:
    """What only several tasks, seeds, evaluations or weights can tell; a table is left out where it would be empty."""
    result = results.get("summary") or summary(results)
    tasks, _ = names(results)
    tables = []
    if len(tasks) > 1 and result["continual"]:
        tables.append(("the task sequence", sequence_table(result)))
    if result["paired_with_baseline"] and len(results["options"]["seeds"]) > 1:
        tables.append((f"differences to {result['baseline']} with the same seed", paired_table(result)))
    if result["equal_learning"] and any(row.get("points") for row in results["rows"]):
        tables.append((f"against {result['baseline']} at equal learning", equal_table(result)))
    if result["tuned"]:
        tables.append(("learned and forgotten over the sweep", sweep_table(result)))
    return tables


def sequence_table(figures: dict[str, Any]) -> Table:
    """Continual-learning metrics of each method."""
    keys = ("final", "backward_transfer", "forward_transfer", "forgetting")
    columns = ["method", "mean loss at the end", "backward transfer", "forward transfer", "forgetting of tasks"]
    rows = [
        [label, *(between(of["losses"][key], 3, sign=key != "final") for key in keys)]
        for label, of in figures["continual"].items()
    ]
    scores = [of["accuracies"] for of in figures["continual"].values()]
    if any(score["final"] for score in scores):
        columns += ["mean accuracy at the end", "its backward transfer"]
        for row, score in zip(rows, scores, strict=True):
            row += [between(score["final"], 3), between(score["backward_transfer"], 3, sign=True)]
    return Table(columns, rows)


def paired_table(figures: dict[str, Any]) -> Table:
    """Differences to plain LoRA, seed by seed."""
    keys = ("learnt", "forgotten", "tasks", "drift")
    columns = ["method", "learned, all tasks", "forgotten, kept texts", "forgotten, earlier tasks", "drift"]
    paired = figures["paired_with_baseline"]
    rows = [[row["label"], *(between(row[key], 3, sign=True) for key in keys)] for row in paired]
    return Table(columns, rows)


def equal_table(figures: dict[str, Any]) -> Table:
    """Forgetting where a method and plain LoRA had learned the same."""
    columns = ["method", "learning compared at", "kept texts", f"{figures['baseline']} there", "ratio"]
    columns += ["earlier tasks", f"{figures['baseline']} there ", "ratio "]
    rows = []
    for row in figures["equal_learning"]:
        share = f"{100 * row['share']['mean']:.0f} % of {figures['baseline']}'s" + ("" if row["enough"] else " (!)")
        cells = [row["label"], share]
        for part in ("kept", "tasks"):
            both = row[part]
            cells += [between(both["method"], 3), between(both["lora"], 3), between(both["ratio"])]
        rows.append(cells)
    return Table(columns, rows)


def sweep_table(figures: dict[str, Any]) -> Table:
    """Every setting with what it learned and forgot; a star marks the Pareto front."""
    points = sorted(figures["front"], key=lambda p: (p["family"], p["learnt"]["mean"]))
    best = {t["best"]["label"] for t in figures["tuned"] if t["best"]}
    rows = [
        [
            point["label"] + (" *" if point["front"] else ""),
            between(point["learnt"], 2),
            between(point["forgotten"], 3, sign=True),
            str(point["learnt"]["n"]),
            "yes" if point["label"] in best else "",
        ]
        for point in points
    ]
    return Table(
        ["method (* on the Pareto front)", "learned, all tasks", "forgotten, kept texts", "seeds", "tuned"], rows
    )
