"""The page about forgetting: which method to use, at what cost, and when not; one picture, one table."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..files import write_atomically
from .frontier import FREE, PARTS, Frontiers, Point, best, frontiers, summary
from .metrics import main_rows, names
from .palette import colour, method_of
from .plots import png
from .recipes import python
from .stats import interval

#: Where the text compares.
SHARE = 0.95
#: Nats per token of kept text that count as level.
LEVEL = 0.01
#: That read other text, or more of it, while they train.
REPLAY = ("lora+replay", "lora+self-replay", "lora+kl")


@dataclass(frozen=True)
class Study:
    """Results of one sequence, its frontiers, and what they read at SHARE."""

    results: dict[str, Any]
    curves: Frontiers
    at: dict[str, Any]

    @classmethod
    def of(cls, results: dict[str, Any]) -> Study:
        """Everything that the page says is taken from here."""
        return cls(results, frontiers(results), summary(results)[f"{SHARE:g}"])

    @property
    def tasks(self) -> list[str]:
        return names(self.results)[0]

    def mean(self, family: str, part: str) -> float | None:
        """What the family forgets at SHARE; None where it has not run or never learns so much."""
        value = self.at["families"].get(family, {}).get(part, {}).get("value")
        return None if value is None else float(value["mean"])


def title(family: str) -> str:
    """ "lora+retain" as people write it."""
    words = {"lora": "LoRA", "clora": "CLoRA", "curlora": "CURLoRA", "lalora": "LaLoRA", "kl": "KL"}
    return " + ".join(words.get(part, part) for part in family.split("+"))


def recommended(studies: list[Study]) -> str:
    """Of the families that have run on every sequence, the one with the least sum of ranks over all parts at SHARE."""
    ranks: dict[str, list[int]] = {}
    for study in studies:
        for part in PARTS:
            means = {f: value for f in study.curves if (value := study.mean(f, part)) is not None}
            for rank, family in enumerate(sorted(means, key=lambda f: means[f])):
                ranks.setdefault(family, []).append(rank)
    full = {family: sum(r) for family, r in ranks.items() if len(r) == len(PARTS) * len(studies)}
    return min(full, key=lambda family: full[family])


def figure(value: dict[str, Any] | None, digits: int = 3) -> str:
    """A mean with its interval, or a dash."""
    if value is None:
        return "–"
    text = f"{value['mean']:.{digits}f}"
    return text if value["low"] is None else f"{text} ({value['low']:.{digits}f} to {value['high']:.{digits}f})"


def sentence(study: Study, family: str) -> str:
    """What the family forgets on one sequence, beside LoRA and the best that is free."""
    rows = study.at["families"]
    said = []
    for part, what in (("kept", "on kept text"), ("task", f"of {study.tasks[0]}")):
        entry = rows[family][part]
        lora, free, other = entry["lora"], entry["best_free"], study.at["free"][part]
        text = f"{what} {figure(entry['value'])}"
        if lora is not None:
            text += f", LoRA {figure(rows['lora'][part]['value'])}"
            text += "" if lora["ratio"] is None else f" (ratio of the means {lora['ratio']:.2f})"
        if free is not None and other not in (family, "lora"):
            text += f", the best free method, {title(other)}, {figure(rows[other][part]['value'])}"
            ratio = "" if free["ratio"] is None else f"; ratio {free['ratio']:.2f}"
            text += f" ({_difference(free['difference'])}{ratio})"
        said.append(text)
    beside = [
        f"{title(other)} {figure(rows[other]['kept']['value'])} and {figure(rows[other]['task']['value'])}"
        for other in rows
        if other in REPLAY and study.mean(other, "kept") is not None
    ]
    text = f"- **{', then '.join(study.tasks)}**: " + "; ".join(said) + "."
    return text + (f" With training on text to keep: {'; '.join(beside)}." if beside else "")


def _difference(value: dict[str, Any]) -> str:
    """A paired difference; where its interval has both signs, that none is shown."""
    shown = value["low"] is not None and value["low"] * value["high"] > 0
    return f"difference {figure(value)}" + ("" if shown else f": none is shown with {value['n']} seeds")


def alternatives(studies: list[Study], family: str) -> str:
    """Which methods that train on text to keep do as well on it, everywhere, and what that costs; empty if none."""
    equal = [
        other
        for other in REPLAY
        if all(
            (theirs := study.mean(other, "kept")) is not None and theirs <= (study.mean(family, "kept") or 0.0) + LEVEL
            for study in studies
        )
    ]
    return "".join(
        f" Where no earlier task has to be kept, {title(other)} does as well on kept text, for "
        f"{passes(studies, other)} more forward passes."
        for other in equal
    )


def table(studies: list[Study]) -> str:
    """Families against sequences, at SHARE, with seeds and costs."""
    heads = ["method", "seeds"]
    for study in studies:
        first, last = study.tasks[0], study.tasks[-1]
        heads += [f"{first}, {last}: kept text", f"{first} lost", "learned, at most"]
    heads.append("extra forward passes")
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    marks = [
        {part: best({f: {p: e[p]["value"] for p in PARTS} for f, e in rows.items()}, rows, part) for part in PARTS}
        for rows in (study.at["families"] for study in studies)
    ]
    for family in dict.fromkeys(f for study in studies for f in study.curves):
        seeds = sorted({len(study.curves[family]) for study in studies if family in study.curves})
        cells = [title(family), " to ".join(map(str, seeds))]
        for study, mark in zip(studies, marks, strict=True):
            if family not in study.curves:
                cells += ["–"] * 3
                continue
            for part in PARTS:
                text = figure(study.at["families"][family][part]["value"])
                cells.append(f"**{text}**" if mark[part] == family else text)
            most = statistics.fmean(max(p.learnt for p in points) for points in study.curves[family].values())
            cells.append(f"{most:.0%}")
        cells.append(passes(studies, family))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def passes(studies: list[Study], family: str) -> str:
    """Forward passes of both tasks beyond those of training: the median over all runs."""
    rows = [row for study in studies for row in main_rows(study.results) if method_of(row["label"]) == family]
    return f"{statistics.median(row.get('extra_forwards', 0) for row in rows):g}"


def draw(studies: list[Study]) -> bytes:
    """Frontiers: kept text above, the first task below, a column for each sequence."""
    figure = Figure(figsize=(5.6 * len(studies), 7.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(PARTS), len(studies), squeeze=False, sharex="col")
    labels: dict[str, Any] = {}
    for column, study in enumerate(studies):
        curves = study.curves
        for row, part in enumerate(PARTS):
            axis = axes[row][column]
            for family in sorted(curves, key=lambda f: f not in FREE):
                labels.setdefault(title(family), _curve(axis, family, curves[family], part))
            seen = [getattr(p, part) for seeds in curves.values() for points in seeds.values() for p in points]
            room = 0.06 * (max(seen) - min(seen)) or 1.0
            axis.set_ylim(min(0, *seen) - room, max(seen) + room)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
            axis.set_title(" → ".join(study.tasks) if row == 0 else "")
            axis.set_xlabel("learned, share of what LoRA learned" if row else "")
            if column == 0:
                axis.set_ylabel("nats per token of kept text" if part == "kept" else "nats per token of the first task")
    figure.legend(labels.values(), labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle("Forgotten against learned: right and down is better")
    return png(figure)


def _curve(axis: Any, family: str, seeds: dict[int, list[Point]], part: str) -> Any:
    """The means of all strengths, joined; every run as a small mark; bars are intervals of three seeds or more."""
    style: dict[str, Any] = {"color": colour(family)}
    marks = []
    for label in {p.label: None for points in seeds.values() for p in points}:
        chosen = [p for points in seeds.values() for p in points if p.label == label]
        y = interval(getattr(p, part) for p in chosen)
        assert y is not None
        bar = y["high"] - y["mean"] if y["n"] > 2 else 0.0
        marks.append((statistics.fmean(p.learnt for p in chosen), y["mean"], bar))
        axis.plot([p.learnt for p in chosen], [getattr(p, part) for p in chosen], ".", markersize=4, alpha=0.4, **style)
    xs, ys, bars = zip(*sorted(marks), strict=True)
    return axis.errorbar(xs, ys, yerr=bars, marker="o", markersize=6, capsize=2, elinewidth=0.7, linewidth=1.8, **style)


def page(studies: list[Study], picture: str, data: list[str]) -> str:
    """The whole page; ``picture`` and ``data`` are file names to refer to."""
    family = recommended(studies)
    first = studies[0].results
    row = next(r for r in main_rows(first) if method_of(r["label"]) == family)
    options, machine, versions = first["options"], first["machine"], first["versions"]
    unseen = [name for name in names(first)[1] if name not in (options.get("source") or ())]
    rows = [row for study in studies for row in study.results["rows"]]
    parts = [
        "# Forgetting",
        f"**Use {title(family)}.** Where each method has learned {SHARE:.0%} of what LoRA learned, it forgets, in nats "
        "per token (mean over seeds, 95 % interval in brackets):",
        "\n".join(sentence(study, family) for study in studies),
        "On [your model and batches](index.md#a-model-and-data); those of the task are its own text:",
        f"```python\ntask_batches = batches\n{python(row, options)}\n```",
        "`fl.retain` costs nothing while training: after it, one forward pass over some text of the task, and one "
        "Cholesky factor for each distinct input of the layers. It needs text to keep (`fl.calibrate` before "
        "training) and holds a K × K matrix for each distinct input; `covariance=q` holds q columns. Do not use it "
        "where the task's text and the text to keep are the same kind of text (there is nothing to tell apart), or "
        "with CURLoRA (its factors are frozen): scale the update there (`fl.fit_budget`)."
        + alternatives(studies, family),
        f"![Forgotten against learned, for each method]({picture})",
        f"Large marks are means over seeds, small ones single runs; lines join the strengths of a method; bars are "
        f"95 % intervals where there are three seeds. Free methods need no other text: "
        f"{', '.join(title(f) for f in FREE if any(f in study.curves for study in studies))}. "
        "Replay and KL train on text to keep, self-replay on text that the base model writes.",
        f"## All methods at {SHARE:.0%} of LoRA's learning",
        table(studies),
        "A reading is the least that the method forgets at this much learning, on the line between two of its "
        "strengths where none is there. A dash: with some seed it never learns so much. *learned, at most*: its "
        "strongest setting. *extra forward passes*: beyond those of training, in both tasks; LoRA trains with "
        f"{2 * options['steps']} and as many backward passes. Bold: the least.",
        "## Setting",
        f"{first['model']['name']} ({first['model']['parameters']:,} parameters, {options['dtype']}) learns two tasks "
        f"one after the other, {options['steps']} steps each of {options['batch_size']} examples. Kept text: "
        f"{', '.join(names(first)[1])}; methods read the training part of {', '.join(options.get('source') or ())} "
        f"only, so {', '.join(unseen)} are new to all. These are short runs of a small model: the results hold for "
        "this setting.",
        f"{len(rows)} runs, {sum(r['seconds'] for r in rows) / 3600:.1f} hours; {machine['processor']}, "
        f"{machine['threads']} thread, torch {versions['torch']}, transformers {versions.get('transformers', '?')}; "
        f"commits {', '.join(sorted({r['commit'][:7] for r in rows if r.get('commit')})) or 'unknown'}; "
        f"data: {', '.join(f'`{name}`' for name in data)}. Written by `forgetless frontier`. "
        "A command for each line of methods:",
        "```\n" + commands(studies) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def commands(studies: list[Study]) -> str:
    """The commands of all results; what they have in common before the methods once."""
    heads: dict[str, dict[str, None]] = {}
    for line in (line for study in studies for line in study.results["lines"]):
        head, mark, methods = line.partition(" --method")
        heads.setdefault(head, {})[f"  {mark.strip()}{methods}" if mark else ""] = None
    return "\n".join(word for head, lines in heads.items() for word in (head, *filter(None, lines)))


def write_page(path: Path, results: list[dict[str, Any]], data: list[str]) -> list[Path]:
    """The page of these results and its picture beside it."""
    studies = [Study.of(each) for each in results]
    picture = path.with_suffix(".png")
    write_atomically(picture, draw(studies))
    write_atomically(path, page(studies, picture.name, data))
    return [path, picture]
