"""A comparison for people: report.html, one file that opens from disk, and a Markdown page for the repository."""

from __future__ import annotations

import base64
import copy
import re
import statistics
from html import escape
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .metrics import ALMOST_ALL, ENOUGH, drift_and_forgetting, names, summary
from .plots import draw, draw_pareto
from .tables import Table, between, domains_table, further_tables, main_table, settings_table

PICTURE, PARETO, PAGE = "compare.png", "pareto.png", "report.html"

READING = """Losses are mean negative log-likelihoods in nats per token on held-out text; 0.1 nats are about 11 % more
perplexity. **learnt** is the loss on a task right after it was trained, with its change from the base in brackets:
more negative is better. **at the end** is the loss on an earlier task after all later ones, with its rise since it was
learnt. The columns of kept texts show the loss at the end and its rise over the base, nearer to zero is better;
**forgetting** is the mean of these rises. **facts** are short sentences that the model must still complete. **drift**
is the mean of ‖ΔW x‖ / ‖x‖ over layers and tokens of the kept texts; it counts every change since the untouched base,
what was folded or trained in place included. ± and the ranges in brackets are 95 % t-intervals over seeds. Compare
forgetting only between methods that learnt about the same: one that learns nothing forgets nothing. One seed and a
short run are a demonstration, not a result to quote."""

COMPARING = f"""**At equal learning**: learning is the sum over tasks of the fall of the held-out loss (a finished task
counts as it was when just learnt). Forgetting is followed along training. Each method's curve and that of plain LoRA
with the same seed are read at the greatest learning that both reached, where each first reaches it, linear between
evaluations. Ratios are taken per seed, then averaged; (!) marks methods compared below {ENOUGH:.0%} of LoRA's learning;
a dash means that LoRA had nothing to forget there. **Backward and forward transfer** are those of Lopez-Paz and Ranzato
(2017), **forgetting of tasks** is that of Chaudhry et al. (2018), on losses with the sign turned so that more transfer
is better, and on next-token accuracies. **consolidate**: between tasks the update is folded into the base, the adapter
starts afresh, and statistics of the learnt task are added to those of the source texts. **full**: every weight is
trained (float32 copies, AdamW). **tuned** is the setting of each method that forgets least on the kept texts among
those that learnt at least {ALMOST_ALL:.0%} of what plain LoRA did, with the seeds of the sweep alone."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child, td:first-child, table.words td, table.words th { text-align: left; }
table.words td { white-space: normal; }
th { border-bottom: 2px solid #888; } img { max-width: 100%; } p { max-width: 48rem; }
pre { background: #f4f4f4; padding: .7rem; overflow-x: auto; } .warn { color: #a30000; }
"""


def html_text(text: str) -> str:
    """A paragraph with Markdown's bold, as HTML."""
    return "<p>" + re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text, quote=False), flags=re.S) + "</p>"


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


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


def html_page(results: dict[str, Any], picture: bytes, pareto: bytes | None = None) -> str:
    """The whole report; it refers to no other file."""
    model, machine = results["model"], results["machine"]
    about = {
        "model": f"{model['name']}, {model['parameters']:,} parameters, {model['dtype']}",
        "model source": f"{model['source']} (sha256 {model['sha256'] or 'not known'})",
        "machine": f"{machine['processor']}, {machine['cores']} cores, {machine['device']}",
        "threads": str(machine["threads"]),
        "versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        "commit": results["commit"] or "not in a git checkout",
        "run at": results["created"],
    }
    tables = further_tables(results)
    label = results.get("unfinished", {}).get("label")
    during = f" during {escape(label)}" if label else ""
    parts = [
        "<h1>What was learnt, and what was forgotten</h1>",
        "" if results["complete"] else f'<p class="warn">This run was stopped{during}: rows are missing.</p>',
        main_table(results).html(),
        _image("forgetting and learning per domain, and loss curves", picture),
        *(f"<h3>{escape(capital(title))}</h3>{table.html()}" for title, table in tables),
        _image("learnt against forgotten; drift against forgetting", pareto) if pareto else "",
        html_text(drift_sentence(results)),
        "<h2>How to read this</h2>",
        html_text(READING),
        html_text(COMPARING) if tables else "",
        "<h2>Settings</h2>",
        settings_table(results).html(words=True),
        "<h2>Texts</h2>",
        domains_table(results).html(words=True),
        "<h2>Where and with what</h2>",
        Table(["what", "value"], [[key, value] for key, value in about.items()]).html(words=True),
        "<p>The same run again:</p>",
        f"<pre>{escape(results['command'])}</pre>",
    ]
    head = f'<meta charset="utf-8"><title>forgetless: {escape(model["name"])}</title><style>{STYLE}</style>'
    body = "\n".join(filter(None, parts))
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _image(alt: str, picture: bytes) -> str:
    return f'<img alt="{alt}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'


