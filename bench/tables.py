"""The tables of one result file, in Markdown: what a benchmark prints, and what the pages repeat.

Ratios are computed here, from the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bytes import MIB
from .harness import FROZEN, OURS, PEFT, Results, Row, median_and_spread, overhead, select
from .shapes import Case, work

NONE = "–"
#: Whose overhead ours is compared with.
RIVALS = {"lora": PEFT, "curlora": "authors' CURLoRA"}
ADAPTERS = ("eager PyTorch", "LoRAFusion-style", PEFT)
#: Line -> title of a column -> text.
Cells = dict[str, dict[str, str]]
#: Title of a column -> metric (also "spread" of the time, and "ratio" to the floor's time), scale, digits.
Columns = dict[str, tuple[str, float, int]]


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def grid(head: str, cells: Mapping[str, Mapping[str, str]]) -> str:
    """The cells as a table, lines and columns in their order; empty without cells."""
    columns = unique(title for line in cells.values() for title in line)
    lines = [[name, *(line.get(title, NONE) for title in columns)] for name, line in cells.items()]
    return table([head, *columns], lines) if cells else ""


def number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))


def nested(rows: Iterable[Row], first: str = "case", second: str = "provider") -> dict[str, dict[str, Row]]:
    """case -> provider -> row, of rows of one phase and metric."""
    result: dict[str, dict[str, Row]] = {}
    for row in rows:
        result.setdefault(row[first], {})[row[second]] = row
    return result


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


def floor_of(name: str, names: Iterable[str], floor: str = FROZEN) -> str:
    """What the provider's time is a multiple of: the floor of its own process, if that has one."""
    own = floor + "".join(name.partition(" @ ")[1:])
    return own if own in names else floor


def provider_cells(rows: Iterable[Row], columns: Columns, floor: str = "") -> Cells:
    """A line for each provider."""
    values: dict[str, dict[str, float]] = {}
    for row in rows:
        more = {"spread": row["spread"]} if "spread" in row else {}
        values.setdefault(row["provider"], {}).update({row["metric"]: row["value"], **more})
    if floor:
        for name, of in values.items():
            of["ratio"] = of["time"] / values[floor_of(name, values, floor)]["time"]
    return {
        name: {title: number(of[key] * scale if key in of else None, n) for title, (key, scale, n) in columns.items()}
        for name, of in values.items()
    }


SECONDS: Columns = {"seconds": ("time", 1.0, 3), "±": ("spread", 1.0, 3)}


def mib_columns(*metrics: str) -> Columns:
    return {f"{metric} MiB": (metric, 1 / MIB, 1) for metric in metrics}


# ------------------------------------------------------------------------------------- one training step


def step_text(results: Results) -> str:
    rows = select(results, phase="step", metric="time")
    times = {row["provider"]: row for row in rows}
    text = f"{rows[0]['case']}; forward and backward, {rows[0]['count']} interleaved rounds.\n\n"
    if "against" in results:  # the JSON has the times
        text += against_text(results, "step").lstrip()
    else:
        text += grid("provider", provider_cells(rows, {**SECONDS, "× frozen": ("ratio", 1, 2)}, FROZEN))
    shares = []
    for name, time in times.items():
        library, _, dropout = name.partition(", dropout ")
        if library == OURS and dropout and f"{PEFT}, dropout {dropout}" in times:
            part = overhead(time, times[f"{PEFT}, dropout {dropout}"], times[FROZEN])
            share = "within the noise" if part is None else f"{part[0]:.2f} ± {part[1]:.2f}"
            shares.append(f"{share} at dropout {dropout}")
    if shares:
        text += f"\nOur overhead over the frozen model is {', '.join(shares)} of PEFT's, within every round.\n"
    return text


def against_text(results: Results, phase: str) -> str:
    """This checkout's time over the other commit's, within every round."""
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
    """Times the frozen layer."""
    return times[provider]["value"] / times[floor_of(provider, times)]["value"]


def layer_cell(times: Mapping[str, Row], provider: str, other: str) -> str:
    if provider == FROZEN:
        return f"{times[FROZEN]['value'] * 1e3:.3g} ms"
    part = overhead(times[provider], times[other], times[FROZEN]) if other in times else None
    return f"{number(ratio(times, provider))} ({number(part and part[0])})"


