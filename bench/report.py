"""Every page from the JSON in bench/results: ``python -m bench report [--check]``.

Written are docs/benchmarks.md and docs/static.md, and the text between the marks of README.md and docs/peft.md.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from forgetless.files import write_atomically

from .harness import FROZEN, OURS, PEFT, RESULTS, ROOT, Parser, Results, read, select
from .tables import (
    NONE,
    SECTIONS,
    clora_speedup,
    host_overheads,
    host_share,
    layer_verdict,
    lora_times,
    nested,
    number,
    pivot,
    ratio,
    section,
    source,
    step_shares,
    table,
    unique,
)

BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
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
    assumed = nested(select(results, phase="assumed"), "provider", "metric")
    sizes = next(iter(results["cases"].values()))
    times: dict[str, dict[str, float]] = {}
    for row in select(results, metric="predicted time"):
        of = times.setdefault(row["case"], {})
        of[row["provider"]] = of.get(row["provider"], 0.0) + row["value"]
    (frozen, floor), *designs = times.items()
    rates = (f"{a['products']['value'] / 1e12:.0f}, {a['memory']['value'] / 1e12:.2f}" for a in assumed.values())
    rows = [["assumed TFLOP/s, TB/s", *rates], [f"{frozen}, µs", *(f"{time * 1e6:.0f}" for time in floor.values())]]
    rows += [[design, *(f"+{100 * (of[card] / floor[card] - 1):.1f} %" for card in floor)] for design, of in designs]
    cards = [f"{a['products']['case']} ({card})" for card, a in assumed.items()]
    return (
        f"\n## Predicted times\n\nOne layer, M={sizes['M']}, N={sizes['N']}, K={sizes['K']}, R={sizes['R']}, bfloat16, "
        "forward and backward: the predicted overhead of whole designs over the frozen layer. A kernel takes the "
        "longer of its FLOPs and its bytes at the assumed rates; launches and tails take nothing; every matrix crosses "
        "the bus once; partial sums are written to memory and read back from L2; cuBLAS is no faster.\n\n"
        + table(["design", *cards], rows)
        + "\nThe JSON has every kernel's tile, bytes, registers and predicted time.\n"
        + f"\n{source(results, path)}\n"
    )


def targets_text(results: Results, path: Path) -> str:
    counts: dict[tuple[str, str], dict[str, float]] = {}
    for row in results["rows"]:
        of = counts.setdefault((row["phase"], row["provider"]), {})
        of[row["metric"]] = of.get(row["metric"], 0) + row["value"]
    rows = [{"phase": version, "provider": card, **of} for (version, card), of in counts.items()]
    return (
        "\n## Compiled\n\nKernels compiled for each card / with a problem: too much shared memory, a spill, "
        "products off the tensor cores, multiply-adds or stores missing, or a failure to compile. The tests compile a "
        "subset.\n\n"
        + pivot(rows, "", "phase", "provider", lambda of: f"{of['compiled']} / {of['problems']}")
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
    counts: dict[str, dict[tuple[str, str], int]] = {}
    for row in select(results, phase="tests"):
        counts.setdefault(row["case"], {})[row["provider"], row["metric"]] = row["value"]
    order = [(who, outcome) for who in ("swapped in", PEFT) for outcome in ("passed", "skipped", "failed")]
    rows = [[f"`{name}`", *(f"{of.get(key, 0):,}" for key in order)] for name, of in counts.items()]
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
    for kind, (title, _) in SECTIONS.items():
        text += f"\n## {title}\n"
        paths = sorted(RESULTS.glob(f"{kind}-*.json"), key=lambda path: (not path.stem.endswith("-cpu"), path.name))
        if not paths:
            text += f"\nNot measured yet: `python -m bench {'layer --sweep' if kind == 'sweep' else kind}`.\n"
        for path in paths:
            results = read(path)
            on_gpu |= results["machine"]["device"] != "cpu"
            text += f"\n`{results['command']}`; {source(results, path)}.\n\n{section(results)}"
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
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, fresh)
    print(f"written: {', '.join(names) or 'nothing, all is up to date'}")
    return 0