def write_report(folder: Path, results: dict[str, Any]) -> list[Path]:
    """compare.png, pareto.png and report.html in ``folder``, from results alone."""
    picture, pareto = draw(results), draw_pareto(results)
    write_atomically(folder / PICTURE, picture)
    if pareto is not None:
        write_atomically(folder / PARETO, pareto)
    write_atomically(folder / PAGE, html_page(results, picture, pareto))
    return [folder / name for name in (PICTURE, *([PARETO] if pareto else []), PAGE)]


# ------------------------------------------------------------------------ a page for the repository


def published(results: dict[str, Any]) -> dict[str, Any]:
    """The results without folders, rounded to five digits, the drift of single layers as means over seeds."""
    result = copy.deepcopy(results)
    result["command"] = command_of(results)
    layers: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        for stage in row["stages"]:
            each = stage.pop("drift_layers", {})
            if stage is row["stages"][-1] and not row.get("family"):
                for name, value in each.items():
                    layers.setdefault(row["label"], {}).setdefault(name, []).append(value)
        row.pop("adapter", None)
    if layers:
        result["drift_layers"] = {
            label: {name: statistics.fmean(values) for name, values in of.items()} for label, of in layers.items()
        }
    result = rounded(result)
    return {**result, "summary": rounded(summary(result))}  # of the rounded rows: anyone can make it again


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


def verdicts(figures: dict[str, Any]) -> list[str]:
    """One sentence per method, from the intervals alone: a difference is claimed only where they exclude none."""
    lora = figures["baseline"]
    paired = {row["label"]: row for row in figures["paired_with_baseline"]}
    lines = []
    for row in figures["equal_learning"]:
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
    result = summary(results)
    machine, versions = results["machine"], results["versions"]
    seconds = sum(row["seconds"] for row in results["rows"])
    short = verdicts(result) or ["Nothing to compare with plain LoRA."]
    short.append(drift_sentence(results) or "Too few runs to correlate drift with forgetting.")
    parts = [
        "# What was learnt, and what was forgotten",
        f"Written by `forgetless report`{f' from `{data}`' if data else ''}; no figure here was typed by hand.",
        "" if results["complete"] else "**This run is not complete: rows are missing.**",
        setting_text(results),
        "## In short",
        "\n".join(f"- {line}" for line in short),
        f"![learnt against forgotten, drift against forgetting]({picture})",
        "## Each method",
        main_table(results).markdown(),
        READING,
        *(f"## {capital(title)}\n\n{table.markdown()}" for title, table in further_tables(results)),
        tuning_text(results, result),
        "## How it is compared",
        COMPARING,
        "## Settings",
        settings_table(results).markdown(),
        f"{results['model']['name']}; {machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions.get('transformers', '?')}; {len(results['rows'])} runs, {seconds / 3600:.1f} hours; "
        f"commit {', '.join(c[:7] for c in results.get('commits', [])) or 'unknown'}. Again:",
        f"```\n{command_of(results)}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def setting_text(results: dict[str, Any]) -> str:
    """What was learnt and kept, in one paragraph."""
    options = results["options"]
    tasks, kept = names(results)
    source = options.get("source")
    calibrated = "Methods that calibrate do so on the training part of these."
    if source is not None:
        unseen = [name for name in kept if name not in source]
        calibrated = (
            f"Methods that calibrate do so on the training part of {', '.join(source)}; "
            f"{', '.join(unseen)} are unseen by every method."
        )
    return (
        f"{results['model']['name']} ({results['model']['parameters']:,} parameters, {options['dtype']}) learns "
        f"{len(tasks)} tasks in a row ({', '.join(tasks)}), {options['steps']} steps each of {options['batch_size']} "
        f"examples, with each method and {len(options['seeds'])} seeds. All is evaluated {options.get('evals', 1)} "
        f"times per task. Held out and never trained on: {', '.join(kept)}. {calibrated} These are short runs of a "
        "small model: what they show is shown for this setting."
    )


def tuning_text(results: dict[str, Any], figures: dict[str, Any]) -> str:
    """The tuned setting of every method; empty without a sweep."""
    if not figures["tuned"]:
        return ""
    options = results["options"]
    seeds = ", ".join(map(str, options.get("sweep_seeds") or options["seeds"]))
    lines = [f"## Tuned weights\n\nWith the seeds of the sweep alone ({seeds}):\n"]
    for family in figures["tuned"]:
        best = family["best"]
        text = f"none of {family['settings']} settings learnt enough"
        if best:
            text = f"{best['label']} ({best['learnt']:.2f} nats learnt, {best['forgotten']:+.3f} forgotten)"
        lines.append(f"- {family['family']}: {text}")
    return "\n".join(lines)


def write_page(path: Path, results: dict[str, Any], data: str | None) -> list[Path]:
    """The page and its picture beside it."""
    picture = path.with_suffix(".png")
    write_atomically(picture, draw_pareto(results) or draw(results))
    write_atomically(path, page(results, picture.name, data))
    return [path, picture]
