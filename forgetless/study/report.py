"""A comparison for people: the tables on the terminal, and report.html, one file that opens from disk."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape as plain_markup
from rich.table import Table as RichTable

from ..files import write_atomically
from .metrics import ALMOST_ALL, drift_and_forgetting, summary
from .plots import draw, draw_pareto
from .results import by_label
from .stats import half_width, interval

PICTURE, PARETO, PAGE = "compare.png", "pareto.png", "report.html"
NOTHING = "–"


@dataclass(frozen=True)
class Table:
    """Text cells, ready for any kind of output."""

    columns: list[str]
    rows: list[list[str]]


def figure(value: float | None, digits: int = 2) -> str:
    """A number, or a dash where there is none."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def change(values: list[float | None], digits: int = 3) -> str:
    """Mean change with its sign and, of several seeds, half its 95 % t-interval."""
    found = interval(values)
    if found is None:
        return NOTHING
    half = half_width(values)
    return f"{found['mean']:+.{digits}f}" + (f" ±{half:.{digits}f}" if half is not None else "")


def mean(values: list[float | None], digits: int = 2) -> str:
    """Mean of what is known, or a dash."""
    found = interval(values)
    return figure(None if found is None else found["mean"], digits)


def between(found: dict[str, Any] | None, digits: int = 2, sign: bool = False) -> str:
    """A mean and its interval from ``stats.interval``: "0.33 (0.21 to 0.45)"."""
    if found is None:
        return NOTHING
    form = f"{'+' if sign else ''}.{digits}f"
    shown = f"{found['mean']:{form}}"
    return shown if found["low"] is None else f"{shown} ({found['low']:{form}} to {found['high']:{form}})"


def main_table(results: dict[str, Any]) -> Table:
    """One row for the base and one per method: loss and its change per domain, and what it cost."""
    tasks = [d["name"] for d in results["domains"] if d["role"] == "task"]
    kept = [d["name"] for d in results["domains"] if d["role"] == "kept"]
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
            cells.append(f"{after} ({change([_negative(row['learnt'].get(task)) for row in seeds], 2)})")
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


def _negative(value: float | None) -> float | None:
    return None if value is None else -value


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
    found = results.get("summary") or summary(results)
    tasks = [d["name"] for d in results["domains"] if d["role"] == "task"]
    tables = []
    if len(tasks) > 1 and found["continual"]:
        tables.append(("the task sequence", sequence_table(found)))
    if found["paired_with_baseline"] and len(results["options"]["seeds"]) > 1:
        tables.append((f"differences to {found['baseline']} with the same seed", paired_table(found)))
    if found["equal_learning"] and any(row.get("points") for row in results["rows"]):
        tables.append((f"against {found['baseline']} at equal learning", equal_table(found)))
    if found["tuned"]:
        tables.append(("learnt and forgotten over the sweep", sweep_table(found)))
    return tables


def sequence_table(found: dict[str, Any]) -> Table:
    """Continual-learning metrics of each method."""
    keys = ("final", "backward_transfer", "forward_transfer", "forgetting")
    columns = ["method", "mean loss at the end", "backward transfer", "forward transfer", "forgetting of tasks"]
    columns += ["mean accuracy at the end", "its backward transfer"]
    rows = [
        [label]
        + [between(of["losses"][key], 3, sign=key != "final") for key in keys]
        + [between(of["accuracies"]["final"], 3), between(of["accuracies"]["backward_transfer"], 3, sign=True)]
        for label, of in found["continual"].items()
    ]
    return Table(columns, rows)


def paired_table(found: dict[str, Any]) -> Table:
    """Differences to plain LoRA, seed by seed."""
    keys = ("learnt", "forgotten", "tasks", "drift")
    columns = ["method", "learnt, all tasks", "forgotten, kept texts", "forgotten, earlier tasks", "drift"]
    rows = [[row["label"], *(between(row[key], 3, sign=True) for key in keys)] for row in found["paired_with_baseline"]]
    return Table(columns, rows)


def equal_table(found: dict[str, Any]) -> Table:
    """Forgetting where a method and plain LoRA had learnt the same."""
    columns = ["method", "learning compared at", "kept texts", f"{found['baseline']} there", "ratio"]
    columns += ["earlier tasks", f"{found['baseline']} there ", "ratio "]
    rows = []
    for row in found["equal_learning"]:
        share = f"{100 * row['share']['mean']:.0f} % of {found['baseline']}'s" + ("" if row["enough"] else " (!)")
        cells = [row["label"], share]
        for part in ("kept", "tasks"):
            both = row[part]
            cells += [between(both["method"], 3), between(both["lora"], 3), between(both["ratio"])]
        rows.append(cells)
    return Table(columns, rows)


def sweep_table(found: dict[str, Any]) -> Table:
    """Every setting with what it learnt and forgot; a star marks the Pareto front."""
    points = sorted(found["front"], key=lambda p: (p["family"], p["learnt"]["mean"]))
    best = {t["best"]["label"] for t in found["tuned"] if t["best"]}
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


def drift_sentence(results: dict[str, Any]) -> str:
    """Whether drift went with forgetting over all runs."""
    about = drift_and_forgetting(results)
    if about["pearson"] is None:
        return ""
    text = (
        f"Over {about['runs']} runs drift and forgetting of kept texts correlate with r = {about['pearson']:.2f} "
        f"(ranks: {about['spearman']:.2f})."
    )
    if about["explained_by_method"] is not None:
        text += (
            f" A straight line in drift explains {100 * about['explained_by_drift']:.0f} % of the variance of "
            f"forgetting, the method's name alone {100 * about['explained_by_method']:.0f} % (both adjusted for the "
            "number of parameters)."
        )
    return text


