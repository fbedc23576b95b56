"""Programs of project with a null space penalty and without, and their waves, of Llama-3-8B's layers on a card.

python tests/support/waves.py 90        a table; prints JSON as its last line
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

import torch

from forgetless.ops.rows import Rows, Term
from forgetless_bench import targets
from forgetless_kernels import fused, launcher

M, RANKS, BASIS = 8192, (16, 64), 256
LAYERS = {"q": (4096, 4096), "k": (4096, 1024), "gate": (4096, 14336), "down": (14336, 4096)}  # in, out


def on(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def row(arch: int, layer: str, R: int, penalised: bool) -> dict[str, Any]:
    K, N = LAYERS[layer]
    terms = [Term(0, (Rows("down", on(K, BASIS)), Rows("up", on(N, BASIS))))] if penalised else []
    factors = on(R, K, dtype=torch.float32), on(N, R, dtype=torch.float32)
    launcher._launches.clear()
    with targets.compiling_for(arch) as launches:
        fused.project_terms(on(M, K), factors[:1], factors[1:], terms)
    ((kernel, named),) = launches
    (launch,) = launcher._launches.values()
    assert launch is not None
    per_processor = targets.usage(kernel, named)["blocks_per_sm"]
    waves = math.ceil(launch.grid[0] / (per_processor * targets.PROCESSORS[arch]))
    return {
        "arch": arch, "layer": layer, "R": R, "penalised": penalised,
        "programs": launch.grid[0], "per_processor": per_processor, "waves": waves,
    }  # fmt: skip


def table(arch: int) -> list[dict[str, Any]]:
    return [row(arch, layer, R, penalised) for layer in LAYERS for R in RANKS for penalised in (False, True)]


if __name__ == "__main__":
    rows = table(int(sys.argv[1]))
    for one in rows:
        print(*one.values())
    print(json.dumps(rows))
