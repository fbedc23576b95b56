"""A comparison for the repository: a Markdown page that says what was found, and a smaller results file."""

from __future__ import annotations

import copy
import re
import statistics
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .metrics import ALMOST_ALL, ENOUGH, summary
from .plots import draw, draw_pareto
from .report import Table, between, drift_sentence, further_tables, main_table, settings_table


def published(results: dict[str, Any]) -> dict[str, Any]:
    """The results without folders, rounded to five digits, the drift of single layers as means over seeds."""
    found = copy.deepcopy(results)
    found["command"] = command_of(results)
    layers: dict[str, dict[str, list[float]]] = {}
    for row in found["rows"]:
        for stage in row["stages"]:
            each = stage.pop("drift_layers", {})
            if stage is row["stages"][-1] and not row.get("family"):
                for name, value in each.items():
                    layers.setdefault(row["label"], {}).setdefault(name, []).append(value)
        row.pop("adapter", None)
    if layers:
        found["drift_layers"] = {
            label: {name: statistics.fmean(values) for name, values in of.items()} for label, of in layers.items()
        }
    found = rounded(found)
    return {**found, "summary": rounded(summary(found))}  # of the rounded rows: anyone can make it again


def rounded(value: Any) -> Any:
    """Numbers with five significant digits."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return value


def command_of(results: dict[str, Any]) -> str:
    """The command without the folder it wrote to."""
    return re.sub(r" --(?:out[ =]\S+|any-commit|fresh)(?= |$)", "", results["command"])


def markdown(table: Table) -> str:
    """A table in Markdown: the first column to the left, figures to the right."""
    bar = ["---"] + ["---:"] * (len(table.columns) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [table.columns, bar, *table.rows])


def verdicts(found: dict[str, Any]) -> list[str]:
    """One sentence per method, from the intervals alone: a difference is claimed only where they exclude none."""
    lora = found["baseline"]
    paired = {row["label"]: row for row in found["paired_with_baseline"]}
    lines = []
    for row in found["equal_learning"]:
        label = row["label"]
        said = [_said(row["kept"], "the kept texts", lora), _said(row["tasks"], "earlier tasks", lora)]
        text = f"**{label}**: " + "; ".join(filter(None, said))
        learnt = paired[label]["learnt"]
        if learnt["high"] is not None and learnt["high"] < 0:
            text += f"; in the same number of steps it learnt less ({between(learnt, 2, sign=True)} nats)"
        elif learnt["low"] is not None and learnt["low"] > 0:
            text += f"; in the same number of steps it learnt more ({between(learnt, 2, sign=True)} nats)"
        if not row["enough"]:
            text += (
                f"; it learnt so little that this compares it at {row['share']['mean']:.0%} of {lora}'s learning only"
            )
        lines.append(text + ".")
    return lines


def _said(part: dict[str, Any], what: str, lora: str) -> str:
    difference, ratio = part["difference"], part["ratio"]
    if difference is None:
        return ""
    if difference["low"] is None:
        return f"on {what} {between(difference, 3, sign=True)} nats against {lora}, one seed: no claim"
    size = f"{between(difference, 3, sign=True)} nats" + (f", {between(ratio)} times" if ratio else "")
    if difference["high"] < 0:
        return f"forgets {what} less than {lora} at equal learning ({size})"
    if difference["low"] > 0:
        return f"forgets {what} more than {lora} at equal learning ({size})"
    return f"no difference to {lora} is shown on {what} ({size})"


def page(results: dict[str, Any], picture: str, data: str | None) -> str:
    """The whole page; ``picture`` and ``data`` are file names to refer to."""
    found = summary(results)
    options, machine = results["options"], results["machine"]
    tasks = [d for d in results["domains"] if d["role"] == "task"]
    kept = [d for d in results["domains"] if d["role"] == "kept"]
    source = options.get("source")
    unseen = [d["name"] for d in kept if source is not None and d["name"] not in source]
    seconds = sum(row["seconds"] for row in results["rows"])
    tables = "\n\n".join(f"## {title[0].upper() + title[1:]}\n\n{markdown(t)}" for title, t in further_tables(results))
    missing = "" if results["complete"] else "\n**This run is not complete: rows are missing.**\n"
    tuned = [
        f"- {t['family']}: {t['best']['label']} ({t['best']['learnt']:.2f} nats learnt, {t['best']['forgotten']:+.3f} "
        "forgotten)"
        if t["best"]
        else f"- {t['family']}: none of {t['settings']} settings learnt that much"
        for t in found["tuned"]
    ]
    tuning = (
        f"\n## Tuned weights\n\nOf each method the setting that forgets least on the kept texts among those that "
        f"learnt at least {ALMOST_ALL:.0%} of what {found['baseline']} did, with the seeds of the sweep alone "
        f"({', '.join(map(str, options.get('sweep_seeds') or options['seeds']))}):\n\n" + "\n".join(tuned) + "\n"
        if tuned
        else ""
    )
    words = "\n".join(f"- {line}" for line in verdicts(found)) or "- Nothing to compare with plain LoRA."
    return f"""# What was learnt, and what was forgotten

