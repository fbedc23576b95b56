"""Every page from the JSON in bench/results: ``python -m bench report [--check]``.

Written are docs/benchmarks.md and docs/static.md, and the text between the marks of README.md and docs/peft.md.
"""

from __future__ import annotations

import statistics
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from forgetless.files import write_atomically

from . import tables
from .bytes import MIB
from .harness import FROZEN, OURS, PEFT, RESULTS, ROOT, Results, parse, read, select
from .tables import Cells, grid, section, source

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
    assumed = tables.nested(select(results, phase="assumed"), "provider", "metric")
    sizes = next(iter(results["cases"].values()))
    times: dict[str, dict[str, float]] = {}
    for row in select(results, metric="predicted time"):
        of = times.setdefault(row["case"], {})
        of[row["provider"]] = of.get(row["provider"], 0.0) + row["value"]
    (frozen, floor), *designs = times.items()
    cells: Cells = {}
    for card, rates in assumed.items():
        speed, bandwidth = rates["products"]["value"] / 1e12, rates["memory"]["value"] / 1e12
        column = {"assumed TFLOP/s, TB/s": f"{speed:.0f}, {bandwidth:.2f}", f"{frozen}, µs": f"{floor[card] * 1e6:.0f}"}
        column |= {design: f"+{100 * (of[card] / floor[card] - 1):.1f} %" for design, of in designs}
        for line, text in column.items():
            cells.setdefault(line, {})[f"{rates['products']['case']} ({card})"] = text
    return (
        f"\n## Predicted times\n\nOne layer, M={sizes['M']}, N={sizes['N']}, K={sizes['K']}, R={sizes['R']}, bfloat16, "
        "forward and backward: the predicted overhead of whole designs over the frozen layer. A kernel takes the "
        "longer of its FLOPs and its bytes at the assumed rates; launches and tails take nothing; every matrix crosses "
        "the bus once; partial sums are written to memory and read back from L2. Triton's GEMMs are as fast as cuBLAS, "
        "but where a row says otherwise: Triton's tutorial 07 measured 0.98 of it on H100, 0.72 on B200.\n\n"
        + grid("design", cells)
        + f"\n{source(results, path)}\n"
    )


def targets_text(results: Results, path: Path) -> str:
    counts: dict[str, dict[str, Counter[str]]] = {}
    for row in results["rows"]:
        counts.setdefault(row["phase"], {}).setdefault(row["provider"], Counter())[row["metric"]] += row["value"]
    cells = {
        version: {card: f"{of['compiled']} / {of['problems']}" for card, of in cards.items()}
        for version, cards in counts.items()
    }
    return (
        "\n## Compiled\n\nKernels compiled for each card / with a problem: too much shared memory, a spill, "
        "products off the tensor cores or (sm_90) waiting for one another, multiply-adds or stores missing, or a "
        "failure to compile. The tests compile a subset.\n\n"
        + grid("", cells)
        + "".join(f"\n{note}\n" for note in results["notes"])
        + f"\n{source(results, path)}\n"
    )


# ------------------------------------------------------------------------------------------ README


def layer_section(results: Results) -> str:
    """Each provider's time over the frozen layer's: by dtype and dropout, the median over shapes, and the ends."""
    groups = tables.lora_times(results, "dtype", "dropout")
    cells: Cells = {}
    for (dtype, dropout), cases in groups.items():
        for provider in dict.fromkeys(name for case in cases for name in case if name != FROZEN):
            ratios = [tables.ratio(case, provider) for case in cases if provider in case]
            text = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
            cells.setdefault(NAMES.get(provider, provider), {})[f"{dtype}, dropout {dropout:g}"] = text
    return (
        f"**One layer**, forward and backward, times the frozen layer: median of {len(next(iter(groups.values())))} "
        f"shapes (lowest–highest). {' '.join(tables.layer_verdict(results))}\n\n{grid('', cells)}"
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
    cells: Cells = {OURS: {}, PEFT: {}, f"{PEFT} bf16 adapters": {}}
    for dropout in (name.partition(", ")[2] for name in times if name.startswith(f"{OURS}, dropout")):
        for who, of in cells.items():
            of[f"time, {dropout}"] = tables.number(tables.ratio(times, f"{who}, {dropout}"))
            of[f"MiB saved, {dropout}"] = tables.number((saved[f"{who}, {dropout}"] - saved[FROZEN]) / MIB, 0)
    cells = {who: dict(sorted(of.items(), key=lambda cell: "MiB" in cell[0])) for who, of in cells.items()}
    case = next(iter(times.values()))["case"]
    return (
        f"**A training step**: {case}; times the frozen model, and MiB saved for the backward pass beyond it. "
        f"{source(step)}.\n\n{grid('', cells)}"
    )


def readme_section() -> str:
    """The text between README's marks."""
    results = {kind: read(path) for kind in tables.SECTIONS if (path := RESULTS / f"{kind}-cpu.json").exists()}
    parts = []
    if "layer" in results:
        parts.append(layer_section(results["layer"]))
    if {"step", "memory"} <= results.keys():
        parts.append(step_section(results["step"], results["memory"]))
    if "host" in results:
        parts.append(
            f"**The host's time on the CUDA path**, per layer, without a card ({source(results['host'])}):\n\n"
            + grid("µs over frozen", tables.host_cells(results["host"]))
        )
    if "penalised" in results:
        parts.append(
            "**Penalties in a step of Llama-3-8B**, counted and predicted for an H100: all layers at once → in the "
            "kernels' passes:\n\n" + grid("penalty", tables.penalised_cells(results["penalised"]))
        )
    return "\n".join(parts)


# -------------------------------------------------------------------------------------- other pages


SAME = "Every test has the same outcome with and without swap-in."


def suite_section() -> str:
    """What PEFT's own tests gave with every LoRA layer swapped in."""
    path = RESULTS / "peft-suite.json"
    results = read(path)
    counts: dict[str, Counter[tuple[str, str]]] = {}
    for row in select(results, phase="tests"):
        counts.setdefault(row["case"], Counter())[row["provider"], row["metric"]] = row["value"]
    order = [(who, outcome) for who in ("swapped in", PEFT) for outcome in ("passed", "skipped", "failed")]
    rows = [[f"`{name}`", *(f"{of[key]:,}" for key in order)] for name, of in counts.items()]
    columns = ["PEFT's tests", "passed", "skipped", "failed", "PEFT alone: passed", "skipped", "failed"]
    differ = [f"`{row['case']}`, {row['provider']}: {row['metric']}" for row in select(results, phase="differ")]
    verdict = f"Outcomes that differ: {'; '.join(differ)}." if differ else SAME
    text = f"\nPEFT {results['versions']['peft']}, LoRA configurations, without network. {verdict}\n\n"
    text += tables.table(columns, rows)
    reasons = [f"{row['value']}: {row['case']}" for row in select(results, phase="reasons", metric="failed")]
    if reasons:
        text += f"\nFailed: {'; '.join(reasons)}. The JSON has the reasons of what is skipped.\n"
    names = {"op": "our op", "onto": "in place onto the frozen layer's result", "base": "the frozen layer alone"}
    passes = select(results, phase="forward passes")
    ran = [[r["value"], f"PEFT's own: {r['case']}" if r["provider"] == PEFT else names.get(r["case"])] for r in passes]
    lines = [[f"{count:,}", name] for count, name in ran if name]
    text += "\n" + tables.table(["forward passes of swapped-in layers", "ran on"], lines)
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
    for kind, (title, _) in tables.SECTIONS.items():
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
