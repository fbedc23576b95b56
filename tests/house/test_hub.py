"""The kernels in the Hugging Face Hub's format: a package that needs nothing of ours. ``.ci/hub`` writes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HUB = Path(__file__).resolve().parents[2] / ".ci" / "hub"
LOAD = """
import importlib.util, sys, torch
spec = importlib.util.spec_from_file_location(sys.argv[2], sys.argv[1])
module = importlib.util.module_from_spec(spec)
sys.modules[sys.argv[2]] = module
spec.loader.exec_module(module)
device = "cuda" if torch.cuda.is_available() else "cpu"
x, down = torch.randn(16, 32, device=device), torch.randn(4, 32, device=device)
torch.testing.assert_close(module.project(x, down), x @ down.T)
assert not [name for name in sys.modules if name.startswith("forgetless")], "the package must stand alone"
"""


@pytest.mark.skipif(not HUB.exists(), reason="outside of a source checkout")
def test_the_package_of_the_hub_stands_alone(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(HUB), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "build" / "torch-universal"
    metadata = json.loads((package / "metadata.json").read_text())
    assert metadata["name"] == "forgetless-kernels" and (tmp_path / "LICENSE").exists()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = [sys.executable, "-c", LOAD, str(package / "__init__.py"), metadata["id"]]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
