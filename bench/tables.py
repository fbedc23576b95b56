"""README's measured section, generated from the committed JSON: ``python -m bench.tables [--check]``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from .harness import RESULTS

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


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
    shares = ", ".join(f"{share:.2f} at dropout {p}" for p, share in results["overhead_over_peft"].items())
    batch = "×".join(map(str, results["batch"]))
    machine = results["machine"]
    text = (
        f"**One training step** (`python -m bench.step --curves 20`), {results['model']}, {batch} tokens, forward and "
        f"backward, medians of {results['rounds']} interleaved rounds. Our overhead over the frozen model is {shares} "
        "of PEFT's (its defaults: float32 adapters).\n\n"
        + markdown(["provider", "seconds", "±", "× frozen"], rows)
        + f"\n{machine['processor']}, {machine['threads']} threads, torch {machine['packages']['torch']}, "
        f"PEFT {machine['packages']['peft']}; `bench/results/step-cpu.json`."
    )
    if "curves" in results:
        steps = len(results["curves"]["peft"])
        text += (
            f" From the same start, {steps} AdamW steps of both follow the same loss curve to within "
            f"{results['curves']['largest_difference']:.3f} nats (bfloat16 noise)."
        )
    return text + "\n"


SECTIONS = {"compare-smollm2.json": compare_section, "step-cpu.json": step_section}


def measured() -> str:
    """The section's text, from whatever results are committed."""
    parts = []
    for name, section in SECTIONS.items():
        path = RESULTS / name
        if path.exists():
            parts.append(section(json.loads(path.read_text(encoding="utf-8"))))
    return "\n" + "\n".join(parts) + "\n"


def updated(readme: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + measured() + END + after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether README.md is up to date")
    options = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    fresh = updated(text)
    if options.check:
        if fresh != text:
            print("README.md is not what python -m bench.tables writes", file=sys.stderr)
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
