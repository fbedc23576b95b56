"""Launches that are kept, compiled for sm_90 in processes of their own where nothing interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]
CHECKS = (
    "same_arguments", "one_kernel_for_all_counts", "what_differs_is_another_launch", "scratch_that_is_not_aligned",
    "versions_that_are_not_known", "failures", "hooks", "little_is_kept", "streams",
)  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_a_launch_that_is_kept(check):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = str(ROOT / "tests" / "support" / "launcher_checks.py")
    done = subprocess.run([sys.executable, script, check], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