def grouped(results: Results, *keys: str) -> dict[tuple[Any, ...], list[str]]:
    """What cases have in these fields -> their names."""
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
    more = ["shape"] if results["kind"] == "sweep" else []
    for (method, dtype, dropout, *_), names in grouped(results, "method", "dtype", "dropout", *more).items():
        cases = [results["cases"][name] for name in names]
        varied = [key for key in ("M", "R") if len({case[key] for case in cases}) > 1]
        cells: Cells = {}
        least: dict[str, str] = {}
        for name, case in zip(names, cases, strict=True):
            title = title_of(case, varied)
            for provider in times[name]:
                cells.setdefault(provider, {})[title] = layer_cell(times[name], provider, RIVALS[method])
            if dtype in peaks:
                flops, size = work(Case(**{key: case[key] for key in Case.__dataclass_fields__}))
                seconds = max(flops / (peaks[dtype] * 1e12), size / (peaks["bytes"] * 1e9))
                least[title] = number(seconds / times[name][FROZEN]["value"])
        fixed = "".join(f", {key}={cases[0][key]}" for key in ("M", "R") if key not in varied)
        text += f"\n**{method}, {dtype}{f', dropout {dropout:g}' if method == 'lora' else ''}{fixed}**\n\n"
        text += grid("provider", {**cells, **({"at the machine's peaks": least} if least else {})})
    text += "".join(f"\n{line}\n" for line in layer_verdict(results))
    return text + against_text(results, "both") + host_text(results) + saved_text(results)


def host_text(results: Results) -> str:
    """What the host takes to issue a layer's work."""
    times = nested(select(results, phase="both", metric="host time"), "provider", "case")
    cells = {name: {case: number(row["value"] * 1e6, 0) for case, row in of.items()} for name, of in times.items()}
    return f"\nThe host's time for the same, µs:\n\n{grid('provider', cells)}" if cells else ""


def saved_text(results: Results) -> str:
    """What each provider saves for the backward pass at each dropout; the sweep's rows are in its JSON."""
    shapes = unique(title_of(case) for case in results["cases"].values())
    lines: dict[str, dict[str, list[str]]] = {}
    for row in select(results, phase="both", metric="saved") if results["kind"] == "layer" else []:
        case = results["cases"][row["case"]]
        if not row["provider"].startswith(FROZEN):
            line = f"{case['method']}, {case['dtype']}: {row['provider']}"
            of = lines.setdefault(line, {shape: [] for shape in shapes})
            of[title_of(case)].append(number(row["value"] / MIB))
    cells = {name: {shape: " / ".join(unique(of)) or NONE for shape, of in lines[name].items()} for name in lines}
    title = "\nSaved for the backward pass, MiB, at dropout 0 / 0.1 where they differ:\n\n"
    return title + grid("", dict(sorted(cells.items()))) if lines else ""


def lora_times(results: Results, *keys: str) -> dict[tuple[Any, ...], list[dict[str, Row]]]:
    """What cases have in these fields -> for each LoRA case its providers' times."""
    times = nested(select(results, phase="both", metric="time"))
    ours = {name for name, case in results["cases"].items() if case["method"] == "lora" and OURS in times[name]}
    groups = {key: [times[name] for name in names if name in ours] for key, names in grouped(results, *keys).items()}
    return {key: cases for key, cases in groups.items() if cases}


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
    columns: Columns = {"ms": ("time", 1e3, 2), "±": ("spread", 1e3, 2), "% of a step": ("ratio", 100, 1)}
    cells = provider_cells(rows, {**columns, **mib_columns("state")}, "training step, LoRA")
    times = {row["provider"]: row["value"] for row in rows if row["metric"] == "time"}
    faster = ((name, times["authors' CLoRA"] / time) for name, time in times.items() if name.startswith("NullSpace, "))
    texts = ", ".join(f"{name.partition(', ')[2]} {factor:.1f}" for name, factor in faster)
    text = f"{rows[0]['case']}.\n\n{grid('value and gradient', cells)}"
    text += f"\nTimes faster than the authors' loop, by basis: {texts}.\n"
    calibrations = select(results, phase="calibrate")
    if calibrations:
        text += f"\n`fl.calibrate` on {calibrations[0]['case']}, and plain passes over them:\n\n"
        text += grid("pass", provider_cells(calibrations, {**SECONDS, "× forward": ("ratio", 1, 2)}, "forward"))
    return text


