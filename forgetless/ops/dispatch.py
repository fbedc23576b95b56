"""Which plan runs a layer on a GPU, and why.

    blas    in-place BLAS: two skinny products beside the vendor's GEMM
    split   h first, in one skinny pass; then one GEMM whose accumulator takes h @ up.T
    full    x @ down.T inside the GEMM's own loop: for narrow outputs and small ranks
    once    one persistent grid: the first column of tiles makes h, the others pick it up

A plan is chosen per (GPU, pass, shape, rank, dtype), tokens in powers of two, in this order: the environment variable
``FORGETLESS_PLAN``; the table that ``forgetless tune`` measured on this card; what the first use found; the default,
``split``. A plan that failed here before is out. The first use of a bucket on a CUDA device checks the fused plan
against ``blas`` on the layer's own tensors, numbers first, then a few timed launches, and keeps the winner, so nobody
is slower than ``blas`` out of the box. Nothing is checked while a CUDA graph is captured or a trace compiled.

``FORGETLESS_PLAN`` holds a plan's name, or ``strict`` (a plan that fails raises instead of giving way), or both:
"split,strict".
``FORGETLESS_TUNE`` names the table's file, by default plans.json in ``FORGETLESS_CACHE`` or ~/.cache/forgetless.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import write_json

PLANS = ("blas", "split", "full", "once")
DEFAULT = "split"
TILE = ("BLOCK_K", "BLOCK_M", "BLOCK_N", "num_stages", "num_warps")
FORMAT = 1


@dataclass(frozen=True)
class Problem:
    """What a plan is chosen for. ``M`` is rounded up to a power of two by ``problem``."""

    gpu: str
    sweep: str  # "forward" or "backward"
    M: int
    N: int
    K: int
    R: int
    dtype: str

    @property
    def key(self) -> str:
        return f"{self.sweep} M{self.M} N{self.N} K{self.K} R{self.R} {self.dtype}"


@dataclass(frozen=True)
class Choice:
    """A plan, the reason in words, and the tile it was measured with (field, value), if not the kernels' own."""

    plan: str
    reason: str
    tile: tuple[tuple[str, int], ...] = ()


#: What the first use found, and what failed, in this process.
_found: dict[Problem, Choice] = {}
_failed: dict[tuple[Problem, str], str] = {}


def bucket(M: int) -> int:
    """Tokens rounded up to a power of two, 16 to 65536."""
    return 1 << min(max(M - 1, 15).bit_length(), 16)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The name plans are stored under: the card's, or "cpu" for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def problem(device: torch.device, sweep: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> Problem:
    return Problem(gpu_name(device), sweep, bucket(M), N, K, R, str(dtype).removeprefix("torch."))


def forced() -> tuple[str | None, bool]:
    """The plan that ``FORGETLESS_PLAN`` asks for, if any, and whether a failing plan raises.

    Raises:
        ValueError: the variable holds something else.
    """
    text = os.environ.get("FORGETLESS_PLAN", "")
    return (None, False) if not text else _parse_forced(text)


@functools.cache
def _parse_forced(text: str) -> tuple[str | None, bool]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    plans = [word for word in words if word in PLANS]
    if len(plans) > 1 or any(word not in (*PLANS, "strict") for word in words):
        raise ValueError(f"FORGETLESS_PLAN is {text!r}, wants one of {', '.join(PLANS)}, 'strict', or both")
    return (plans[0] if plans else None), "strict" in words


