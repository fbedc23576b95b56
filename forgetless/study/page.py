"""A comparison as a Markdown page and a small JSON file for a repository; and what its words mean."""

from __future__ import annotations

import copy
import re
import statistics
from pathlib import Path
from typing import Any

from ..files import write_atomically
from .metrics import ALMOST_ALL, ENOUGH, names, summary
from .plots import draw, draw_pareto
from .results import by_label
from .tables import further_tables, main_table, settings_table
from .verdict import drift_sentence, verdicts


def reading(results: dict[str, Any]) -> str:
    """The words of the main table, those alone that are in it."""
    tasks, kept = names(results)
    base, rows = results["base"], results["rows"]
    said = [
        "Losses are mean negative log-likelihoods in nats per token on held-out text; 0.1 nats are about 11 % more "
        "perplexity."
    ]
    if rows:
        said.append(
            "**learned**: the loss on a task right after it was trained, in brackets its change from the base; more "
            "negative is better."
        )
    if rows and len(tasks) > 1:
        said.append(
            "**at the end**: the loss on an earlier task after all later ones, and its rise since it was learned."
        )
    if rows and kept:
        said.append(
            f"**{'**, **'.join(kept)}**: the loss at the end and its rise over the base; **forgetting** is the mean of "
            "these rises, nearer to zero is better."
        )
    if "facts" in base:
        said.append("**facts**: short sentences that the model must still complete.")
    if any(row.get("drift") is not None for row in rows):
        said.append(
            "**drift**: the mean of ‖ΔW x‖ / ‖x‖ over layers and tokens of the kept texts, since the untouched base."
        )
    if main_table(results).best:
        said.append("Bold: the best of the column.")
    if any(len(seeds) > 1 for seeds in by_label(results).values()):
        said.append("± and the ranges in brackets: 95 % t-intervals over seeds.")
    if len(by_label(results)) > 1:
        said.append(
            "Compare forgetting between methods that learned about the same: one that learns nothing forgets nothing."
        )
    return " ".join(said)


def comparing(results: dict[str, Any]) -> str:
    """The words of the further tables, those alone that are shown."""
    titles = " ".join(title for title, _ in further_tables(results))
    settings = [row["settings"] for row in results["rows"]]
    said = []
    if "at equal learning" in titles:
        said.append(
            "**At equal learning**: learning is the sum over tasks of the fall of the held-out loss (a finished task "
            "counts as it was when just learned). Forgetting is followed along training. Each method's curve and that "
            "of plain LoRA with the same seed are read at the greatest learning that both reached, where each first "
            "reaches it, linear between evaluations. Ratios are taken per seed, then averaged; (!) marks methods "
            f"compared below {ENOUGH:.0%} of LoRA's learning; a dash means that LoRA had nothing to forget there."
        )
    if "sequence" in titles:
        said.append(
            "**Backward and forward transfer** are those of Lopez-Paz and Ranzato (2017), **forgetting of tasks** is "
            "that of Chaudhry et al. (2018), on losses with the sign turned so that more transfer is better"
            + (", and on next-token accuracies." if "accuracies" in results["base"] else ".")
        )
    if any(setting.get("consolidate") for setting in settings):
        said.append(
            "**consolidate**: between tasks the update is folded into the base, the adapter starts afresh, and "
            "statistics of the learned task are added to those of the source texts."
        )
    if any(setting["name"] == "full" for setting in settings):
        said.append("**full**: every weight is trained (float32 copies, AdamW).")
    if "sweep" in titles:
        said.append(
            "**tuned**: the setting of each method that forgets least on the kept texts among those that learned at "
            f"least {ALMOST_ALL:.0%} of what plain LoRA did, with the seeds of the sweep alone."
        )
    return " ".join(said)


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


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


def page(results: dict[str, Any], picture: str, data: str | None) -> str:
    """The whole page; ``picture`` and ``data`` are file names to refer to."""
    result = summary(results)
    machine, versions = results["machine"], results["versions"]
    seconds = sum(row["seconds"] for row in results["rows"])
    short = verdicts(result) or ["Nothing to compare with plain LoRA."]
    short.append(drift_sentence(results) or "Too few runs to correlate drift with forgetting.")
    parts = [
        "# What was learned, and what was forgotten",
        f"Written by `forgetless report`{f' from `{data}`' if data else ''}; no figure here was typed by hand.",
        "" if results["complete"] else "**This run is not complete: rows are missing.**",
        setting_text(results),
        "## In short",
        "\n".join(f"- {line}" for line in short),
        f"![learnt against forgotten, drift against forgetting]({picture})",
        "## Each method",
        main_table(results).markdown(),
        reading(results),
        *(f"## {capital(title)}\n\n{table.markdown()}" for title, table in further_tables(results)),
        tuning_text(results, result),
        *(["## How it is compared", text] if (text := comparing(results)) else []),
        "## Settings",
        settings_table(results).markdown(),
        f"{results['model']['name']}; {machine['processor']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions.get('transformers', '?')}; {len(results['rows'])} runs, {seconds / 3600:.1f} hours; "
        f"commit {', '.join(c[:7] for c in results.get('commits', [])) or 'unknown'}. Again:",
        f"```\n{command_of(results)}\n```",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def setting_text(results: dict[str, Any]) -> str:
    """What was learned and kept, in one paragraph."""
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
        text = f"none of {family['settings']} settings learned enough"
        if best:
            text = f"{best['label']} ({best['learnt']:.2f} nats learned, {best['forgotten']:+.3f} forgotten)"
        lines.append(f"- {family['family']}: {text}")
    return "\n".join(lines)


def write_page(path: Path, results: dict[str, Any], data: str | None) -> list[Path]:
    """The page and its picture beside it."""
    picture = path.with_suffix(".png")
    write_atomically(picture, draw_pareto(results) or draw(results))
    write_atomically(path, page(results, picture.name, data))
    return [path, picture]
