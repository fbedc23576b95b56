"""Every table and page from the JSON in bench/results: ``python -m bench report [--check]``.

Written are docs/benchmarks.md and docs/static.md, and the text between the marks of README.md and docs/peft.md.
Ratios are computed here, from the rows.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .bytes import MIB
from .harness import (
    FROZEN,
    OURS,
    PEFT,
    RESULTS,
    ROOT,
    Parser,
    Results,
    Row,
    median_and_spread,
    overhead,
    read,
    select,
    write_file,
)
from .shapes import Case, rival, work

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
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


def by_case(rows: Iterable[Row]) -> dict[str, dict[str, Row]]:
    """case -> provider -> row, of rows of one phase and metric."""
    result: dict[str, dict[str, Row]] = {}
    for row in rows:
        result.setdefault(row["case"], {})[row["provider"]] = row
    return result


def source(results: Results, path: Path | None = None) -> str:
    """Where the numbers come from, in one line."""
    machine, versions = results["machine"], results["versions"]
    commit, plus, _ = (results["commit"] or "unknown").partition("+")
    parts = []
    if machine:
        threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
        parts.append(machine["gpu"] or f"{machine['processor']}, {threads}")
    parts.append(", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "peft") if name in versions))
    parts.append(f"commit {commit[:12]}{' with changes' if plus else ''}, {results['created']}")
    against = f", against commit {results['against'][:12]}" if "against" in results else ""
    parts.append(f"`bench/results/{path.name}`" if path else "")
    return "; ".join(filter(None, parts)) + against


def provider_table(
    rows: Iterable[Row],
    first: str,
    columns: Sequence[tuple[str, str, float, int]],
    floor: str | None = None,
    last: Mapping[str, str] | None = None,
) -> str:
    """A line for each provider.

    Args:
        columns: title, metric (also "spread" of the time, and "ratio" to the time of ``floor``), scale, digits.
        last: provider -> the cell after the columns.
    """
    cells: dict[str, dict[str, float]] = {}
    for row in rows:
        cell = cells.setdefault(row["provider"], {})
        cell[row["metric"]] = row["value"]
        if "spread" in row:
            cell["spread"] = row["spread"]
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


def step_shares(results: Results) -> list[str]:
    """Our share of PEFT's overhead over the frozen step, by dropout."""
    times = {row["provider"]: row for row in select(results, phase="step", metric="time")}
    texts = []
    for name in times:
        library, _, dropout = name.partition(", dropout ")
        if library == OURS and dropout and f"{PEFT}, dropout {dropout}" in times:
            part = overhead(times[name], times[f"{PEFT}, dropout {dropout}"], times[FROZEN])
            text = "within the noise" if part is None else f"{part[0]:.2f} ± {part[1]:.2f}"
            texts.append(f"{text} at dropout {dropout}")
    return texts


def step_text(results: Results) -> str:
    times = select(results, phase="step", metric="time")
    text = f"{times[0]['case']}; forward and backward, {len(times[0]['rounds'])} interleaved rounds.\n\n"
    text += provider_table(times, "provider", [*SECONDS, ("× frozen", "ratio", 1, 2)], FROZEN)
    text += against_text(results, "step")
    if shares := step_shares(results):
        text += f"\nOur overhead over the frozen model is {', '.join(shares)} of PEFT's, within every round.\n"
    return text


def against_text(results: Results, phase: str) -> str:
    """This checkout's times over the other commit's, within every round."""
    rows = []
    for case, times in by_case(select(results, phase=phase, metric="time")).items():
        for name in times:
            ours, mark, _ = name.partition(" @ ")
            if mark:
                pairs = zip(times[ours]["rounds"], times[name]["rounds"], strict=True)
                middle, spread = median_and_spread([a / b for a, b in pairs])
                rows.append([case, ours, f"{middle:.3f} ± {spread:.3f}"])
    if not rows:
        return ""
    return f"\nThis checkout's time over commit {results['against'][:8]}'s:\n\n" + table(["case", "", "ratio"], rows)


