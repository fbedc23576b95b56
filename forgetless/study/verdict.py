"""A comparison in a few sentences: which method to use, what was learned, what was kept. All follow from the rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from .metrics import (
    ALMOST_ALL,
    baseline,
    drift_and_forgetting,
    groups,
    learnt_sum,
    main_rows,
    names,
    paired,
    whole,
)
from .plots import ENOUGH_RUNS
from .stats import mean
from .tables import between

Rows = dict[int, dict[str, Any]]


def finished(results: dict[str, Any]) -> dict[str, Rows]:
    """label -> seed -> row, of the methods that finished with every seed that they were run with."""
    every, done = groups(main_rows(results)), groups(whole(main_rows(results)))
    return {label: rows for label, rows in done.items() if rows.keys() == every[label].keys()}


def each(rows: Mapping[str, Rows], value: Callable[[dict[str, Any]], float | None]) -> dict[str, float]:
    """label -> the mean over seeds, where there is one."""
    means = {label: mean(map(value, runs.values())) for label, runs in rows.items()}
    return {label: number for label, number in means.items() if number is not None}


def recommended(results: dict[str, Any]) -> str | None:
    """The method that forgot least among those that learned nearly all of what plain LoRA did.

    Without plain LoRA among the rows: of what the method did that learned most. None where nothing finished or
    nothing was learned.
    """
    rows = finished(results)
    learned, forgotten = each(rows, learnt_sum), each(rows, lambda row: row["forgotten_mean"])
    most = learned.get(baseline(results) or "", max(learned.values(), default=0.0))
    fit = [label for label in forgotten if most > 0 and learned[label] >= ALMOST_ALL * most]
    return min(fit, key=lambda label: forgotten[label], default=None)


def spread(values: dict[str, float], digits: int = 3, sign: bool = True) -> str:
    """The lowest and the highest value, with the methods they belong to: "+0.052 (LaLoRA) to +0.299 (LoRA)"."""
    form = f"{'+' if sign else ''}.{digits}f"
    texts = {label: f"{value:{form}}" for label, value in values.items()}
    ends = [min(values, key=values.__getitem__), max(values, key=values.__getitem__)]
    shown = [f"{texts[end]} ({', '.join(label for label in texts if texts[label] == texts[end])})" for end in ends]
    return shown[0] if texts[ends[0]] == texts[ends[1]] else " to ".join(shown)


def verdict(results: dict[str, Any]) -> list[str]:
    """What a reader wants to know first, with Markdown's bold."""
    rows = finished(results)
    if not rows:
        return ["**No method has finished.**"]
    tasks, kept = names(results)
    forgotten = each(rows, lambda row: row["forgotten_mean"])
    texts = [advice(results, rows, forgotten)] if len(rows) > 1 and kept else []
    learned = spread(each(rows, learnt_sum), 2, sign=False)
    over = f", summed over {_listed(tasks)}" if len(tasks) > 1 else f" on {tasks[0]}"
    texts.append(f"**Learned:** the loss fell by {learned} nats per token{over}.")
    said = []
    if forgotten:
        average = ", on average" if len(kept) > 1 else ""
        said.append(f"the loss on {_listed(kept)} changed by {spread(forgotten)} nats per token{average}")
    for task in tasks[:-1]:
        earlier = each(rows, lambda row, task=task: row["forgotten"].get(task))  # type: ignore[misc]
        if earlier:
            said.append(f"the loss on {task} changed by {spread(earlier, 2)} while later tasks were learned")
    if "facts" in results["base"]:
        before, asked = results["base"]["facts"]
        after = spread(each(rows, lambda row: row["stages"][-1]["facts"][0]), 0, sign=False)
        said.append(f"of {asked} facts the base model knew {before}, afterwards {after}")
    if said:
        texts.append(f"**Kept:** {'; '.join(said)}.")
    return texts


def advice(results: dict[str, Any], rows: dict[str, Rows], forgotten: dict[str, float]) -> str:
    """Which method to use, and how sure that is."""
    best, lora = recommended(results), baseline(results)
    if best is None:
        return "**No method to recommend:** none learned anything."
    seeds = len(rows[best])
    other_one = lora if lora in rows else "the best one"
    text = f"Of the methods that learned at least {ALMOST_ALL:.0%} of what {other_one} did, {best} "
    text += f"forgot the least: {forgotten[best]:+.3f} nats per token on the kept texts"
    text += f", where {lora} lost {forgotten[lora]:+.3f}." if lora in rows and lora != best else "."
    if seeds == 1:
        return f"**Try {best} first.** {text} This is one seed: repeat it with `--seeds 0 1 2` before you rely on it."
    other = next((row["forgotten"] for row in paired(results) if row["label"] == best), None)
    if other is None or other["high"] is None:
        return f"**Use {best}.** {text}"
    size = f"{between(other, 3, sign=True)} over {other['n']} seeds"
    if other["high"] < 0:
        return f"**Use {best}.** {text} The difference is {size}."
    return f"**No clear winner.** {text} But the difference, {size}, does not exclude zero."


def _listed(words: list[str]) -> str:
    """ "a, b and c"."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1] if words else ""]))


def verdicts(figures: dict[str, Any]) -> list[str]:
    """One sentence per method, from the intervals alone: a difference is claimed only where they exclude none."""
    lora = figures["baseline"]
    pairs = {row["label"]: row for row in figures["paired_with_baseline"]}
    lines = []
    for row in figures["equal_learning"]:
        label = row["label"]
        said = [_said(row["kept"], "the kept texts", lora), _said(row["tasks"], "earlier tasks", lora)]
        text = f"**{label}**: " + "; ".join(filter(None, said))
        learned = pairs[label]["learnt"]
        if learned["high"] is not None and (learned["high"] < 0 or learned["low"] > 0):
            word = "less" if learned["high"] < 0 else "more"
            text += f"; in the same number of steps it learned {word} ({between(learned, 2, sign=True)} nats)"
        if not row["enough"]:
            share = f"{row['share']['mean']:.0%} of {lora}'s learning"
            text += f"; it learned so little that this compares it at {share} only"
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


def drift_sentence(results: dict[str, Any]) -> str:
    """Whether drift went with forgetting over all runs; empty where these are too few to say."""
    about = drift_and_forgetting(results)
    if about["pearson"] is None or about["runs"] < ENOUGH_RUNS:
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


def sizes(results: dict[str, Any]) -> str:
    """How much was measured: held-out examples per text, and seeds."""
    counts = [domain["held_out"] for domain in results["domains"]]
    seeds = len(results["options"]["seeds"])
    text = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(counts[0])
    return f"{seeds} seed{'s' if seeds > 1 else ''}, {text} held-out examples per text"
