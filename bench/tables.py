"""The tables of one result file, in Markdown: what a benchmark prints, and what the pages repeat.

Ratios are computed here, from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from .bytes import MIB
from .harness import FROZEN, OURS, PEFT, Results, Row, median_and_spread, overhead, select
from .shapes import Case, rival, work

NONE = "–"
ADAPTERS = ("eager PyTorch", "LoRAFusion-style", PEFT)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


Key = Callable[[Row], str]
Columns = Sequence[tuple[str, str, float, int]]


def nested(rows: Iterable[Row], first: str = "case", second: str = "provider") -> dict[str, dict[str, Row]]:
    """case -> provider -> row, of rows of one phase and metric."""
    result: dict[str, dict[str, Row]] = {}
    for row in rows:
        result.setdefault(row[first], {})[row[second]] = row
    return result


def pivot(rows: Iterable[Row], head: str, line: str | Key, column: str | Key, cell: Key) -> str:
    """A line and a column for each value of these fields, in the order of the rows; empty without rows."""
    line_of, column_of = (itemgetter(key) if isinstance(key, str) else key for key in (line, column))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(line_of(row), {})[column_of(row)] = cell(row)
    columns = unique(name for each in cells.values() for name in each)
    lines = [[name, *(each.get(name_of, NONE) for name_of in columns)] for name, each in cells.items()]
    return table([head, *columns], lines) if lines else ""


def source(results: Results, path: Path | None = None) -> str:
    """Where the numbers come from, in one line."""
    machine, versions = results["machine"], results["versions"]
    commit, plus, _ = (results["commit"] or "unknown").partition("+")
    parts = []
    if machine:
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        parts.append(f"{machine['processor']}, {threads}" if machine["device"] == "cpu" else machine["device"])
    parts.append(", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "peft") if name in versions))
    parts.append(f"commit {commit[:12]}{' with changes' if plus else ''}, {results['created']}")
    against = f", against commit {results['against'][:12]}" if "against" in results else ""
    parts.append(f"`bench/results/{path.name}`" if path else "")
    return "; ".join(filter(None, parts)) + against


def provider_table(
    rows: Iterable[Row], first: str, columns: Columns, floor: str | None = None, last: Mapping[str, str] | None = None
) -> str:
    """A line for each provider.

    Args:
        columns: title, metric (also "spread" of the time, and "ratio" to the time of ``floor``), scale, digits.
        last: provider -> the cell after the columns.
    """
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        more = {"spread": row["spread"]} if "spread" in row else {}
        cells.setdefault(row["provider"], {}).update({row["metric"]: row["value"], **more})
    if floor is not None:
        for name, cell in cells.items():
            own = floor + "".join(name.partition(" @ ")[1:])  # the floor of the same process
            cell["ratio"] = cell["time"] / cells[own if own in cells else floor]["time"]
    lines = []
    for name, cell in cells.items():
        values = [number(cell[key] * scale if key in cell else None, digits) for _, key, scale, digits in columns]
        lines.append([name, *values, *([last[name]] if last else [])])
    titles = [title for title, *_ in columns if title]
    return table([first, *titles, *(["loss of each step"] if last else [])], lines)


SECONDS = ("seconds", "time", 1.0, 3), ("±", "spread", 1.0, 3)

# ------------------------------------------------------------------------------------- one training step


def step_text(results: Results) -> str:
    rows = select(results, phase="step", metric="time")
    times = {row["provider"]: row for row in rows}
    text = f"{rows[0]['case']}; forward and backward, {rows[0]['count']} interleaved rounds.\n\n"
    shares = []
    for name, time in times.items():
        library, _, dropout = name.partition(", dropout ")
        if library == OURS and dropout and f"{PEFT}, dropout {dropout}" in times:
            part = overhead(time, times[f"{PEFT}, dropout {dropout}"], times[FROZEN])
            share = "within the noise" if part is None else f"{part[0]:.2f} ± {part[1]:.2f}"
            shares.append(f"{share} at dropout {dropout}")
    if "against" in results:  # the JSON has the times
        text += against_text(results, "step").lstrip()
    else:
        text += provider_table(rows, "provider", [*SECONDS, ("× frozen", "ratio", 1, 2)], FROZEN)
    if shares:
        text += f"\nOur overhead over the frozen model is {', '.join(shares)} of PEFT's, within every round.\n"
    return text


def against_text(results: Results, phase: str) -> str:
    """This checkout's times over the other commit's, within every round."""
    rows = []
    for case, times in nested(select(results, phase=phase, metric="time")).items():
        for name, other in times.items():
            ours, mark, _ = name.partition(" @ ")
            if mark:
                pairs = zip(times[ours]["rounds"], other["rounds"], strict=True)
                rows.append([case, ours, "{:.3f} ± {:.3f}".format(*median_and_spread([a / b for a, b in pairs]))])
    if not rows:
        return ""
    return f"\nThis checkout's time over commit {results['against'][:8]}'s:\n\n" + table(["case", "", "ratio"], rows)


# ------------------------------------------------------------------------------------------ one layer


def ratio(times: Mapping[str, Row], provider: str) -> float:
    """Times the frozen layer, that of the same process."""
    return times[provider]["value"] / times[f"{FROZEN}{''.join(provider.partition(' @ ')[1:])}"]["value"]


def layer_cell(times: Mapping[str, Row], provider: str, other: str) -> str:
    if provider not in times:
        return NONE
    if provider == FROZEN:
        return f"{times[FROZEN]['value'] * 1e3:.3g} ms"
    part = overhead(times[provider], times[other], times[FROZEN]) if other in times else None
    return f"{number(ratio(times, provider))} ({number(part and part[0])})"


def layer_groups(results: Results) -> dict[tuple[Any, ...], list[str]]:
    """(method, dtype, dropout) -> cases; those of a sweep by shape too."""
    keys = ("method", "dtype", "dropout", *(["shape"] if results["kind"] == "sweep" else []))
    groups: dict[tuple[Any, ...], list[str]] = {}
    for name, case in results["cases"].items():
        groups.setdefault(tuple(case[key] for key in keys), []).append(name)
    return groups


def title_of(case: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    parts = case["models"].split(",")[0], case["projection"], f"{case['N']}×{case['K']}"
    return " ".join([*filter(None, parts), *(f"{key}={case[key]}" for key in more)])


def layer_text(results: Results) -> str:
    times = nested(select(results, phase="both", metric="time"))
    peaks = {row["provider"]: row["value"] for row in select(results, case="machine")}
    text = (
        "Forward and backward, the gradient of the input included: times the frozen layer, in brackets the overhead "
        "over the frozen layer as a share of PEFT's (of the authors' for CURLoRA), taken within every round; "
        f"{NONE} where theirs is within the noise. *At the machine's peaks*: the time that the products and copies of "
        "the adapted layer take at the machine's measured rates, over the frozen layer's.\n"
    )
    for (method, dtype, dropout, *_), names in layer_groups(results).items():
        cases = [results["cases"][name] for name in names]
        providers = unique(provider for name in names for provider in times[name])
        rows = [[p, *(layer_cell(times[name], p, rival(method)) for name in names)] for p in providers]
        if dtype in peaks:
            needs = (work(Case(**{key: case[key] for key in Case.__dataclass_fields__})) for case in cases)
            least = (max(flops / (peaks[dtype] * 1e12), size / (peaks["bytes"] * 1e9)) for flops, size in needs)
            frozen = (times[name][FROZEN]["value"] for name in names)
            rows.append(["at the machine's peaks", *(number(a / b) for a, b in zip(least, frozen, strict=True))])
        fixed = [key for key in ("M", "R") if len({case[key] for case in cases}) == 1]
        titles = [title_of(case, [key for key in ("M", "R") if key not in fixed]) for case in cases]
        dropped = f", dropout {dropout:g}" if method == "lora" else ""
        text += f"\n**{method}, {dtype}{dropped}{''.join(f', {key}={cases[0][key]}' for key in fixed)}**\n\n"
        text += table(["provider", *titles], rows)
    text += "".join(f"\n{line}\n" for line in layer_verdict(results))
    return text + against_text(results, "both") + host_text(results) + saved_text(results)


def saved_text(results: Results) -> str:
    """What each provider saves for the backward pass at each dropout; the sweep's rows are in its JSON."""
    lines: dict[str, dict[str, list[str]]] = {}
    for row in select(results, phase="both", metric="saved") if results["kind"] == "layer" else []:
        case = results["cases"][row["case"]]
        if not row["provider"].startswith(FROZEN):
            line = lines.setdefault(f"{case['method']}, {case['dtype']}: {row['provider']}", {})
            line.setdefault(title_of(case), []).append(number(row["value"] / MIB))
    shapes = unique(title_of(case) for case in results["cases"].values())
    cells = [[name, *(" / ".join(unique(of.get(shape, [NONE]))) for shape in shapes)] for name, of in lines.items()]
    title = "\nSaved for the backward pass, MiB, at dropout 0 / 0.1 where they differ:\n\n"
    return title + table(["", *shapes], sorted(cells)) if lines else ""


