"""The CUDA path on a card that is not there: every line of it but the arithmetic, in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[2]

#: What runs on each card: all that there is on one, the kernels of a step on two; all on all is a soak test.
SCENARIOS: dict[int, tuple[str, ...]] = {90: (), 80: ("a layer",), 100: ("a layer",)}


def phantom(*arguments: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """``python -m`` these arguments where Triton compiles."""
    path = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    run = [sys.executable, "-m", *arguments]
    return subprocess.run(run, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=timeout)


@pytest.mark.parametrize("arch", SCENARIOS)
def test_a_step_compiles_nothing_copies_nothing_and_waits_for_nothing(arch):
    done = phantom("phantom.steps", str(arch), *SCENARIOS[arch])
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = json.loads(done.stdout.splitlines()[-1])
    assert set(SCENARIOS[arch]) <= set(outcomes) and outcomes
    failed = {name: reason for name, reason in outcomes.items() if reason is not None}
    assert not failed, "\n".join(f"{name}: {reason}" for name, reason in failed.items())


def test_the_phantom_notices_what_it_is_there_for():
    done = phantom("phantom.notices")
    assert done.returncode == 0, done.stderr[-2000:]
