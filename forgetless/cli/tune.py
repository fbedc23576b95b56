"""Measure which plan and which tiles run each layer fastest on this card, and store the winners.

    forgetless tune                                     # the shapes of common models
    forgetless tune --shape 4096x4096 --rank 16 --tokens 8192 --dtype bfloat16 --dropout
    forgetless tune --shape 4096+1024+1024x4096         # q, k and v, which run together
    forgetless tune --toy                               # tiny sizes in Triton's interpreter, without a GPU

Every candidate is verified against the float64 reference before it may win; one that fails or disagrees is left out
with one line. The table (JSON under FORGETLESS_CACHE or ~/.cache/forgetless, or the file FORGETLESS_TUNE names) is
written after every problem, so an interrupted run loses nothing: run the command again and it goes on where it was.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from forgetless.ops import dispatch, plans, table
from forgetless.ops.bodies import Call, Operands, Saved, flat, forward, given, gradients
from forgetless.ops.first_use import disagreement, time_queued
from forgetless.ops.plans import Choice, Problem, Route

from .arguments import fail

#: out_features x in_features of Llama-3-8B, Mistral-7B and Qwen2.5-7B, as their layers run: q, k and v, o, gate and up,
#: down.
SHAPES = [
    "4096+1024+1024x4096", "4096x4096", "14336+14336x4096", "4096x14336",
    "3584+512+512x3584", "3584x3584", "18944+18944x3584", "3584x18944",
]  # fmt: skip
TOY_SHAPES = ["48x40"]
DROPOUT = 0.125


@dataclass(frozen=True)
class Candidate:
    """A plan, with the tile fields that it is tried with; none is the table's own row."""

    plan: str
    tile: tuple[tuple[str, int], ...] = ()

    def __str__(self) -> str:
        return self.plan + "".join(f" {name}={value}" for name, value in self.tile)


def candidates(problem: Problem, tiles: bool) -> list[Candidate]:
    """All that is tried for one problem; ``blas`` first, it is what the others must beat."""
    result = [Candidate(plan) for plan in table.PLANS]
    if len(problem.layers) > 1:  # the others are of a single layer
        result = [candidate for candidate in result if not Route(None, candidate.plan).whole]
    if tiles:
        fields = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
        for values in (
            (128, 256, 64, 8, 3),
            (128, 128, 64, 8, 4),
            (128, 128, 64, 4, 4),
            (64, 256, 64, 8, 4),
            (256, 128, 64, 8, 3),
        ):
            result.append(Candidate("split", tuple(zip(fields, values, strict=True))))
    return result


def operands(problem: Problem, device: torch.device) -> dict[str, Any]:
    """Inputs whose results are not noise: unit-variance outputs, a low-rank term as large as the frozen one."""
    generator = torch.Generator().manual_seed(0)
    dtype = getattr(torch, problem.dtype)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, dtype)

    M, K, layers = problem.M, problem.K, problem.layers
    return {
        "x": normal(M, K),
        "dys": [normal(M, N) for N, _ in layers],
        "weights": [normal(N, K, scale=K**-0.5) for N, _ in layers],
        "downs": [normal(R, K, scale=K**-0.5) for _, R in layers],
        "ups": [normal(N, R, scale=R**-0.5) for N, R in layers],
        "h": normal(M, sum(R for _, R in layers)),
        "seed": torch.arange(2, dtype=torch.int32, device=device) if problem.dropout else None,
    }


def runner(problem: Problem, route: Route, t: dict[str, Any]) -> Callable[[], list[Tensor]]:
    """One pass of the layers by one route."""
    n, dtype = len(problem.layers), t["x"].dtype
    call = Call(n, p=DROPOUT * problem.dropout)
    if problem.sweep == "forward":
        layers = Operands(t["weights"], [None] * n, t["downs"], t["ups"])
        return lambda: flat(forward(call, t["x"], t["seed"], layers, route))
    saved = Saved(t["x"], t["h"], t["seed"], t["weights"], t["downs"], t["ups"], [dtype] * (2 * n))
    need = [True] + [False] * (2 * n) + [True] * (2 * n)  # x, downs and ups
    return lambda: given(gradients(call, saved, need, t["dys"], None, route))


def truth(problem: Problem, t: dict[str, Any]) -> list[Tensor]:
    """The pass by the reference in float64, rounded once."""

    def wide(value: Any) -> Any:
        if isinstance(value, list):
            return [wide(one) for one in value]
        return value.double() if value is not None and value.is_floating_point() else value

    results = runner(problem, dispatch.REFERENCE, {name: wide(value) for name, value in t.items()})()
    return [result.to(t["x"].dtype) for result in results]


