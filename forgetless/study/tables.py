"""The tables of a comparison, and how a table is written: on the terminal, as HTML, as Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

from rich import box
from rich.markup import escape as plain_markup
from rich.table import Table as RichTable

from .metrics import names, summary
from .results import by_label
from .stats import half_of, interval, minus

NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Text cells; the first column is aligned to the left, figures to the right."""

    columns: list[str]
    rows: list[list[str]]

    def rich(self, title: str | None = None) -> RichTable:
        """For the terminal."""
        shown = RichTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
        for i, column in enumerate(self.columns):
            shown.add_column(plain_markup(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
        for row in self.rows:
            shown.add_row(*map(plain_markup, row))
        return shown

    def html(self, words: bool = False) -> str:
        """With escaped cells; ``words``: every column to the left."""
        head = "".join(f"<th>{escape(c)}</th>" for c in self.columns)
        body = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in self.rows)
        return f"<table{' class=words' if words else ''}><tr>{head}</tr>\n{body}</table>"

    def markdown(self) -> str:
        """As a Markdown table."""
        bar = ["---"] + ["---:"] * (len(self.columns) - 1)
        return "\n".join("| " + " | ".join(row) + " |" for row in [self.columns, bar, *self.rows])


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


def main_table(results: dict[str, Any]) -> Table:
    """One row for the base and one per method: loss and its change per domain, and what it cost."""
    tasks, kept = names(results)
    base = results["base"]
    with_facts = "facts" in base
    columns = ["method"]
    columns += [f"{task} learnt" for task in tasks]
    columns += [f"{task} at the end" for task in tasks[:-1]]
    columns += kept + (["facts"] if with_facts else [])
    columns += ["forgetting", "drift", "trainable", "s/step", "peak MiB"]
    first = ["base"] + [figure(base["losses"].get(task)) for task in tasks] + [NOTHING] * len(tasks[:-1])
    first += [figure(base["losses"].get(name)) for name in kept]
    first += ["/".join(map(str, base["facts"]))] if with_facts else []
    rows = [first + [NOTHING] * 5]
    for label, seeds in by_label(results).items():
        diverged = any(row["stopped"] != "finished" for row in seeds)
        cells = [label + (" (diverged)" if diverged else "")]
        for task in tasks:
            after = mean([row["when_learnt"].get(task) for row in seeds])
            cells.append(f"{after} ({change([minus(0.0, row['learnt'].get(task)) for row in seeds], 2)})")
        for task in tasks[:-1]:
            cells.append(_after(seeds, task, 2))
        cells += [_after(seeds, name, 3) for name in kept]
        if with_facts:
            cells.append(_facts(seeds))
        cells += [
            change([row["forgotten_mean"] for row in seeds]),
            mean([row["drift"] for row in seeds], 3),
            f"{seeds[0]['trainable']:,}",
            mean([row["seconds_per_step"] for row in seeds]),
            mean([row["peak_mib"] for row in seeds], 0),
        ]
        rows.append(cells)
    return Table(columns, rows)


def _after(seeds: list[dict[str, Any]], name: str, digits: int) -> str:
    loss = mean([row["final"].get(name) for row in seeds])
    return f"{loss} ({change([row['forgotten'].get(name) for row in seeds], digits)})"


def _facts(seeds: list[dict[str, Any]]) -> str:
    counts = [row["stages"][-1]["facts"] for row in seeds if row["stages"]]
    if not counts:
        return NOTHING
    right = sum(c[0] for c in counts) / len(counts)
    return f"{right:g}/{counts[0][1]}" if right == int(right) else f"{right:.1f}/{counts[0][1]}"


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
        tables.append(("learnt and forgotten over the sweep", sweep_table(result)))
    return tables


def sequence_table(figures: dict[str, Any]) -> Table:
    """Continual-learning metrics of each method."""
    keys = ("final", "backward_transfer", "forward_transfer", "forgetting")
    columns = ["method", "mean loss at the end", "backward transfer", "forward transfer", "forgetting of tasks"]
    columns += ["mean accuracy at the end", "its backward transfer"]
    rows = [
        [label]
        + [between(of["losses"][key], 3, sign=key != "final") for key in keys]
        + [between(of["accuracies"]["final"], 3), between(of["accuracies"]["backward_transfer"], 3, sign=True)]
        for label, of in figures["continual"].items()
    ]
    return Table(columns, rows)


def paired_table(figures: dict[str, Any]) -> Table:
    """Differences to plain LoRA, seed by seed."""
    keys = ("learnt", "forgotten", "tasks", "drift")
    columns = ["method", "learnt, all tasks", "forgotten, kept texts", "forgotten, earlier tasks", "drift"]
    paired = figures["paired_with_baseline"]
    rows = [[row["label"], *(between(row[key], 3, sign=True) for key in keys)] for row in paired]
    return Table(columns, rows)


def equal_table(figures: dict[str, Any]) -> Table:
    """Forgetting where a method and plain LoRA had learnt the same."""
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
    """Every setting with what it learnt and forgot; a star marks the Pareto front."""
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
        ["method (* on the Pareto front)", "learnt, all tasks", "forgotten, kept texts", "seeds", "tuned"], rows
    )