def lora_times(results: Results, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Row]]]:
    """What cases have in these fields -> for each LoRA case its providers' times."""
    times = nested(select(results, phase="both", metric="time"))
    result: dict[tuple[Any, ...], list[dict[str, Row]]] = {}
    for name, case in results["cases"].items():
        if case["method"] == "lora" and OURS in times[name]:
            result.setdefault(tuple(case[key] for key in keys), []).append(times[name])
    return result


def layer_verdict(results: Results) -> list[str]:
    """How often each of the others has the smaller median."""
    lines = []
    for (dropout,), cases in lora_times(results, "dropout").items():
        faster = {name: [t[name]["value"] < t[OURS]["value"] for t in cases if name in t] for name in ADAPTERS}
        if texts := [f"{name} {sum(each)}" for name, each in faster.items() if each]:
            lines.append(f"Faster than forgetless at dropout {dropout:g}, of {len(cases)} cases: {', '.join(texts)}.")
    return lines


# --------------------------------------------------------------------------------------- the others


def penalty_text(results: Results) -> str:
    rows = select(results, phase="penalty") + select(results, phase="step")
    columns = [("ms", "time", 1e3, 2), ("±", "spread", 1e3, 2), ("% of a step", "ratio", 100, 1)]
    columns += [("state MiB", "state", 1 / MIB, 1)]
    text = f"{rows[0]['case']}.\n\n" + provider_table(rows, "value and gradient", columns, "training step, LoRA")
    times = {row["provider"]: row["value"] for row in rows if row["metric"] == "time"}
    faster = ((name, times["authors' CLoRA"] / time) for name, time in times.items() if name.startswith("NullSpace, "))
    texts = ", ".join(f"{name.partition(', ')[2]} {factor:.1f}" for name, factor in faster)
    text += f"\nTimes faster than the authors' loop, by basis: {texts}.\n"
    calibrations = select(results, phase="calibrate")
    if calibrations:
        text += f"\n`fl.calibrate` on {calibrations[0]['case']}, and plain passes over them:\n\n"
        text += provider_table(calibrations, "pass", [*SECONDS, ("× forward", "ratio", 1, 2)], "forward")
    return text


