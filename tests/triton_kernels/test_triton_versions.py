"""Another version of Triton: one that is too old is not used and named, one that is too new is named where it fails."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

tl_utils = pytest.importorskip("forgetless_kernels.tl_utils")

OLD = """
import warnings
import torch
import triton
triton.__version__ = "3.5.1"
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    import forgetless as fl
    y = fl.ops.lowrank_linear(*(torch.ones(2, 2) for _ in range(4)))
print(*[str(one.message) for one in seen if one.category is UserWarning], sep="\\n")
print(fl.ops.explain_path(torch.device("cuda"), torch.bfloat16, 8, 8, 2), y.sum().item())
"""


def test_an_old_one_is_not_used_and_said_so():
    run = [sys.executable, "-c", OLD]
    done = subprocess.run(run, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}, check=True)
    reason = "Triton 3.5.1 is too old for the kernels; tested with Triton 3.6 to 3.9"
    assert done.stdout.splitlines() == [
        f"forgetless: everything runs on BLAS: {reason}",
        f"('blas', '{reason}') 24.0",
    ]


@pytest.mark.parametrize(("version", "told"), [((3, 9), False), ((4, 0), True)])
def test_a_new_one_is_named_where_it_fails(version, told, monkeypatch):
    monkeypatch.setattr(tl_utils, "VERSION", version)
    with pytest.raises(tl_utils.LaunchError) as caught, tl_utils.launching("a kernel", torch.ones(1)):
        raise AttributeError("no such thing in tl")
    assert ("tested with Triton 3.6 to 3.9" in str(caught.value)) is told
