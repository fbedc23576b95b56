"""Options of ``pytest bench --benchmark-only``, and its JSON: what pytest-benchmark writes, with rows of our schema."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the kernels are imported

from forgetless_bench.harness import start, time_row  # noqa: E402
from forgetless_bench.shapes import shape_name  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def shape_names(text: str) -> list[str]:
    return [shape_name(name) for name in text.split(",")]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("forgetless bench")
    default = "4096x4096" if DEVICE == "cuda" else "576x576"
    group.addoption("--shapes", type=shape_names, default=default, help="NxK or names as smollm2.q, with commas")
    group.addoption("--tokens", type=int, default=8192 if DEVICE == "cuda" else 512, help="M, the rows of x")
    group.addoption("--rank", type=int, default=16)
    group.addoption("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        metafunc.parametrize("shape", metafunc.config.getoption("shapes"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Add what our own result files have; ``harness.read`` reads the file."""
    results = start("micro", [], DEVICE)
    shapes = ",".join(config.getoption("shapes"))
    results["command"] = f"pytest bench --benchmark-only --shapes {shapes}"
    for one in benchmarks:
        if {"case", "provider", "phase"} <= one.extra_info.keys():
            results["rows"].append(time_row(**one.extra_info, rounds=one.stats.data))
    output_json.update(results)
