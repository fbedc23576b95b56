"""The compile gate: what every kernel becomes on every card, in a process of its own where nothing interprets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 86, 89, 90, 100, 120)

SCRIPT = """
import json, sys
from forgetless_bench import targets
print(json.dumps(targets.collect(targets.subset(), (int(sys.argv[1]),))))
"""


@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_fit_use_tensor_cores_and_spill_nothing(arch):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(arch)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    records = json.loads(done.stdout.splitlines()[-1])
    kernels = {record.get("kernel") for record in records}
    assert {"project", "outer", "project_outer", "linear_lowrank"} <= kernels
    assert {"grouped_project", "grouped_matmul", "grouped_outer", "grouped_sum"} <= kernels
    assert ("matmul_lowrank_descriptor" in kernels) == (arch in (90, 100))
    assert {str(r["case"]): r["problems"] for r in records if r["problems"]} == {}


def record(**fields):
    """A compiled GEMM of sm_90 with nothing wrong"""
    good = {
        "kernel": "matmul_lowrank", "arch": 90, "dtype": "bfloat16", "block": {"M": 128, "N": 256, "K": 64, "R": 16},
        "shared": 200_000, "stack": 0, "spills": 0, "macs": 128 * 256 * 80, "fma": 0, "mma": ["wgmma.mma_async"],
        "written": 128 * 256 * 2, "bulk_stores": 0, "blocks_per_sm": 1,
        "serialized": "",
    }  # fmt: skip
    return {**good, **fields}


FAULTS = [
    ({}, None),
    ({"shared": 240_000}, "shared memory"),
    ({"stack": 8}, "spills"),
    ({"spills": 3}, "spills"),
    ({"macs": 0, "mma": []}, "multiply-adds"),
    ({"macs": 128 * 256 * 64}, "multiply-adds"),
    ({"mma": ["mma.sync"]}, "wgmma"),
    ({"written": 0}, "bytes stored"),
    ({"written": 128 * 256}, "bytes stored"),
    ({"kernel": "matmul_lowrank_descriptor", "bulk_stores": 1}, "bulk stores"),
    ({"blocks_per_sm": 0}, "fits"),
    ({"serialized": "6 waits for 6 wgmma"}, "serialized"),
    ({"kernel": "grouped_matmul"}, None),
    ({"kernel": "grouped_matmul", "macs": 128 * 256 * 64}, "multiply-adds"),
    ({"kernel": "grouped_matmul", "written": 0}, "bytes stored"),
    ({"kernel": "grouped_sum", "written": 0}, "bytes stored"),
]


def test_the_gate_finds_what_is_missing():
    """An empty kernel compiles without an error: the gate must notice."""
    from forgetless_bench import targets

    for fault, words in FAULTS:
        found = " ".join(targets.problems(record(**fault)))
        assert found == "" if words is None else words in found, fault