def measure(
    problem: Problem,
    tried: Iterable[Candidate],
    device: torch.device,
    say: Callable[[str], None],
    seconds: Callable[..., list[float]] = time_queued,
) -> dict[str, Any]:
    """The row of one problem: the winner, and the milliseconds of everything that was right."""
    t = operands(problem, device)
    right = truth(problem, t)
    runs: dict[Candidate, Callable[[], list[Tensor]]] = {}
    for candidate in tried:
        run = runner(problem, dispatch.route_of(Choice(candidate.plan, "", candidate.tile)), t)
        try:
            wrong = disagreement(run(), right)
        except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if wrong is None:
            runs[candidate] = run
        else:
            say(f"  {candidate}: left out: {wrong}")
    if not runs:
        raise RuntimeError(f"no candidate computes {problem.key} right on {problem.gpu}")
    times = dict(zip(runs, seconds(list(runs.values()), device), strict=True))
    best = min(times, key=lambda candidate: times[candidate])
    row: dict[str, Any] = {"plan": best.plan, "ms": {str(c): round(1e3 * s, 6) for c, s in times.items()}}
    if best.tile:
        row["tile"] = dict(best.tile)
    return row


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="forgetless tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--shape", action="append", metavar="NxK", help="out_features x in_features, of siblings N+N+NxK; repeatable"
    )
    parser.add_argument("--rank", type=int, action="append", help="repeatable; default 16")
    parser.add_argument("--tokens", type=int, action="append", help="repeatable; default 1024 and 8192")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--dropout", action="store_true", help="measure with dropout; plans without it are others")
    parser.add_argument("--tiles", action="store_true", help="try several tiles of the split plan as well")
    parser.add_argument("--fresh", action="store_true", help="measure again what the table has already")
    parser.add_argument("--toy", action="store_true", help="tiny sizes; runs in the interpreter without a GPU")
    parser.add_argument("--out", type=Path, help="the table's file")
    options = parser.parse_args(argv)
    try:
        problems = list(problems_of(options))
    except ValueError as error:
        return fail(str(error))
    path = options.out or table.table_path()
    rows = saved_rows(path)
    todo = [p for p in problems if options.fresh or p.key not in rows.get(p.gpu, {})]
    print(f"{len(problems)} problems, {len(problems) - len(todo)} measured before; table: {path}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        for index, problem in enumerate(todo, 1):
            print(f"[{index}/{len(todo)}] {problem.key}", flush=True)
            row = measure(problem, candidates(problem, options.tiles), device, lambda text: print(text, flush=True))
            rows.setdefault(problem.gpu, {})[problem.key] = row
            plans.store(rows, path)
            times = ", ".join(f"{name} {ms:.3f} ms" for name, ms in row["ms"].items())
            print(f"  {row['plan']} wins: {times}", flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; what was measured is in {path}, run the same command to go on", file=sys.stderr)
        return 130
    return 0


def saved_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The rows of the table at ``path``; empty if there is none, or none that can be read."""
    try:
        return table.check_table(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        print(f"ignoring the tuning table {path}: {error}", file=sys.stderr)
        return {}


def problems_of(options: argparse.Namespace) -> Iterable[Problem]:
    """What to measure, forward and backward of every combination.

    Raises:
        ValueError: no GPU or no Triton, or an option that makes no sense.
    """
    if dispatch.kernels is None:
        raise ValueError(f"{dispatch.NO_KERNELS}; there is nothing to choose between")
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    if not torch.cuda.is_available() and not (options.toy and interpreting):
        raise ValueError("no CUDA device here; TRITON_INTERPRET=1 forgetless tune --toy shows how it works")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = options.shape or (TOY_SHAPES if options.toy else SHAPES)
    tokens = options.tokens or ([32] if options.toy else [1024, 8192])
    for text, M, R in itertools.product(shapes, tokens, options.rank or [4 if options.toy else 16]):
        try:
            out, K = text.lower().split("x")
            layers, K = tuple((int(N), R) for N in out.split("+")), int(K)
        except ValueError:
            raise ValueError(
                f"--shape is {text!r}, wants out_features x in_features, for example 4096x4096 or 4096+1024+1024x4096"
            ) from None
        if min(min(layers)[0], K, M, R) < 1:
            raise ValueError(f"--shape {text}, --tokens {M}, --rank {R}: all must be at least 1")
        for sweep in ("forward", "backward"):
            yield plans.problem_of(device, sweep, M, layers, K, getattr(torch, options.dtype), options.dropout)


if __name__ == "__main__":
    raise SystemExit(main())
