"""Run in each of two processes: both measure one problem at the same time, and their clocks disagree.

python tests/support/one_choice.py RANK FILE
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from forgetless.ops import dispatch, first_use, plans

ONE = torch.ones(4, 4)


def plan_of(problem: plans.Problem, times: Sequence[float], together: bool) -> str:
    """What the first use of the problem chooses where split, hybrid and blas take that long."""

    def seconds(runs: Any, device: torch.device) -> list[float]:
        assert together, "measured again"
        dist.barrier()  # nobody has finished before the other began
        return list(times)

    routes = [dispatch.route_of(plans.Choice(plan, ""), problem) for plan in ("split", "hybrid")]
    chosen = first_use.first_use([*routes, dispatch.BLAS], lambda route: [ONE], torch.device("cpu"), seconds)
    assert plans.choose(problem).plan == chosen.plan
    return chosen.plan


def main(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    for M in (16, 32, 64):
        problem = plans.Problem("cpu", "forward", M, ((8, 4),), 8, "float32")
        made: list[Any] = [None, None]
        dist.all_gather_object(made, plan_of(problem, [(2.0, 1.0, 3.0), (1.0, 2.0, 3.0)][rank], together=True))
        assert made[0] == made[1] and made[0] in ("split", "hybrid"), made
        plans.forget()  # as a process that comes late
        dist.all_gather_object(made, plan_of(problem, (3.0, 2.0, 1.0), together=False))
        assert made == [made[0]] * 2 and made[0] != "blas", made
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