def memory_text(results: Results) -> str:
    rows = select(results, phase="step")
    columns = [(f"{metric} MiB", metric, 1 / MIB, 1) for metric in unique(row["metric"] for row in rows)]
    return (
        f"{rows[0]['case']}. Saved: distinct storages packed for the backward pass, without weights. Peak: of torch's "
        "allocator above what was allocated before the step; RSS: of a fresh process, likewise.\n\n"
    ) + provider_table(rows, "whole step", columns)


def qlora_text(results: Results) -> str:
    losses = nested(select(results, metric="loss"), "provider", "phase")
    columns = [(f"{metric} MiB", metric, 1 / MIB, 1) for metric in ("weights", "saved", "peak")]
    last = {name: " ".join(number(row["value"]) for row in steps.values()) for name, steps in losses.items()}
    rows = select(results, phase="step")
    return (
        f"{rows[0]['case']}. Weights: of the frozen linear layers, scales included. Saved: for the backward pass. "
        "Peak: of forward and backward. Seconds: median, the first step left out.\n\n"
    ) + provider_table(rows, "base", [*columns, ("s/step", "time", 1, 2)], last=last)


def dispatch_text(results: Results) -> str:
    rows = select(results, metric="time")
    columns = [("µs", "time", 1e6, 1), ("±", "spread", 1e6, 1), ("× bare", "ratio", 1, 2)]
    text = f"Forward and backward of one tiny layer, {rows[0]['case']}.\n\n"
    return text + provider_table(rows, "provider", columns, rows[0]["provider"])


