"""Every page from the JSON in bench/results: ``python -m bench report [--check]``.

Written are docs/benchmarks.md and docs/static.md, and the text between the marks of README.md and docs/peft.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from forgetless.files import write_atomically

from .bytes import MIB
from .harness import FROZEN, OURS, PEFT, RESULTS, ROOT, Results, parse, read, select
from .tables import (
    NONE,
    SECTIONS,
    host_bench_text,
    layer_verdict,
    lora_times,
    nested,
    number,
    penalised_text,
    pivot,
    ratio,
    section,
    source,
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


def layer_section(results: Results) -> str:
    """Each provider's time over the frozen layer's: by dtype and dropout, the median over shapes, and the ends."""
    named = lora_times(results, "dtype", "dropout").items()
    groups = {f"{dtype}, dropout {dropout:g}": cases for (dtype, dropout), cases in named}
    rows = []
    for provider in unique(p for cases in groups.values() for case in cases for p in case if p != FROZEN):
        cells = []
        for cases in groups.values():
            ratios = [ratio(case, provider) for case in cases if provider in case]
            cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})" if ratios else NONE)
        rows.append([NAMES.get(provider, provider), *cells])
    return (
        f"**One layer**, forward and backward, times the frozen layer: median of {len(next(iter(groups.values())))} "
        f"shapes (lowest–highest). {' '.join(layer_verdict(results))}\n\n{table(['', *groups], rows)}"
    )


#: What README calls a provider.
NAMES = {
    "eager PyTorch": "eager PyTorch (float32 adapters)",
    "LoRAFusion-style": "a 20-line autograd function: LoRAFusion's order of products",
    PEFT: "PEFT (float32 adapters)",
}


def step_section(step: Results, memory: Results) -> str:
    """A whole step: times the frozen one, and what is saved for the backward pass beyond it."""
    times = {row["provider"]: row for row in select(step, phase="step", metric="time")}
    saved = {row["provider"]: row["value"] for row in select(memory, phase="step", metric="saved")}
    dropouts = unique(name.partition(", ")[2] for name in times if name.startswith(f"{OURS}, "))
    rows = []
    for who in (OURS, PEFT, f"{PEFT} bf16 adapters"):
        cells = [number(ratio(times, f"{who}, {dropout}")) for dropout in dropouts]
        more = [number(mib(saved, f"{who}, {dropout}"), 0) for dropout in dropouts]
        rows.append([who, *cells, *more])
    columns = [f"time, {dropout}" for dropout in dropouts] + [f"MiB saved, {dropout}" for dropout in dropouts]
    case = next(iter(times.values()))["case"]
    return (
        f"**A training step**: {case}; times the frozen model, and MiB saved for the backward pass beyond it. "
        f"{source(step)}.\n\n{table(['', *columns], rows)}"
    )


def mib(saved: Mapping[str, float], name: str) -> float | None:
    return (saved[name] - saved[FROZEN]) / MIB if name in saved else None


def readme_section() -> str:
    """The text between README's marks."""
    results = {kind: read(path) for kind in SECTIONS if (path := RESULTS / f"{kind}-cpu.json").exists()}
    parts = []
    if "layer" in results:
        parts.append(layer_section(results["layer"]))
    if {"step", "memory"} <= results.keys():
        parts.append(step_section(results["step"], results["memory"]))
    if "host" in results:
        text = host_bench_text(results["host"]).partition("\n\n")[2]
        parts.append(
            f"**The host's time on the CUDA path**, per layer, without a card ({source(results['host'])}):\n\n{text}"
        )
    if "penalised" in results:
        text = penalised_text(results["penalised"]).partition("\n\n")[2]
        parts.append(
            "**Penalties in a step of Llama-3-8B**, counted and predicted for an H100: all layers at once → in the "
            f"kernels' passes:\n\n{text}"
        )
    return "\n".join(parts)


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
    reasons = [f"{row['value']}: {row['case']}" for row in select(results, phase="reasons", metric="failed")]
    if reasons:
        text += f"\nFailed: {'; '.join(reasons)}. The JSON has the reasons of what is skipped.\n"
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

Written by `python -m bench report` from `bench/results`. The providers of one table ran interleaved in one process, one
call of each per round, every round in another order. Times are medians, ± the median absolute deviation. Compare within
a table, never across machines. `-style` rows are our own code with that
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
    check = {"action": "store_true", "help": "only say whether the pages are up to date"}
    options = parse(__doc__, "report", arguments, check=check)
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