def by_provider(rows: Iterable[Row]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for row in rows:
        result.setdefault(row["provider"], []).append(row["value"])
    return result


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
    sizes = "".join(f" {key}={case[key]}" for key in more)
    return f"{case['models'].split(',')[0]} {case['projection']} {case['N']}×{case['K']}{sizes}"


def layer_text(results: Results) -> str:
    times = by_case(select(results, phase="both", metric="time"))
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
            least = [
                fastest(case, peaks) / times[name][FROZEN]["value"] for name, case in zip(names, cases, strict=True)
            ]
            rows.append(["at the machine's peaks", *map(number, least)])
        fixed = [key for key in ("M", "R") if len({case[key] for case in cases}) == 1]
        titles = [title_of(case, [key for key in ("M", "R") if key not in fixed]) for case in cases]
        dropped = f", dropout {dropout:g}" if method == "lora" else ""
        text += f"\n**{method}, {dtype}{dropped}{''.join(f', {key}={cases[0][key]}' for key in fixed)}**\n\n"
        text += table(["provider", *titles], rows)
    text += "".join(f"\n{line}\n" for line in layer_verdict(results))
    return text + against_text(results, "both") + saved_text(results)


def saved_text(results: Results) -> str:
    """What each provider saves for the backward pass; the sweep's rows are in its JSON."""
    saved = by_case(select(results, phase="both", metric="saved"))
    rows, names = [], unique(name for name in saved if results["kind"] == "layer")
    for provider in unique(p for name in names for p in saved[name] if not p.startswith(FROZEN)):
        for (method, dtype, dropout), cases in layer_groups(results).items():
            sizes = [saved[name][provider]["value"] / MIB for name in cases if provider in saved.get(name, {})]
            if len(sizes) == len(cases):
                rows.append([f"{method}, {dtype}, dropout {dropout:g}: {provider}", *(number(v, 3) for v in sizes)])
    if not rows:
        return ""
    shapes = unique(title_of(case) for case in results["cases"].values())
    return "\nSaved for the backward pass, MiB:\n\n" + table(["", *shapes], sorted(rows))


def fastest(case: Mapping[str, Any], peaks: Mapping[str, float]) -> float:
    """Seconds of the adapted layer at the machine's peaks."""
    flops, size = work(Case(**{key: case[key] for key in Case.__dataclass_fields__}))
    return max(flops / (peaks[case["dtype"]] * 1e12), size / (peaks["bytes"] * 1e9))


def lora_times(results: Results) -> dict[float, list[dict[str, Row]]]:
    """dropout -> for each LoRA case its providers' times."""
    times = by_case(select(results, phase="both", metric="time"))
    result: dict[float, list[dict[str, Row]]] = {}
    for name, case in results["cases"].items():
        if case["method"] == "lora" and OURS in times[name]:
            result.setdefault(case["dropout"], []).append(times[name])
    return result


def layer_verdict(results: Results) -> list[str]:
    """How often each of the others has the smaller median."""
    lines = []
    for dropout, cases in lora_times(results).items():
        texts = []
        for name in ADAPTERS:
            both = [times for times in cases if name in times]
            if both:
                faster = sum(times[name]["value"] < times[OURS]["value"] for times in both)
                texts.append(f"{name} is faster than forgetless in {faster} of {len(both)} cases")
        lines.append(f"Dropout {dropout:g}: {', '.join(texts)}.")
    return [line for line in lines if "cases" in line]


# --------------------------------------------------------------------------------------- the others


def penalty_text(results: Results) -> str:
    rows = select(results, phase="penalty") + select(results, phase="step")
    columns = [("ms", "time", 1e3, 2), ("±", "spread", 1e3, 2), ("% of a step", "ratio", 100, 1)]
    columns += [("state MiB", "state", 1 / MIB, 1)]
    text = f"{rows[0]['case']}.\n\n" + provider_table(rows, "value and gradient", columns, "training step, LoRA")
    text += f"\nTimes faster than the authors' loop, by basis: {clora_speedup(results)}.\n"
    calibrations = select(results, phase="calibrate")
    if calibrations:
        text += f"\n`fl.calibrate` on {calibrations[0]['case']}, and plain passes over them:\n\n"
        text += provider_table(calibrations, "pass", [*SECONDS, ("× forward", "ratio", 1, 2)], "forward")
    return text


def clora_speedup(results: Results) -> str:
    times = {row["provider"]: row["value"] for row in select(results, phase="penalty", metric="time")}
    factors = {name: times["authors' CLoRA"] / value for name, value in times.items() if name.startswith("NullSpace")}
    return ", ".join(f"{name.partition(', ')[2]} {factor:.1f}" for name, factor in factors.items())


def memory_text(results: Results) -> str:
    rows = select(results, phase="step")
    columns = [(f"{metric} MiB", metric, 1 / MIB, 1) for metric in unique(row["metric"] for row in rows)]
    return (
        f"{rows[0]['case']}. Saved: distinct storages packed for the backward pass, without weights. Peak: of torch's "
        "allocator above what was allocated before the step; RSS: of a fresh process, likewise.\n\n"
    ) + provider_table(rows, "whole step", columns)


def memory_shares(results: Results) -> list[list[str]]:
    """Rows of README: our saved bytes over PEFT's, all of them and those beyond the frozen model's."""
    saved = {row["provider"]: row["value"] for row in select(results, phase="step", metric="saved")}
    pairs = [(name, name.replace(OURS, PEFT)) for name in saved if name.startswith(f"{OURS}, dropout")]
    rows = []
    for title, floor in (
        ("training step: bytes saved / PEFT's", 0),
        ("the same beyond the frozen model's", saved[FROZEN]),
    ):
        shares = [(a, (saved[a] - floor) / (saved[b] - floor)) for a, b in pairs if b in saved]
        rows.append([title, ", ".join(f"{value:.2f} at {name.partition(', ')[2]}" for name, value in shares)])
    return [row for row in rows if row[1]]


def qlora_text(results: Results) -> str:
    losses = by_provider(select(results, metric="loss"))
    columns = [(f"{metric} MiB", metric, 1 / MIB, 1) for metric in ("weights", "saved", "peak")]
    last = {name: " ".join(number(loss) for loss in values) for name, values in losses.items()}
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


def host_overheads(results: Results) -> dict[str, dict[str, float]]:
    """provider -> phase -> seconds of the host over the frozen model, per layer."""
    times: dict[str, dict[str, float]] = {}
    for row in select(results, metric="time"):
        times.setdefault(row["provider"], {})[row["phase"]] = row["value"]
    frozen = times.pop(FROZEN)
    return {name: {phase: value - frozen[phase] for phase, value in each.items()} for name, each in times.items()}


def host_share(results: Results, name: str) -> float | None:
    """A provider's overhead over PEFT's, forward and backward together."""
    over = host_overheads(results)
    return over[name]["both"] / over[PEFT]["both"] if PEFT in over else None


def host_text(results: Results) -> str:
    rows = select(results, metric="time")
    launches = {row["provider"]: f"{row['value']:.2f}" for row in select(results, metric="launches")}
    lines = []
    for name, over in host_overheads(results).items():
        cells = [number(over[phase] * 1e6, 0) for phase in ("forward", "backward", "both")]
        lines.append([name, *cells, number(host_share(results, name)), launches.get(name, NONE)])
    titles = ["µs over frozen", "forward", "backward", "both", "× PEFT", "Triton's launches"]
    return f"{rows[0]['case']}. Per adapted layer, without a card: what the host does.\n\n" + table(titles, lines)


#: kind -> (title, text).
SECTIONS: dict[str, tuple[str, Callable[[Results], str]]] = {
    "step": ("One training step", step_text),
    "layer": ("One layer", layer_text),
    "sweep": ("One layer, by rank and by tokens", layer_text),
    "penalty": ("Penalties", penalty_text),
    "memory": ("Memory", memory_text),
    "qlora": ("QLoRA", qlora_text),
    "dispatch": ("Dispatch", dispatch_text),
    "host": ("Host time on the CUDA path", host_text),
}


def section(results: Results) -> str:
    """What a benchmark prints: its tables and notes."""
    _, write = SECTIONS[results["kind"]]
    return write(results) + "".join(f"\nNote: {note}\n" for note in results["notes"])


# ---------------------------------------------------------------------------- predicted and compiled


def static_page() -> str:
    """docs/static.md"""
    text = (
        "# Predicted and compiled, not measured\n\n"
        "Written by `python -m bench report` from `bench/results/static.json` (`make static`) and "
        "`bench/results/targets.json` (`make targets`). No GPU was used.\n"
    )
    for name, write in (("static.json", static_text), ("targets.json", targets_text)):
        if (RESULTS / name).exists():
            text += write(read(RESULTS / name), RESULTS / name)
    return text


def static_text(results: Results, path: Path) -> str:
    assumed: dict[str, dict[str, Row]] = {}
    for row in select(results, phase="assumed"):
        assumed.setdefault(row["provider"], {})[row["metric"]] = row
    sizes = next(iter(results["cases"].values()))
    times: dict[tuple[str, str], float] = {}
    for row in select(results, metric="predicted time"):
        key = row["case"], row["provider"]
        times[key] = times.get(key, 0.0) + row["value"]
    designs = unique(case for case, _ in times)
    frozen = designs[0]
    rows = [["assumed TFLOP/s, TB/s", *(f"{a['products']['value'] / 1e12:.0f}, {a['memory']['value'] / 1e12:.2f}"
            for a in assumed.values())]]  # fmt: skip
    rows.append([f"{frozen}, µs", *(f"{times[frozen, card] * 1e6:.0f}" for card in assumed)])
    for design in designs[1:]:
        rows.append([design, *(f"+{100 * (times[design, card] / times[frozen, card] - 1):.1f} %" for card in assumed)])
    text = (
        f"\n## Predicted times\n\nOne layer, M={sizes['M']}, N={sizes['N']}, K={sizes['K']}, R={sizes['R']}, bfloat16, "
        "forward and backward: the predicted overhead of whole designs over the frozen layer. A kernel takes the "
        "longer of its FLOPs and its bytes at the assumed rates; launches and tails take nothing; every matrix crosses "
        "the bus once; partial sums are written to memory and read back from L2; cuBLAS is no faster.\n\n"
    )
    cards = [f"{a['products']['case']} ({card})" for card, a in assumed.items()]
    text += table(["design", *cards], rows)
    return (
        text + f"\nThe JSON has every kernel's tile, bytes, registers and predicted time.\n\n{source(results, path)}\n"
    )


def targets_text(results: Results, path: Path) -> str:
    counts: dict[tuple[str, str, str], float] = {}
    for row in results["rows"]:
        if row["metric"] in ("compiled", "problems"):
            key = row["phase"], row["provider"], row["metric"]
            counts[key] = counts.get(key, 0) + row["value"]
    cards = unique(card for _, card, _ in counts)
    rows = [
        [version, *(f"{counts[version, c, 'compiled']} / {counts[version, c, 'problems']}" for c in cards)]
        for version in unique(version for version, _, _ in counts)
    ]
    return (
        "\n## Compiled\n\nKernels compiled for each card / with a problem: too much shared memory, a spill, "
        "products off the tensor cores, multiply-adds or stores missing, or a failure to compile. The tests compile a "
        "subset.\n\n"
        + table(["", *cards], rows)
        + "".join(f"\n{note}\n" for note in results["notes"])
        + f"\n{source(results, path)}\n"
    )


# ------------------------------------------------------------------------------------------ README


def compare_section(results: dict[str, Any]) -> str:
    from forgetless.study.tables import main_table

    rows = main_table(results)
    machine, options = results["machine"], results["options"]
    seeds = ", ".join(str(seed) for seed in options["seeds"])
    return (
        "**What each method learnt and forgot** (`make demo`). One adapter learns both tasks in sequence; losses are "
        f"nats per token on held-out text, in brackets the change; {options['steps']} steps a task, seed {seeds}. "
        "One short run on a small model: an example of the instrument, not a ranking of methods.\n\n"
        + table(list(rows.columns), [list(row) for row in rows.rows])
        + f"\n{results['model']['name']}, {options['dtype']}; {machine['processor']}, {machine['cores']} cores; "
        f"`bench/results/compare-smollm2.json`.\n"
    )


def layer_section(results: Results) -> str:
    by_dropout = lora_times(results)
    providers = unique(p for cases in by_dropout.values() for times in cases for p in times)
    rows = []
    for provider in providers:
        cells = []
        for cases in by_dropout.values():
            ratios = [ratio(times, provider) for times in cases if provider in times]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else NONE
            cells.append(text + (f", {len(ratios)} cases" if 0 < len(ratios) < len(cases) else ""))
        rows.append([provider, *cells])
    columns = [f"dropout {p:g}, {len(cases)} cases" for p, cases in by_dropout.items()]
    verdict = " ".join(layer_verdict(results))
    return (
        "**One layer**, times the frozen layer, median over shapes and dtypes (lowest to highest). "
        f"{verdict}\n\n{table(['provider', *columns], rows)}\n{source(results)}.\n"
    )


def rest_section(results: Mapping[str, Results]) -> str:
    """What the benchmarks of a whole model say, in a few rows."""
    rows: list[list[str]] = []
    if "step" in results:
        times = {row["provider"]: row for row in select(results["step"], phase="step", metric="time")}
        for dropout in unique(name.partition(", ")[2] for name in times if name.startswith(f"{OURS}, ")):
            names = [n for who in (OURS, PEFT, f"{PEFT} bf16 adapters") if (n := f"{who}, {dropout}") in times]
            title = f"training step, {dropout}: × frozen, {' / '.join(name.partition(', ')[0] for name in names)}"
            rows.append([title, " / ".join(number(ratio(times, name)) for name in names)])
        if shares := step_shares(results["step"]):
            rows.append(["training step: our overhead / PEFT's, within rounds", ", ".join(shares)])
    if "penalty" in results:
        text = clora_speedup(results["penalty"])
        rows.append(["CLoRA's penalty: times faster than the authors' loop, by basis", text])
    if "memory" in results:
        rows += memory_shares(results["memory"])
    if "host" in results:
        names = [name for name in host_overheads(results["host"]) if name.startswith(OURS)]
        hosts = ", ".join(f"{name} {number(host_share(results['host'], name))}" for name in names)
        rows.append(["host time over frozen on the CUDA path, without a card: / PEFT's", hosts])
    if not rows:
        return ""
    text = table(["whole model", "measured"], rows)
    return f"{text}\nEvery row, model, machine and commit: [docs/benchmarks.md](docs/benchmarks.md).\n"


def readme_section() -> str:
    """The text between README's marks."""
    parts = []
    if (path := RESULTS / "compare-smollm2.json").exists():
        parts.append(compare_section(json.loads(path.read_text(encoding="utf-8"))))
    results = {kind: read(path) for kind in SECTIONS if (path := RESULTS / f"{kind}-cpu.json").exists()}
    if "layer" in results:
        parts.append(layer_section(results["layer"]))
    return "\n" + "\n".join(filter(None, [*parts, rest_section(results)])) + "\n"


# -------------------------------------------------------------------------------------- other pages


def suite_section() -> str:
    """What PEFT's own tests gave with every LoRA layer swapped in."""
    path = RESULTS / "peft-suite.json"
    results = read(path)
    tests = select(results, phase="tests")
    counts = {(row["case"], row["provider"], row["metric"]): row["value"] for row in tests}
    outcomes = ("passed", "skipped", "failed")
    rows = []
    for name in unique(row["case"] for row in tests):
        cells = [f"{counts.get((name, who, outcome), 0):,}" for who in ("swapped in", PEFT) for outcome in outcomes]
        rows.append([f"`{name}`", *cells])
    columns = ["PEFT's tests", "passed", "skipped", "failed", "PEFT alone: passed", "skipped", "failed"]
    differ = [f"`{row['case']}`, {row['provider']}: {row['metric']}" for row in select(results, phase="differ")]
    verdict = (
        f"Outcomes that differ: {'; '.join(differ)}."
        if differ
        else "Every test has the same outcome with and without swap-in."
    )
    text = f"\nPEFT {results['versions']['peft']}, LoRA configurations, without network. {verdict}\n\n"
    text += table(columns, rows)
    for outcome in ("failed", "skipped"):
        reasons = select(results, phase="reasons", metric=outcome)
        if reasons:
            rows = [[str(row["value"]), row["case"].replace("|", "\\|")] for row in reasons]
            text += "\n" + table([outcome, "reason that PEFT's tests give"], rows)
    names = {"op": "our op", "onto": "in place onto the frozen layer's result", "base": "the frozen layer alone"}
    rows = []
    for row in select(results, phase="forward passes"):
        if row["provider"] == PEFT:
            rows.append([f"{row['value']:,}", f"PEFT's own: {row['case']}"])
        elif row["case"] in names:
            rows.append([f"{row['value']:,}", names[row["case"]]])
    text += "\n" + table(["forward passes of swapped-in layers", "ran on"], rows)
    return f"{text}\n{source(results, path)}.\n\n"


HEAD = """# Benchmarks

Written by `python -m bench report` from the JSON in `bench/results`; change nothing here by hand. The providers of one
table ran interleaved in one process, one call of each per round, every round in another order. Times are medians, ± the
median absolute deviation. Compare within a table, never across machines. `-style` rows are our own code with that
project's order of operations; `tests/benchmarks` proves each provider equal to the reference. Rows of Unsloth-style and
of products alone (the eight matrix products without autograd) are of an earlier bench, which measured them too; so are
the command `lowrank` and the options `--curves` and `--no-compile`.
"""


def benchmarks_page() -> str:
    """docs/benchmarks.md"""
    text, on_gpu = HEAD, False
    for kind, (title, write) in SECTIONS.items():
        text += f"\n## {title}\n"
        paths = sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: (not path.stem.endswith("-cpu"), path.name))
        if not paths:
            text += f"\nNot measured yet: `python -m bench {'layer --sweep' if kind == 'sweep' else kind}`.\n"
        for path in paths:
            results = read(path)
            on_gpu |= results["machine"]["gpu"] is not None
            text += f"\n`{results['command']}`; {source(results, path)}.\n\n{write(results)}"
            text += "".join(f"\nNote: {note}\n" for note in results["notes"])
    if not on_gpu:
        text += (
            "\n## On GPUs\n\nNothing has been measured on a GPU yet. `python -m bench gpu` on a CUDA machine fills the "
            "tables in at most ten minutes,\ncorrectness checks first.\n"
        )
    return text


def between(page: str, text: str) -> str:
    """The page with this text between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + text + END + after


# ------------------------------------------------------------------------------------ command line

#: Page -> its new text from the old one; a page with marks that is not there is not made.
PAGES: dict[str, Callable[[str], str]] = {
    "docs/benchmarks.md": lambda _: benchmarks_page(),
    "docs/static.md": lambda _: static_page(),
    "README.md": lambda page: between(page, readme_section()),
    "docs/peft.md": lambda page: between(page, suite_section()),
}


def pages() -> dict[Path, tuple[str, str]]:
    """path -> the text it has, the text it should have."""
    result = {}
    for name, write in PAGES.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        if BEGIN in text or name in ("docs/benchmarks.md", "docs/static.md"):
            result[path] = text, write(text)
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="forgetless bench report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    options = parser.parse_args(arguments)
    stale = {path: fresh for path, (text, fresh) in pages().items() if text != fresh}
    names = [path.name for path in stale]
    if options.check:
        for name in names:
            print(f"{name} is not what python -m bench report writes", file=sys.stderr)
        return int(bool(stale))
    for path, fresh in stale.items():
        write_file(path, fresh.encode())
    print(f"written: {', '.join(names) or 'nothing, all is up to date'}")
    return 0
