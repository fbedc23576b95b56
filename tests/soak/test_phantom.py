"""What runs on a phantom card for minutes: ``bench gpu``, every scenario and the kernels' tests on every card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.soak
ROOT = Path(__file__).resolve().parents[2]
ARCHS = (80, 86, 89, 90, 100, 120)
#: Values that tests compare with numbers of their own are not there; graphs and streams want a torch built for CUDA.
COMPUTED = "not touched and not captured_in_a_graph and not another_stream"


def phantom(*arguments: str) -> subprocess.CompletedProcess[str]:
    path = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(path)}
    return subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def test_bench_gpu_from_its_first_line_to_its_last(tmp_path):
    """Every part comes to its end, every section of the page is made of what it wrote."""
    done = phantom("phantom", "90", "bench", "gpu", "--smoke", "--minutes", "60", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert "note: " not in done.stdout, done.stdout
    kinds = ("check", "layer", "step", "memory", "penalty", "dispatch", "sweep")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{kind}-phantom-h100.json" for kind in kinds)
    for kind in kinds:
        results = json.loads((tmp_path / f"{kind}-phantom-h100.json").read_text())
        assert results["kind"] == kind and results["machine"]["device"] == "Phantom H100" and results["rows"]
        assert not [note for note in results["notes"] if "wrong" in note]
    layer = json.loads((tmp_path / "layer-phantom-h100.json").read_text())
    providers = {row["provider"] for row in layer["rows"]}
    assert {"forgetless, split", "forgetless, full", "forgetless, once", "forgetless, blas"} <= providers
    assert {"time", "host time", "saved", "peak"} <= {row["metric"] for row in layer["rows"]}


@pytest.mark.parametrize("arch", ARCHS)
def test_every_scenario(arch):
    done = phantom("phantom.steps", str(arch))
    assert done.returncode == 0, done.stderr[-2000:]
    failed = {name: why for name, why in json.loads(done.stdout.splitlines()[-1]).items() if why is not None}
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())


@pytest.mark.parametrize("arch", ARCHS)
def test_the_kernels_own_tests_compile_and_launch(arch):
    """As first contact with the card would run them, their own tiles included."""
    done = phantom(
        "phantom", str(arch), "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_kernels/test_kernels.py",
        "-k", COMPUTED,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
