"""README's measured section and the tables of docs from the committed JSON: ``python -m bench tables [--check]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .harness import RESULTS, number
from .pages import PAGES, unresolved
from .texts import GOAL, by_dropout, how_taken, markdown, read, spread, where

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
PEFT = ROOT / "docs" / "peft.md"
RELIABILITY = ROOT / "docs" / "reliability.md"
SUITE = RESULTS / "peft-suite.json"
#: Where a file is not named after its command.
COMMANDS = {"sweep": "lowrank --sweep"}
KINDS = ("step", "lowrank", "penalty", "memory", "dispatch")


def results_of(bench: str) -> list[Path]:
    """The committed files of one benchmark, the CPU's first."""
    return sorted(RESULTS.glob(f"{bench}-*.json"), key=lambda path: (not path.stem.endswith("-cpu"), path.name))


# ----------------------------------------------------------------------------------------- README


def compare_section(results: dict[str, Any]) -> str:
    from forgetless.study.report import main_table

    table = main_table(results)
    machine, options = results["machine"], results["options"]
    seeds = ", ".join(str(seed) for seed in options["seeds"])
    return (
        "**What each method learnt and forgot** (`make demo`). One adapter learns both tasks in sequence; losses are "
        f"nats per token on held-out text, in brackets the change; {options['steps']} steps a task, seed {seeds}. "
        "One short run on a small model: an example of the instrument, not a ranking of methods.\n\n"
        + markdown(list(table.columns), [list(row) for row in table.rows])
        + f"\n{results['model']['name']}, {options['dtype']}; {machine['processor']}, {machine['cores']} cores; "
        f"`bench/results/compare-smollm2.json`.\n"
    )


def step_section(results: dict[str, Any]) -> str:
    rows = [
        [name, f"{row['median']:.3f}", f"{row['spread']:.3f}", f"{row['times_frozen']:.2f}"]
        for name, row in results["seconds"].items()
    ]
    batch = "×".join(map(str, results["batch"]))
    machine = results["machine"]
    text = (
        f"**One training step** (`{results.get('command', 'python -m bench step')}`), {results['model']}, "
        f"{batch} tokens, forward and "
        f"backward, medians of {results['rounds']} interleaved rounds. Our overhead over the frozen model is "
        f"{by_dropout(results)} of PEFT's ({how_taken(results)}; PEFT's defaults: float32 adapters).\n\n"
        + markdown(["provider", "seconds", "±", "× frozen"], rows)
        + f"\n{machine['processor']}, {machine['threads']} threads, torch {machine['packages']['torch']}, "
        f"PEFT {machine['packages'].get('peft', '-')}; `bench/results/step-cpu.json`."
    )
    if "curves" in results:
        steps, apart = len(results["curves"]["peft"]), results["curves"]["largest_difference"]
        text += (
            f" {steps} AdamW steps from the same start, beside the same weights in float32: our losses in bfloat16 are "
            f"at most {apart['forgetless, float32']:.3f} nats from float32's, PEFT's {apart['peft, float32']:.3f}. "
            "The update is added before the layer's output is rounded, not after."
        )
    return text + "\n"


def rest_section(found: dict[str, dict[str, Any]]) -> str:
    """One row for each of the other benchmarks on the CPU."""
    rows: list[list[str]] = []
    lowrank, penalty, memory, dispatch = (found.get(name) for name in ("lowrank", "penalty", "memory", "dispatch"))
    if lowrank:
        ours, floor = lowrank["summary"]["overhead_share"], lowrank["summary"].get("floor_share", {})
        lost = unresolved(lowrank["rows"])
        for p, who, shares in (
            ("0", "our overhead", ours),
            ("0", "overhead of its matrix products alone", floor),
            ("0.1", "our overhead", ours),
        ):
            names = [name for name in shares if name.endswith(f" dropout {p}")]
            values = [share for name in names if name not in lost and (share := shares[name]) is not None]
            if values:
                told = f", {len(names) - len(values)} left out: PEFT's overhead is within the spread"
                text = spread(values) + (told if len(values) < len(names) else "")
                text += f"; above 1/3 in {sum(value > GOAL for value in values)}" if shares is floor else ""
                rows.append([f"one layer, dropout {p}: {who} / PEFT's", text])
        for key, title in (
            ("curlora_speedup", "CURLoRA layer: times faster than the authors' formulation"),
            ("curlora_saved", "CURLoRA layer: bytes saved for backward / the authors'"),
        ):
            values = list(lowrank["summary"][key].values())
            if values:
                rows.append([title, spread(values)])
    if penalty:
        text = ", ".join(f"{basis} {value:.1f}" for basis, value in penalty["clora_speedup"].items())
        rows.append(["CLoRA's penalty: times faster than the authors' loop, by basis", text])
    if memory:
        for key, title in (
            ("saved_over_peft", "whole step: bytes saved for backward / PEFT's"),
            ("saved_overhead_over_peft", "the same beyond what the frozen model saves"),
        ):
            rows.append([title, ", ".join(f"{number(value)} at dropout {p}" for p, value in memory[key].items())])
    if dispatch:
        text = f"{dispatch['seconds']['forgetless, op']['times_bare']:.2f}"
        rows.append(["dispatch of the op / a bare `autograd.Function`", text])
    if not rows:
        return ""
    table = markdown(["same machine, `python -m bench all`", "measured"], rows)
    return f"{table}\nEvery row and how it was taken: [docs/benchmarks.md](docs/benchmarks.md).\n"


SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "compare-smollm2.json": compare_section,
    "step-cpu.json": step_section,
}


def measured() -> str:
    """The section's text, from whatever results are committed."""
    parts = [section(read(RESULTS / name)) for name, section in SECTIONS.items() if (RESULTS / name).exists()]
    others = {bench: RESULTS / f"{bench}-cpu.json" for bench in KINDS if bench != "step"}
    parts.append(rest_section({bench: read(path) for bench, path in others.items() if path.exists()}))
    return "\n" + "\n".join(filter(None, parts)) + "\n"


def updated(readme: str) -> str:
    return between(readme, measured())


def between(page: str, text: str) -> str:
    """The page with this text between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + text + END + after


# ------------------------------------------------------------------------------------ docs/peft.md


def suite_section(results: dict[str, Any]) -> str:
    """What PEFT's own tests gave with every LoRA layer swapped in."""

    def counts(found: dict[str, int]) -> list[str]:
        return [f"{found.get(outcome, 0):,}" for outcome in ("passed", "skipped", "failed")]

    columns = ["PEFT's tests", "passed", "skipped", "failed", "PEFT alone: passed", "skipped", "failed"]
    rows = [[f"`{name}`", *counts(o["swapped in"]), *counts(o["PEFT"])] for name, o in results["files"].items()]
    text = f"\nPEFT {results['machine']['packages']['peft']}, LoRA configurations, without network. {same(results)}\n\n"
    text += markdown(columns, rows)
    for outcome in ("failed", "skipped"):
        reasons = [[str(n), reason.replace("|", "\\|")] for reason, n in results[outcome].items()]
        if reasons:
            text += "\n" + markdown([outcome, "reason that PEFT's tests give"], reasons)
    ways = {"op": "our op", "onto": "in place onto the frozen layer's result", "base": "the frozen layer alone"}
    passes = results["forward_passes"]
    rows = [[f"{passes[way]:,}", means] for way, means in ways.items() if way in passes]
    rows += [[f"{n:,}", f"PEFT's own: {reason}"] for reason, n in results["own_forward"].items()]
    text += "\n" + markdown(["forward passes of swapped-in layers", "ran on"], rows)
    return f"{text}\n{where(results)}; `bench/results/{SUITE.name}`.\n\n"


def same(results: dict[str, Any]) -> str:
    if not results["differ"]:
        return "Every test has the same outcome with and without swap-in."
    listed = "; ".join(f"`{name}`: {ours}, PEFT alone {theirs}" for name, (ours, theirs) in results["differ"].items())
    return f"Outcomes that differ: {listed}."


def peft_page(page: str) -> str:
    return between(page, suite_section(read(SUITE))) if SUITE.exists() else page


def reliability_page(page: str) -> str:
    from . import kept

    path = RESULTS / "reliability-cpu.json"
    return between(page, kept.section(read(path))) if path.exists() else page


#: Further pages: file -> its new text from the old.
PAGES_TOO: dict[Path, Callable[[str], str]] = {
    PEFT: peft_page,
    RELIABILITY: reliability_page,
}

# ------------------------------------------------------------------------------ docs/benchmarks.md


HEAD = """# Benchmarks

Written by `python -m bench tables` from the JSON in `bench/results`; change nothing here by hand. Providers of one
table ran interleaved in one process, one call of each per round in an order drawn anew: times are medians, ± the median
absolute deviation.
Compare within a table, never across machines. "-style" rows are our own rewriting of that project's schedule, on this
machine's BLAS; each provider is proved equal to the reference in `tests/benchmarks/test_bench.py`.
"""


def page() -> str:
    """docs/benchmarks.md"""
    text = HEAD
    for bench, (title, write) in PAGES.items():
        text += f"\n## {title}\n"
        paths = results_of(bench)
        if not paths:
            text += f"\nNot measured yet: `python -m bench {COMMANDS.get(bench, bench)}`.\n"
        for path in paths:
            data = read(path)
            command = data.get("command", f"python -m bench {bench}")
            text += f"\n`{command}`; {where(data)}; `bench/results/{path.name}`.\n\n"
            text += write(data)
            for note in data.get("notes", []):
                text += f"\nNote: {note}\n"
            for image in images(path):
                text += f"\n![{title}](images/{image.name})\n"
    if not any(not path.stem.endswith("-cpu") for bench in PAGES for path in results_of(bench)):
        text += (
            "\n## On GPUs\n\nNothing has been measured on a GPU yet: these tables have no GPU rows. "
            "`python -m bench gpu` on a CUDA machine fills\nthem in at most ten minutes, correctness checks first.\n"
        )
    return text


def images(path: Path) -> list[Path]:
    return sorted((PAGE.parent / "images").glob(f"bench-{path.stem}*.png"))


# ------------------------------------------------------------------------------------ command line


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="forgetless bench tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the files are up to date")
    options = parser.parse_args(arguments)
    stale = []
    for path, write in {README: updated, PAGE: lambda _: page(), **PAGES_TOO}.items():
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        fresh = write(text)
        if fresh == text:
            continue
        stale.append(path.name)
        if not options.check:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(fresh, encoding="utf-8")
    if options.check:
        for name in stale:
            print(f"{name} is not what python -m bench tables writes", file=sys.stderr)
        return int(bool(stale))
    print(f"written: {', '.join(stale) or 'nothing, all is up to date'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