def rich_table(table: Table, title: str | None = None) -> RichTable:
    """For the terminal."""
    shown = RichTable(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left")
    for i, column in enumerate(table.columns):
        shown.add_column(plain_markup(column), justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in table.rows:
        shown.add_row(*map(plain_markup, row))
    return shown


HOW_TO_READ = """
Every number is a mean negative log-likelihood in nats per token on held-out text; e<sup>0.1</sup> is about 11 %
more perplexity. <b>Learnt</b> is the loss on a task right after it was trained, with its change from the base in
brackets: more negative is better. <b>At the end</b> is the loss on an earlier task after all later ones, with what
was lost since it was learnt. The columns of kept texts show the loss at the end and its rise over the base: that
is <b>forgetting</b>, and nearer to zero is better; the column of that name is its mean over the kept texts.
<b>Facts</b> are short sentences that the model must still complete. <b>Drift</b> is the mean of &#8214;&#916;W
x&#8214; / &#8214;x&#8214; over layers and tokens of the kept texts: how far the layers' outputs moved there.
Compare forgetting only between methods that learnt about the same: one that learns nothing forgets nothing.
&plusmn; is half of a 95 % t-interval over seeds, and so are the ranges in brackets. One seed and a short run are a
demonstration, not a result to quote.
"""

HOW_SEQUENCE = """
<b>Backward transfer</b> (Lopez-Paz and Ranzato 2017) is what later tasks did to earlier ones, mean over these since
each was learnt; <b>forward transfer</b> what earlier tasks did to the next one before it was trained;
<b>forgetting of tasks</b> (Chaudhry et al. 2018) the distance of each earlier task from its best. All with the sign
that more transfer is better; accuracies are those of the likeliest next token. <b>At equal learning</b>: learning is
the sum over tasks of the fall of the loss, forgetting is followed along training, and both curves are read where they
first reach the greatest learning that both reached, linear between evaluations, seed by seed. A method that learnt
far less than LoRA (!) is compared at little learning only. <b>Tuned</b> is the setting of each method that forgets
least among those that learnt at least {almost:.0%} of what plain LoRA did.
"""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, table.words td, table.words th { text-align: left; }
table.words td { white-space: normal; }
th { border-bottom: 2px solid #888; } img { max-width: 100%; } p { max-width: 48rem; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; } .warn { color: #a30000; }
"""


def html_table(table: Table, words: bool = False) -> str:
    """A table as HTML; the cells are escaped."""
    head = "".join(f"<th>{escape(c)}</th>" for c in table.columns)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in row) + "</tr>" for row in table.rows)
    return f"<table{' class=words' if words else ''}><tr>{head}</tr>\n{body}</table>"


def html_page(results: dict[str, Any], picture: bytes, pareto: bytes | None = None) -> str:
    """The whole report; it refers to no other file."""
    model, machine = results["model"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    warning = "" if results["complete"] else _unfinished(results)
    tables = further_tables(results)
    about = Table(
        ["what", "value"],
        [
            ["model", f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}"],
            ["model source", f"{model['source']} (sha256 {model['sha256'] or 'not known'})"],
            ["machine", f"{machine['processor']}, {machine['cores']} cores, {machine['device']}"],
            ["threads", str(machine["threads"])],
            ["versions", versions],
            ["commit", results["commit"] or "not in a git checkout"],
            ["run at", results["created"]],
        ],
    )
    further = "".join(f"<h3>{escape(t[0].upper() + t[1:])}</h3>{html_table(table)}" for t, table in tables)
    second = f'<img alt="learnt against forgotten; drift against forgetting" src="{_inline(pareto)}">' if pareto else ""
    more = HOW_SEQUENCE.format(almost=ALMOST_ALL) if tables else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>forgetless: {escape(model["name"])}</title>
<style>{STYLE}</style></head><body>
<h1>What was learnt, and what was forgotten</h1>
{warning}
{html_table(main_table(results))}
<img alt="forgetting and learning per domain, and loss curves" src="{_inline(picture)}">
{further}
{second}
<p>{escape(drift_sentence(results))}</p>
<h2>How to read this</h2>
<p>{HOW_TO_READ}</p>
<p>{more}</p>
<h2>Settings</h2>
{html_table(settings_table(results), words=True)}
<h2>Texts</h2>
{html_table(domains_table(results), words=True)}
<h2>Where and with what</h2>
{html_table(about, words=True)}
<p>The same run again:</p>
<pre>{escape(results["command"])}</pre>
</body></html>
"""


def _inline(picture: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(picture).decode()}"


def _unfinished(results: dict[str, Any]) -> str:
    label = results.get("unfinished", {}).get("label")
    during = f" during {label}" if label else ""
    return f'<p class="warn">This run was stopped{escape(during)}: rows are missing.</p>'


def write_report(folder: Path, results: dict[str, Any]) -> list[Path]:
    """compare.png, pareto.png and report.html in ``folder``, from results alone."""
    picture, pareto = draw(results), draw_pareto(results)
    write_atomically(folder / PICTURE, picture)
    if pareto is not None:
        write_atomically(folder / PARETO, pareto)
    write_atomically(folder / PAGE, html_page(results, picture, pareto))
    return [folder / name for name in (PICTURE, *([PARETO] if pareto else []), PAGE)]
