"""Where a layer runs, and why: the backend, the plan and the tile. The one module that names the kernels.

A call of the op runs on the fused kernels if its tensors are on a CUDA device, Triton is installed and the dtype is
one of theirs; on ``blas`` otherwise; on what ``backend`` says within its block. The kernels have these plans:

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
``FORGETLESS_TUNE`` names the table's file, by default plans.json in ``FORGETLESS_CACHE`` or ~/.cache/forgetless. The
table is read when a shape first runs; ``forget`` starts afresh.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import compat
from ..files import write_json
from . import blas, reference
from .check import dtype_name

kernels: Any = None
try:
    from forgetless_kernels import fused as kernels  # type: ignore[no-redef]
    from forgetless_kernels import tiles
    from forgetless_kernels.tl_utils import LaunchError
except ImportError as error:
    if error.name is None or not error.name.startswith("triton"):
        raise

    class LaunchError(RuntimeError):  # type: ignore[no-redef]
        """A kernel could not be compiled or launched."""


#: Dtypes that the fused kernels take; others run on BLAS.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

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


#: What the first use measured, and what failed, in this process.
_measured: dict[Problem, Choice] = {}
_failed: dict[tuple[Problem, str], str] = {}
#: What ``choose_route`` made of these two, of the table and of FORGETLESS_PLAN, without a check and with one. Emptied
#: when one of the first three changes; the last is in the key.
_routes: dict[tuple[Any, ...], tuple[Route, Route]] = {}


# --------------------------------------------------------------------------------------- backends


@dataclass(frozen=True)
class Route:
    """The module that runs one call of the op, the plan and tile of the kernels, and what they were chosen for."""

    module: Any
    plan: str = "split"
    tile: tuple[tuple[str, int], ...] = ()
    problem: Problem | None = None
    unchecked: bool = False  # first use: to be compared with blas

    def tiles(self) -> AbstractContextManager[Any]:
        """The block in which the kernels run with this tile."""
        return tile_forced(self.tile) if self.tile else _NO_TILE


_NO_TILE = nullcontext()

BLAS = Route(blas)
REFERENCE = Route(reference)

_asked: ContextVar[ModuleType | None] = ContextVar("forgetless backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the op on one backend within the block: "reference", "blas" or "triton".

    In this thread, whatever the device; a call's backward pass runs where its forward pass did. To measure or to
    check, not to train with.

    Raises:
        ValueError: another name, or Triton is not installed.
    """
    known = {"reference": reference, "blas": blas, "triton": kernels}
    if known.get(name) is None:
        have = [key for key, module in known.items() if module is not None]
        raise ValueError(f"backend is {name!r}, wants one of {have}")
    token = _asked.set(known[name])
    try:
        yield
    finally:
        _asked.reset(token)


def asked_module() -> ModuleType | None:
    """The module of the ``backend`` block that runs now; None outside of one."""
    return _asked.get()


def module_for(on_cuda: bool, dtype: torch.dtype, asked: Any) -> Any:
    """The module that runs the op there in that dtype, before any plan is chosen."""
    module = asked or (kernels if on_cuda and kernels is not None else blas)
    return blas if module is kernels and dtype not in KERNEL_DTYPES else module


def choose_route(sweep: str, like: Tensor, up: Tensor, down: Tensor, asked: Any = None) -> Route:
    """Backend, plan and tile for one call.

    Args:
        sweep: "forward" or "backward".
        like: (M, ..) x, or dy: device, dtype and rows.
        up, down: (N, R), (R, K) of the first layer.
        asked: the module of a ``backend`` block.
    """
    if compat.is_batched(like):  # torch.autograd.grad(is_grads_batched=True): only what torch can vectorise
        return REFERENCE
    module = module_for(like.is_cuda, like.dtype, asked)
    if module is not kernels:
        return REFERENCE if module is reference else BLAS
    (N, R), K = up.shape, down.shape[1]
    if not N * K:  # no grid to launch
        return BLAS
    M = bucket(like.shape[0])
    key = like.device, sweep, M, N, K, R, like.dtype, os.environ.get("FORGETLESS_PLAN", "")
    routes = _routes.get(key)
    if routes is None:
        problem = problem_of(like.device, sweep, M, N, K, R, like.dtype)
        choice = choose(problem)
        module = blas if choice.plan == "blas" else kernels
        route = Route(module, choice.plan, choice.tile if module is kernels else (), problem)
        routes = route, replace(route, unchecked=module is kernels and undecided(problem))
        _routes[key] = routes
    return routes[routes[1].unchecked and checkable(like.device)]


def runs_kernels(x: Tensor) -> bool:
    """Whether a call with this x may run somewhere else than on BLAS."""
    return x.is_cuda or asked_module() is not None


def in_pass(x: Tensor, up: Tensor, down: Tensor, asked: Any = None) -> bool:
    """Whether a forward pass makes the products that penalties want; where BLAS runs, ``fl.penalty`` does."""
    return choose_route("forward", x, up, down, asked).module is not blas


def failed(route: Route, error: Exception) -> Route:
    """The route to take after ``error``: BLAS, with one warning; raises ``error`` where that is asked for."""
    if route.problem is None:
        raise error
    fail(route.problem, route.plan, error)
    return BLAS


