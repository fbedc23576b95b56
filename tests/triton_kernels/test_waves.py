"""The programs that penalties add to project: none of them outlasts those of x, and they make no more than a wave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from forgetless.ops.rows import Rows, Term
from forgetless_kernels import fused, launcher, project, tiles

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("arch", [86, 90])  # the one with the fewest multiprocessors, and the largest of one table row
def test_waves_of_llama(arch):
    if not launcher.TAKES_ROWS:
        pytest.skip("this Triton compiles no kernel with penalties' rows")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    script = str(ROOT / "tests" / "support" / "waves.py")
    done = subprocess.run(
        [sys.executable, script, str(arch)], capture_output=True, text=True, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    programs = {(r["layer"], r["penalised"]): r["programs"] for r in rows}
    # 128 blocks of x; 8 of each basis, and of gate's up in 4 parts
    assert programs == {
        (layer, penalised): 128 + (n if penalised else 0)
        for layer, n in (("q", 16), ("k", 16), ("gate", 40), ("down", 16))
        for penalised in (False, True)
    }
    for plain, penalised in zip(rows[::2], rows[1::2], strict=True):
        assert penalised["per_processor"] == 2 and penalised["waves"] <= plain["waves"] + 1, penalised
    if arch == 90:
        assert {row["waves"] for row in rows} == {1}


@pytest.mark.parametrize(
    "K, N, parts", [(4096, 14336, 4), (14336, 4096, 1), (4096, 4097, 2), (8, 4096, 1), (4097, 4097, 1)]
)
def test_only_what_is_wider_than_x_is_cut(K, N, parts, monkeypatch):
    """Other layers have no scratch and no tickets."""
    programs, made = [], []

    class Kept:
        def __init__(self, launch):
            self.beside, self.named = launch.beside, launch.named
            programs.append(launch.grid[0])

        def __call__(self, like, scratch, *operands):
            made.append(operands[8:10])

    monkeypatch.setattr(project, "prepared", lambda *given: Kept(launcher.prepared(*given)))
    x, down, up = torch.empty(16, K), torch.empty(4, K), torch.empty(N, 4)
    terms = [Term(0, (Rows("down", torch.empty(K, 33)), Rows("up", torch.empty(N, 33))))]
    with tiles.forced("project", BLOCK_M=16, BLOCK_K=64):
        fused.project_terms(x, [down], [up], terms)
    assert programs == [1 + 2 + 2 * parts]
    ((part, tickets),) = made
    assert (part is None) == (tickets is None) == (parts == 1)
    assert part is None or part.numel() == 2 * parts * 32 * 16