def plan_for(gpu: str, M: int, N: int, K: int, R: int, dtype: torch.dtype | str, sweep: str = "forward") -> Choice:
    """The plan for a layer on a card, from the environment, the tables and this process' findings.

    Args:
        gpu: the card's name as torch gives it.
        M, N, K, R: tokens, out_features, in_features, rank.
        dtype: of the activations.
        sweep: "forward", or "backward" (then N and K are still the layer's).

    Returns:
        The plan with its reason and tile.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    return choose(Problem(gpu, sweep, bucket(M), N, K, R, str(dtype).removeprefix("torch.")))


def choose(wanted: Problem) -> Choice:
    plan, _ = forced()
    if plan is not None:
        return Choice(plan, "FORGETLESS_PLAN asks for it")
    rows = measured().get(wanted.gpu, {})
    row = rows.get(wanted.key)
    if row is not None and (wanted, row["plan"]) not in _failed:
        tile = tuple(sorted(row.get("tile", {}).items()))
        return Choice(row["plan"], "measured on this card by forgetless tune", tile)
    found = _found.get(wanted)
    if found is not None:
        return found
    if (wanted, DEFAULT) in _failed:
        return Choice("blas", f"{DEFAULT} failed here: {_failed[wanted, DEFAULT]}")
    return Choice(DEFAULT, "the default on this device, not measured yet")


def undecided(wanted: Problem) -> bool:
    """Whether a first-use check would tell something new."""
    return (
        wanted not in _found
        and forced()[0] is None
        and wanted.key not in measured().get(wanted.gpu, {})
        and (wanted, DEFAULT) not in _failed
    )


def dropped(wanted: Problem) -> bool:
    """Whether a plan failed for this problem in this process."""
    return any(problem == wanted for problem, _ in _failed)


def fail(wanted: Problem, plan: str, error: Exception) -> None:
    """A plan raised: drop it for this problem with one warning, or raise if ``FORGETLESS_PLAN`` says strict."""
    if forced()[1]:
        raise error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    drop(wanted, plan, reason)


def drop(wanted: Problem, plan: str, reason: str) -> None:
    """Never use this plan for this problem again in this process."""
    if (wanted, plan) not in _failed:
        _failed[wanted, plan] = reason
        warnings.warn(f"forgetless: plan {plan!r} dropped for {wanted.key} on {wanted.gpu}: {reason}", stacklevel=2)
    if _found.get(wanted, Choice("", "")).plan == plan:
        del _found[wanted]


# ------------------------------------------------------------------------------------- measuring

Run = Callable[[], Sequence[Tensor]]


def first_use(
    wanted: Problem,
    fused: Run,
    blas: Run,
    device: torch.device,
    plan: str = DEFAULT,
    seconds: Callable[[list[Run], torch.device], list[float]] | None = None,
) -> Choice:
    """Check ``fused`` against ``blas`` and remember the winner.

    Numbers first: a fused plan that fails or disagrees is dropped with one warning. Then a few launches are timed.
    """
    trusted = list(blas())
    try:
        ours = list(fused())
        reason = disagreement(ours, trusted)
    except Exception as error:  # noqa: BLE001 - whatever a compiler or a launch can raise
        fail(wanted, plan, error)
        reason = None
    else:
        if reason is not None:
            if forced()[1]:
                raise RuntimeError(f"plan {plan!r} disagrees with blas for {wanted.key}: {reason}")
            drop(wanted, plan, reason)
    if (wanted, plan) in _failed:
        choice = Choice("blas", f"{plan} was dropped: {_failed[wanted, plan]}")
    else:
        ours_s, blas_s = (seconds or time_interleaved)([fused, blas], device)
        ratio = blas_s / ours_s
        winner = plan if ratio >= 1.0 else "blas"
        choice = Choice(winner, f"first use: {plan} at {ratio:.2f}x the speed of blas")
    _found[wanted] = choice
    return choice


def disagreement(ours: Sequence[Tensor], trusted: Sequence[Tensor]) -> str | None:
    """What is wrong with ``ours``, in words, or None. Both were rounded to the dtype on ways of their own."""
    for index, (a, b) in enumerate(zip(ours, trusted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {index} is {tuple(a.shape)} {a.dtype}, wants {tuple(b.shape)} {b.dtype}"
        if b.numel() == 0:
            continue
        a, b = a.double(), b.double()
        finite = b.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return f"result {index} is NaN or Inf where blas is not, or the other way round"
        apart, size = (a - b)[finite], b[finite]
        if size.numel() == 0:
            continue
        eps = torch.finfo(trusted[index].dtype).eps
        # tf32-free float32 sums in another order differ by more than one eps, half types by about one
        slack = 64 if eps < 1e-4 else 4
        tiny = torch.finfo(trusted[index].dtype).tiny
        if apart.square().mean().sqrt() > slack * eps * size.square().mean().sqrt() + tiny:
            return f"result {index} differs from blas by {apart.abs().max().item():.3g}"
        if apart.abs().max() > 16 * slack * eps * size.abs().max() + tiny:
            return f"result {index} differs from blas by {apart.abs().max().item():.3g} in places"
    return None


def time_interleaved(runs: list[Run], device: torch.device, rounds: int = 5, warmup: int = 2) -> list[float]:
    """Median seconds of each, in turns."""
    times: list[list[float]] = [[] for _ in runs]
    for index in range(warmup + rounds):
        for run, values in zip(runs, times, strict=True):
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                run()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            if index >= warmup:
                values.append(seconds)
    return [statistics.median(values) for values in times]


# ----------------------------------------------------------------------------------------- table


def table_path() -> Path:
    """Where ``forgetless tune`` keeps what it measured."""
    named = os.environ.get("FORGETLESS_TUNE")
    if named:
        return Path(named)
    cache = os.environ.get("FORGETLESS_CACHE")
    return (Path(cache) if cache else Path.home() / ".cache" / "forgetless") / "plans.json"


def measured() -> dict[str, dict[str, Any]]:
    """GPU name -> key -> row of the user's table; empty if there is none. Read once; a broken one is ignored loudly."""
    return _read(str(table_path()))


@functools.cache
def _read(path: str) -> dict[str, dict[str, Any]]:
    try:
        return check_table(json.loads(Path(path).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"forgetless: ignoring the tuning table {path}: {error}", stacklevel=4)
        return {}


def check_table(data: Any) -> dict[str, dict[str, Any]]:
    """The rows of a table.

    Raises:
        ValueError: it is not one.
    """
    if not isinstance(data, dict) or data.get("format") != FORMAT or not isinstance(data.get("gpus"), dict):
        raise ValueError(f"not a forgetless tuning table of format {FORMAT}")
    for gpu, rows in data["gpus"].items():
        if not isinstance(rows, dict):
            raise ValueError(f"the rows of {gpu!r} are not an object")
        for key, row in rows.items():
            if not isinstance(row, dict) or row.get("plan") not in PLANS:
                raise ValueError(f"{gpu!r}, {key!r}: wants a plan out of {', '.join(PLANS)}")
            tile = row.get("tile", {})
            if not isinstance(tile, dict) or not all(k in TILE and type(v) is int and v > 0 for k, v in tile.items()):
                raise ValueError(f"{gpu!r}, {key!r}: a tile has positive integers for {', '.join(TILE)}")
    return data["gpus"]


def store(rows: dict[str, dict[str, Any]], path: Path | None = None) -> Path:
    """Write the whole table, through a temporary file that is then renamed."""
    path = path or table_path()
    check_table({"format": FORMAT, "gpus": rows})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"format": FORMAT, "gpus": rows}, sort_keys=True)
    forget()
    return path


def forget() -> None:
    """Forget the table as read and this process' findings: the next choice starts from the files."""
    _read.cache_clear()
    _found.clear()
    _failed.clear()