def explain_path(
    device: torch.device, dtype: torch.dtype, N: int, K: int, R: int, sweep: str = "forward"
) -> tuple[str, str]:
    """The plan's name for a layer, and the reason in words; for 4096 tokens where it depends on them.

    Args:
        device: of the activations.
        dtype: of the activations.
        N: out_features.
        K: in_features.
        R: rank.
        sweep: "forward", or that of a stack of experts.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    asked = asked_module()
    module = module_for(device.type == "cuda", dtype, asked)
    if module is kernels and kernels is not None:
        choice = choose(problem_of(device, sweep, 4096, N, K, R, dtype))
        return choice.plan, choice.reason
    if module is reference:
        return "reference", ""
    if asked is kernels is not None or device.type == "cuda" and kernels is not None and asked is None:
        return "blas", f"the fused kernels do not take {dtype_name(dtype)}"
    if device.type == "cuda" and kernels is None:
        return "blas", "Triton is not installed"
    return "blas", f"in-place BLAS is the {device.type} path"


@contextmanager
def tile_forced(tile: tuple[tuple[str, int], ...]) -> Iterator[None]:
    """Within the block the GEMM kernels run with these tile fields."""
    with tiles.forced("matmul_lowrank", **dict(tile)), tiles.forced("matmul_lowrank_t", **dict(tile)):
        yield


def checkable(device: torch.device) -> bool:
    """Whether a first use may be checked there now: launches can be timed and nothing is being recorded."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def keep_bits(seed: Tensor, p: float, M: int, K: int) -> Tensor:  # (M, K) int16, -1 keep, 0 drop
    """``blas.keep_bits`` in one launch; where the kernel fails, once with a warning and from then on by torch."""
    try:
        return kernels.keep_bits(seed, p, M, K)
    except LaunchError as error:
        if forced()[1]:
            raise
        blas.MASK_MAKERS.clear()
        warnings.warn(f"forgetless: the kernel of dropout masks is not used any more: {error}", stacklevel=2)
        return blas.keep_bits(seed, p, M, K)


if kernels is not None:
    blas.MASK_MAKERS["cuda"] = keep_bits


# ------------------------------------------------------------------------------------------ plans


def bucket(M: int) -> int:
    """Tokens rounded up to a power of two, 16 to 65536."""
    return 1 << min(max(M - 1, 15).bit_length(), 16)


@functools.cache
def gpu_name(device: torch.device) -> str:
    """The name plans are stored under: the card's, or "cpu" for the interpreter."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def problem_of(device: torch.device, sweep: str, M: int, N: int, K: int, R: int, dtype: torch.dtype) -> Problem:
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


def choose(problem: Problem) -> Choice:
    """The plan for a layer on a card, from the environment, the tables and this process' findings.

    Args:
        problem: card, pass, sizes and dtype, as ``problem_of`` makes it.

    Returns:
        The plan with its reason and tile.

    Raises:
        ValueError: ``FORGETLESS_PLAN`` holds something else than a plan or "strict".
    """
    plan, _ = forced()
    if plan is not None:
        return Choice(plan, "FORGETLESS_PLAN asks for it")
    rows = measured().get(problem.gpu, {})
    row = rows.get(problem.key)
    if row is not None and (problem, row["plan"]) not in _failed:
        tile = tuple(sorted(row.get("tile", {}).items()))
        return Choice(row["plan"], "measured on this card by forgetless tune", tile)
    if problem in _measured:
        return _measured[problem]
    if (problem, DEFAULT) in _failed:
        return Choice("blas", f"{DEFAULT} failed here: {_failed[problem, DEFAULT]}")
    return Choice(DEFAULT, "the default on this device, not measured yet")


def undecided(problem: Problem) -> bool:
    """Whether a first-use check would tell something new."""
    return (
        problem not in _measured
        and forced()[0] is None
        and problem.key not in measured().get(problem.gpu, {})
        and (problem, DEFAULT) not in _failed
    )


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
    _routes.clear()


# ------------------------------------------------------------------------------------- measuring

Run = Callable[[], Sequence[Tensor]]


def first_use(
    route: Route,
    run: Callable[[Route], Sequence[Tensor]],
    device: torch.device,
    seconds: Callable[[list[Run], torch.device], list[float]] | None = None,
) -> Route:
    """Check what ``run`` gives by this route against blas, remember the winner and return its route.

    Numbers first: a fused plan that fails or disagrees is dropped with one warning. Then a few launches are timed.
    """
    problem, plan = route.problem, route.plan
    assert problem is not None
    fused = replace(route, unchecked=False)
    expected = run(BLAS)
    reason = disagreement(run(fused), expected)  # blas took over already if a launch failed
    if reason is not None:
        if forced()[1]:
            raise RuntimeError(f"plan {plan!r} disagrees with blas for {problem.key}: {reason}")
        drop(problem, plan, reason)
    if (problem, plan) in _failed:
        choice = Choice("blas", f"{plan} was dropped: {_failed[problem, plan]}")
    else:
        ours_s, blas_s = (seconds or time_interleaved)([lambda: run(fused), lambda: run(BLAS)], device)
        ratio = blas_s / ours_s
        choice = Choice(plan if ratio >= 1.0 else "blas", f"first use: {plan} at {ratio:.2f}x the speed of blas")
    _measured[problem] = choice
    _routes.clear()
    return BLAS if choice.plan == "blas" else fused


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
    for known in (_read.cache_clear, _measured.clear, _failed.clear, _routes.clear):
        known()
