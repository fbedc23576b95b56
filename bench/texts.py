"""Reading results, and saying them in Markdown: what every page that is written from them shares."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .harness import SCHEMA

MIB = 2**20


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


def median(values: list[float]) -> float:
    values = sorted(values)
    return values[len(values) // 2]


def spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{min(values):.2f} to {max(values):.2f}, median {median(values):.2f} ({len(values)} cases)"
