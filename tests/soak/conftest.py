"""Counts of the soak tests as rows of bench/results/reliability-cpu.json, where FORGETLESS_SOAK_OUT names a file."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

ROWS: list[dict[str, Any]] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when != "call" or "soak" not in report.keywords:
        return
    from forgetless_bench.harness import row

    name = report.nodeid.rpartition("::")[2].removeprefix("test_").replace("_", " ")
    counts = [*report.user_properties, ("failed", int(report.failed))]
    ROWS.extend(row(name, "forgetless", "soak", metric, value, "1") for metric, value in counts)  # type: ignore[arg-type]


def pytest_sessionfinish() -> None:
    out = os.environ.get("FORGETLESS_SOAK_OUT")
    if out and ROWS:
        from forgetless_bench.harness import start, write_json

        results = start("reliability", SimpleNamespace(device="cpu", smoke=False), [])  # type: ignore[arg-type]
        write_json(Path(out), {**results, "command": "make soak", "rows": ROWS})