def host_bench_text(results: Results) -> str:
    launches = {row["provider"]: row["value"] for row in select(results, metric="launches")}
    times = nested(select(results, metric="time"), "provider", "phase")
    frozen = times.pop(FROZEN)
    over = {name: [each[phase]["value"] - frozen[phase]["value"] for phase in frozen] for name, each in times.items()}
    rows = []
    for name, seconds in over.items():
        share = seconds[-1] / over[PEFT][-1] if PEFT in over else None
        rows.append([name, *(number(t * 1e6, 0) for t in seconds), number(share), number(launches.get(name))])
    text = f"{results['rows'][0]['case']}. Per adapted layer, without a card: what the host does.\n\n"
    return text + table(["µs over frozen", "forward", "backward", "both", "× PEFT", "Triton's launches"], rows)


def penalised_text(results: Results) -> str:
    """Each penalty, grouped and in the pass: counted operations, bytes and FLOPs, and a predicted time."""
    step = select(results, phase="step")[0]["value"]
    forms: dict[str, tuple[str, float, str]] = {
        "held": ("MiB kept", MIB, ".0f"), "operations": ("torch operations", 1, ".0f"), "moved": ("GB", 1e9, ".2f"),
        "FLOPs": ("GFLOP", 1e9, ".0f"), "predicted time": ("of the step's time", step, ".2%"),
    }  # fmt: skip
    cells: dict[str, dict[str, list[str]]] = {}
    for row in select(results, phase="penalty"):
        _, unit, form = forms[row["metric"]]
        cells.setdefault(row["case"], {}).setdefault(row["metric"], []).append(f"{row['value'] / unit:{form}}")
    lines = [
        [name, of["held"][0], *(" → ".join(of[metric]) for metric in forms if metric != "held")]
        for name, of in cells.items()
    ]
    text = (
        "Counted and predicted, not timed: 8192 tokens, rank 16, the seven linear layers of 32 blocks, an H100 at the "
        "rates of [Predictions for GPUs](static.md), nothing for launches and tails. Two figures: all layers at once "
        "(grouped) → in the kernels' passes. Bytes of the kernels are in closed form, operations and bytes of torch "
        "are counted on tensors without storage.\n\n"
    )
    return text + table(["penalty", *(title for title, *_ in forms.values())], lines)


def check_text(results: Results) -> str:
    """How near each kernel's worst result comes to its limit; what is over it or without a result is in the notes."""
    rows = []
    for kernel, cases in nested(select(results, phase="check"), "provider", "case").items():
        right = [row["value"] for row in cases.values() if row["value"] is not None and row["value"] <= 1]
        rows.append([kernel, f"{len(right)} of {len(cases)}", number(max(right, default=None))])
    return table(["kernel", "right", "worst error of these, of the limit"], rows)


def host_text(results: Results) -> str:
    """What the host takes to issue a layer's work."""
    rows = select(results, phase="both", metric="host time")
    cells = pivot(rows, "provider", "provider", "case", lambda r: number(r["value"] * 1e6, 0))
    return cells and f"\nThe host's time for the same, µs:\n\n{cells}"


#: kind -> (title, text).
SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "check": ("The kernels against float64", check_text),
    "step": ("One training step", step_text),
    "layer": ("One layer", layer_text),
    "sweep": ("One layer, by rank and by tokens", layer_text),
    "penalty": ("Penalties", penalty_text),
    "memory": ("Memory", memory_text),
    "qlora": ("QLoRA", qlora_text),
    "dispatch": ("Dispatch", dispatch_text),
    "host": ("Host time on the CUDA path", host_bench_text),
    "penalised": ("Penalties of a step of Llama-3-8B, predicted", penalised_text),
}


def section(results: Results) -> str:
    """What a benchmark prints: its tables and notes."""
    _, write = SECTIONS[results["kind"]]
    return write(results) + "".join(f"\nNote: {note}\n" for note in results["notes"])
