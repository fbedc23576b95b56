"""Reading results, and saying them in Markdown: what every page that is written from them shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import SCHEMA, number

MIB = 2**20
#: What one layer's overhead is to be of PEFT's, at most.
GOAL = 1 / 3


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"


def read(path: Path) -> dict[str, Any]:
    """A result file; what a smoke run or another version wrote is no result."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data.get("smoke"):
        raise ValueError(f"{path.name} is of a smoke run, which measures nothing: remove it")
    if data.get("schema", SCHEMA) != SCHEMA:
        raise ValueError(f"{path.name} has schema {data['schema']}, this version reads {SCHEMA}")
    return data


def where(results: dict[str, Any]) -> str:
    machine = results["machine"]
    threads = machine["threads"]
    place = machine["gpu"] or f"{machine['processor']}, {threads} thread{'s' if threads > 1 else ''}"
    commit, plus, _ = (machine["commit"] or "unknown").partition("+")
    changed = " with changes" if plus else ""
    versions = ", ".join(f"{n} {v}" for n, v in sorted(machine["packages"].items()) if n in ("torch", "triton", "peft"))
    return f"{place}; {versions}; commit {commit[:12]}{changed}, {machine['date']}"


def by_dropout(results: dict[str, Any]) -> str:
    """Our share of PEFT's overhead over a step: "0.34 ± 0.02 at dropout 0", and so on.

    Results from before shares were taken by rounds hold the ratio of the medians alone.
    """
    spreads = results.get("overhead_over_peft_spread", {})
    return ", ".join(
        f"{number(share)}{f' ± {number(spreads[p])}' if p in spreads else ''} at dropout {p}"
        for p, share in results["overhead_over_peft"].items()
    )


def how_taken(results: dict[str, Any]) -> str:
    """How ``by_dropout`` was taken."""
    if "overhead_over_peft_of_medians" not in results:
        return "ratio of the medians"
    medians = ", ".join(f"{number(share)}" for share in results["overhead_over_peft_of_medians"].values())
    return f"share within every round, median over rounds; of the medians: {medians}"


def median(values: list[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2]


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{min(values):.2f} to {max(values):.2f}, median {median(values):.2f} ({len(values)} cases)"
