"""Which plan and tile of the kernels a problem runs by, and why.

A plan is chosen per (GPU, pass, shapes, ranks, dtype, dropout), tokens in powers of two, in this order: the environment
variable ``FORGETLESS_PLAN``; the table that ``forgetless tune`` measured on this card; what the first use measured; the
default, ``split``. A plan that failed here before is out. Siblings that run together are a problem of their own.

``FORGETLESS_PLAN`` holds a plan's name, or ``strict`` (a plan that fails raises and BLAS does not take over), or both:
"split,strict". The table is read when a shape first runs; ``forget`` starts afresh.
"""

from __future__ import annotations

import functools
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import write_json
from . import table
from .table import PLANS

DEFAULT = "split"


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for; made by ``problem_of``.

    Attributes:
        gpu: the card's name.
        sweep: "forward" or "backward".
        M: tokens, rounded up to a power of two.
        layers: out_features N and rank R of each layer.
        K: in_features.
        dtype: of the activations.
        dropout: whether x is dropped on the low-rank path.
    """

    gpu: str
    sweep: str
    M: int
    layers: tuple[tuple[int, int], ...]
    K: int
    dtype: str
    dropout: bool = False

    @property
    def key(self) -> str:
        """Its name in the table: "forward M4096 N4096+1024+1024 K4096 R16 bfloat16"."""
        N, R = ("+".join(map(str, sizes)) for sizes in zip(*self.layers, strict=True))
        if len({rank for _, rank in self.layers}) == 1:
            R = str(self.layers[0][1])
        return f"{self.sweep} M{self.M} N{N} K{self.K} R{R} {self.dtype}" + " dropout" * self.dropout


@dataclass(frozen=True)
class Choice:
    """A plan, the reason in words, and the tile it was measured with (field, value), if not the kernels' own."""

    plan: str
    reason: str
    tile: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Route:
    """The module that runs one call of the op, the plan and tile of the kernels, and what they were chosen for."""

    module: Any
    plan: str = DEFAULT
    tile: tuple[tuple[str, int], ...] = ()
    problem: Problem | None = None
    unchecked: bool = False  # first use: to be compared with blas

    @property
    def whole(self) -> bool:
        """Whether the plan makes h and y, or g and dx, of one layer in one launch."""
        return self.plan in ("full", "once")


_UNDECIDED = Choice(DEFAULT, "the default on this device, not measured yet")
#: What the first use measured, and what failed, in this process.
_measured: dict[Problem, Choice] = {}
_failed: dict[tuple[Problem, str], str] = {}
#: How often a problem's first use ran out of memory.
tries: dict[Problem, int] = {}
#: What ``dispatch`` made of these two, of the table and of FORGETLESS_PLAN. Emptied when one of the first three
#: changes; the last is in the key.
routes: dict[tuple[Any, ...], tuple[Route, Route]] = {}


def bucket(M: int) -> int:
    """Tokens rounded up to a power of two, 16 to 65536."""
    return 1 << min(max(M - 1, 15).bit_length(), 16)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The name plans are stored under: the card's, or "cpu" for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def problem_of(
    device: torch.device,
    sweep: str,
    M: int,
    layers: tuple[tuple[int, int], ...],  # N and R of each
    K: int,
    dtype: torch.dtype,
    dropout: bool = False,
) -> Problem:
    """The problem of layers with one x (M, K) on a device."""
    return Problem(gpu_name(device), sweep, bucket(M), layers, K, str(dtype).removeprefix("torch."), dropout)


def forced() -> tuple[str | None, bool]:
    """The plan that ``FORGETLESS_PLAN`` asks for, if any, and whether a failing plan raises.

    Raises:
        ValueError: the variable holds something else.
    """
    return _parse_forced(os.environ.get("FORGETLESS_PLAN", ""))


@functools.cache
def _parse_forced(text: str) -> tuple[str | None, bool]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    plans = [word for word in words if word in PLANS]
    if len(plans) > 1 or any(word not in (*PLANS, "strict") for word in words):
        raise ValueError(f"FORGETLESS_PLAN is {text!r}, wants one of {', '.join(PLANS)}, 'strict', or both")
    return (plans[0] if plans else None), "strict" in words


def choose(problem: Problem) -> Choice:
    """The plan for a problem, from the environment, the table and what this process has measured.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    plan, _ = forced()
    if plan is not None:
        return Choice(plan, "FORGETLESS_PLAN asks for it")
    row = table.measured().get(problem.gpu, {}).get(problem.key)
    if row is not None and not failed(problem, row["plan"]):
        tile = tuple(sorted(row.get("tile", {}).items()))
        return Choice(row["plan"], "measured on this card by forgetless tune", tile)
    if problem in _measured:
        return _measured[problem]
    reason = failed(problem, DEFAULT)
    return Choice("blas", f"{DEFAULT} failed here: {reason}") if reason else _UNDECIDED


def undecided(problem: Problem) -> bool:
    """Whether a first-use check would tell something new."""
    return choose(problem) is _UNDECIDED


def failed(problem: Problem, plan: str) -> str | None:
    """Why this plan is out for this problem; None if it is not."""
    return _failed.get((problem, plan))


def decide(problem: Problem, choice: Choice) -> None:
    """From now on the problem runs by this choice."""
    _measured[problem] = choice
    routes.clear()


def fail(problem: Problem, plan: str, error: Exception) -> None:
    """A plan raised: drop it for this problem with one warning, or raise if ``FORGETLESS_PLAN`` says strict."""
    if forced()[1]:
        raise error.__cause__ or error
    drop(problem, plan, " ".join(str(error).split())[:240])


def drop(problem: Problem, plan: str, reason: str) -> None:
    """Never use this plan for this problem again in this process."""
    if (problem, plan) not in _failed:
        _failed[problem, plan] = reason
        warnings.warn(f"forgetless: plan {plan!r} dropped for {problem.key} on {problem.gpu}: {reason}", stacklevel=2)
    if _measured.get(problem, Choice("", "")).plan == plan:
        del _measured[problem]
    routes.clear()


def store(rows: dict[str, dict[str, Any]], path: Path | None = None) -> Path:
    """Write the whole table, and choose from it from now on; returns its file.

    Raises:
        ValueError: the rows are not those of a table.
    """
    path = path or table.table_path()
    data = {"format": table.FORMAT, "gpus": rows}
    table.check_table(data)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, data, sort_keys=True)
    forget()
    return path


def forget() -> None:
    """Forget the table as read and this process' findings: the next choice starts from the files."""
    for known in (table.read.cache_clear, _measured.clear, _failed.clear, tries.clear, routes.clear):
        known()