Written by `forgetless report`{f" from `{data}`" if data else ""}; no figure here was typed by hand.
{missing}
{results["model"]["name"]} ({results["model"]["parameters"]:,} parameters, {options["dtype"]}) learns
{len(tasks)} tasks in a row ({", ".join(d["name"] for d in tasks)}), {options["steps"]} steps each of
{options["batch_size"]} examples, with each method and {len(options["seeds"])} seeds. Held out and never trained on:
{", ".join(d["name"] for d in kept)}. {
        f"Methods that calibrate do so on the training part of {', '.join(source)}; "
        f"{', '.join(unseen)} are unseen by every method."
        if source is not None
        else "Methods that calibrate do so on the training part of these."
    } Losses are nats per token. These are short runs of a small model: what they show is shown for
this setting.

## In short

{words}
- {drift_sentence(results) or "Too few runs to correlate drift with forgetting."}

![learnt against forgotten, drift against forgetting]({picture})

## Each method

{markdown(main_table(results))}

± and the ranges in brackets are 95 % t-intervals over seeds (with three seeds t is 4.3, so they are wide). `learnt`:
loss when the task had just been trained, and its change from the base; the columns of kept texts: loss at the end and
its rise; `forgetting`: mean rise over kept texts; `drift`: mean of ‖ΔW x‖ / ‖x‖ over layers on kept texts.

{tables}
{tuning}
## How it is compared

- *Equal learning*: learning is the sum over tasks of the fall of the held-out loss (a finished task counts as it was
  when just learnt). All is evaluated {options.get("evals", 1)} times per task, which gives one curve of forgetting
  against learning per run. Each method's curve and that of {found["baseline"]} with the same seed are read at the
  greatest learning that both reached, where each first reaches it, linear between evaluations. Ratios are taken per
  seed, then averaged; (!) marks methods compared below {ENOUGH:.0%} of {found["baseline"]}'s learning. A dash: LoRA
  had nothing to forget there.
- *Backward and forward transfer* are those of Lopez-Paz and Ranzato (2017), *forgetting of tasks* that of Chaudhry et
  al. (2018), on losses with the sign turned so that more transfer is better, and on next-token accuracies.
- *consolidate*: between tasks the update is folded into the base and the adapter starts afresh; statistics of the
  learnt task are added to those of the source texts. *full*: every weight is trained (float32 copies, AdamW).
- Drift counts the whole change since the untouched base, what was folded or trained in place included.

## Settings

{markdown(settings_table(results))}

{results["model"]["name"]}; {machine["processor"]}, {machine["threads"]} threads, torch {results["versions"]["torch"]},
transformers {results["versions"].get("transformers", "?")}; {len(results["rows"])} runs, {seconds / 3600:.1f} hours;
commit {", ".join(c[:7] for c in results.get("commits", [])) or "unknown"}. Again:

```
{command_of(results)}
```
"""


def write_page(path: Path, results: dict[str, Any], data: str | None) -> list[Path]:
    """The page and its picture beside it."""
    picture = path.with_suffix(".png")
    write_atomically(picture, draw_pareto(results) or draw(results))
    write_atomically(path, page(results, picture.name, data))
    return [path, picture]