def memory_text(results: Results) -> str:
    rows = select(results, phase="step")
    return (
        f"{rows[0]['case']}. Saved: distinct storages packed for the backward pass, without weights. Peak: of torch's "
        "allocator above what was allocated before the step; RSS: of a fresh process, likewise.\n\n"
    ) + grid("whole step", provider_cells(rows, mib_columns(*unique(row["metric"] for row in rows))))


def qlora_text(results: Results) -> str:
    rows = select(results, phase="step")
    cells = provider_cells(rows, {**mib_columns("weights", "saved", "peak"), "s/step": ("time", 1, 2)})
    for name, steps in nested(select(results, metric="loss"), "provider", "phase").items():
        cells[name]["loss of each step"] = " ".join(number(row["value"]) for row in steps.values())
    return (
        f"{rows[0]['case']}. Weights: of the frozen linear layers, scales included. Saved: for the backward pass. "
        "Peak: of forward and backward. Seconds: median, the first step left out.\n\n"
    ) + grid("base", cells)


def dispatch_text(results: Results) -> str:
    rows = select(results, metric="time")
    columns: Columns = {"µs": ("time", 1e6, 1), "±": ("spread", 1e6, 1), "× bare": ("ratio", 1, 2)}
    text = f"Forward and backward of one tiny layer, {rows[0]['case']}.\n\n"
    return text + grid("provider", provider_cells(rows, columns, rows[0]["provider"]))


def host_cells(results: Results) -> Cells:
    """Per adapted layer, what the host takes over the frozen model."""
    launches = {row["provider"]: row["value"] for row in select(results, metric="launches")}
    times = nested(select(results, metric="time"), "provider", "phase")
    frozen = times.pop(FROZEN)
    over = {name: {p: of[p]["value"] - frozen[p]["value"] for p in frozen} for name, of in times.items()}
    return {
        name: {
            **{phase: number(seconds * 1e6, 0) for phase, seconds in of.items()},
            "× PEFT": number(of["both"] / over[PEFT]["both"] if PEFT in over else None),
            "Triton's launches": number(launches.get(name)),
        }
        for name, of in over.items()
    }


def host_bench_text(results: Results) -> str:
    text = f"{results['rows'][0]['case']}. Per adapted layer, without a card: what the host does.\n\n"
    return text + grid("µs over frozen", host_cells(results))


def penalised_cells(results: Results) -> Cells:
    """Each penalty, grouped and in the pass: counted operations, bytes and FLOPs, and a predicted time."""
    step = select(results, phase="step")[0]["value"]
    forms: dict[str, tuple[str, float, str]] = {
        "kept": ("MiB kept", MIB, ".0f"), "operations": ("torch operations", 1, ".0f"), "moved": ("GB", 1e9, ".2f"),
        "FLOPs": ("GFLOP", 1e9, ".0f"), "predicted time": ("of the step's time", step, ".2%"),
    }  # fmt: skip
    cells: Cells = {}
    for metric, (title, unit, form) in forms.items():
        for name, ways in nested(select(results, phase="penalty", metric=metric)).items():
            texts = [f"{row['value'] / unit:{form}}" for row in ways.values()]
            cells.setdefault(name, {})[title] = texts[0] if metric == "kept" else " → ".join(texts)
    return cells


def penalised_text(results: Results) -> str:
    return (
        "Counted and predicted, not timed: 8192 tokens, rank 16, the seven linear layers of 32 blocks, an H100 at the "
        "rates of [Predictions for GPUs](static.md), nothing for launches and tails. Two figures: all layers at once "
        "(grouped) → in the kernels' passes. Bytes of the kernels are in closed form, operations and bytes of torch "
        "are counted on tensors without storage.\n\n"
    ) + grid("penalty", penalised_cells(results))


def check_text(results: Results) -> str:
    """How near each kernel's worst result comes to its limit; what is over it or without a result is in the notes."""
    cells: Cells = {}
    for kernel, cases in nested(select(results, phase="check"), "provider", "case").items():
        right = [row["value"] for row in cases.values() if row["value"] is not None and row["value"] <= 1]
        cells[kernel] = {"right": f"{len(right)} of {len(cases)}"}
        cells[kernel]["worst error of these, of the limit"] = number(max(right, default=None))
    return grid("kernel", cells)


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
