"""The first use of a problem on a card: the plans against BLAS on the layer's own tensors, the fastest right one stays.

Numbers first, then a few timed calls, so that nobody is slower than BLAS out of the box. Nothing is checked while a
CUDA graph is captured or a trace compiled. In a job of several processes the first measurement that is finished
counts for all: it is written into the job's store, so nobody waits for anybody. It is not always rank 0's, which may
never be given that problem (another stage, a batch of another length): to wait for it could take for ever.

Beside what the layer makes anyway it takes the memory of one result more. Where that is not there, nothing is decided:
the default runs, and a later call tries again, ``TRIES`` times in all.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import compat
from .plans import Choice, Problem, Route, decide, drop, failed, forced, tries

Run = Callable[[], Sequence[Tensor]]

#: How often a first use is begun that runs out of memory.
TRIES = 3
#: Elements that are compared at a time.
CHUNK = 1 << 18
#: Calls of one timing.
CALLS = 8


def checkable(device: torch.device) -> bool:
    """Whether a first use may be checked there now: launches can be timed and nothing is being recorded."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def first_use(
    routes: Sequence[Route],
    run: Callable[[Route], Sequence[Tensor]],
    device: torch.device,
    seconds: Callable[[list[Run], torch.device], list[float]] | None = None,
) -> Route:
    """The route to take, which the problem's later calls take as well.

    Args:
        routes: the one that was chosen, other plans, and BLAS last.
        run: a call by a route.
        device: of the call.
        seconds: times some runs; ``time_queued`` if not given.

    Raises:
        RuntimeError: a plan disagrees with BLAS, and ``FORGETLESS_PLAN`` says strict.
    """
    routes = [replace(route, unchecked=False) for route in routes]
    problem = routes[0].problem
    assert problem is not None
    try:
        return _measure(problem, routes, run, device, seconds or time_queued)
    except torch.OutOfMemoryError:
        tries[problem] = tries.get(problem, 0) + 1
    if tries[problem] >= TRIES:
        decide(problem, Choice(routes[0].plan, "not measured: no memory was left for it"))
    return routes[0]


def _measure(
    problem: Problem,
    routes: Sequence[Route],
    run: Callable[[Route], Sequence[Tensor]],
    device: torch.device,
    seconds: Callable[[list[Run], torch.device], list[float]],
) -> Route:
    *others, blas = routes
    expected = run(blas)
    for route in others:
        reason = disagreement(run(route), expected)  # blas took over already if a launch failed
        if reason is not None:
            if forced()[1]:
                raise RuntimeError(f"plan {route.plan!r} disagrees with blas for {problem.key}: {reason}")
            drop(problem, route.plan, reason)
    del expected
    right = [route for route in others if not failed(problem, route.plan)]
    if not right:
        choice = Choice("blas", f"{others[0].plan} was dropped: {failed(problem, others[0].plan)}")
    else:
        choice = _of_the_job(problem) or _timed(problem, [*right, blas], run, device, seconds)
        if choice.plan not in [route.plan for route in (*right, blas)]:  # right elsewhere, wrong here
            choice = Choice("blas", f"{choice.plan} was dropped: {failed(problem, choice.plan)}")
    decide(problem, choice)
    return next(route for route in routes if route.plan == choice.plan)


def _timed(
    problem: Problem,
    routes: Sequence[Route],  # blas last
    run: Callable[[Route], Sequence[Tensor]],
    device: torch.device,
    seconds: Callable[[list[Run], torch.device], list[float]],
) -> Choice:
    def runner(route: Route) -> Run:
        return lambda: run(route)

    *times, blas_s = seconds([runner(route) for route in routes], device)
    best = min(range(len(times)), key=lambda i: times[i])
    plan, ratio = routes[best].plan, blas_s / times[best]
    text = f"{plan} at {ratio:.2f}x the speed of blas"
    ours = plan if ratio >= 1.0 else "blas"
    agreed = compat.agree(_name(problem), ours)
    return Choice(agreed, f"first use: {text}" + ("" if agreed == ours else "; another process of the job was first"))


def _name(problem: Problem) -> str:
    return f"forgetless/{problem.gpu}/{problem.key}"


def _of_the_job(problem: Problem) -> Choice | None:
    """What another process of this job has measured."""
    plan = compat.agreed(_name(problem))
    return None if plan is None else Choice(plan, "first use, by another process of the job")


def disagreement(ours: Sequence[Tensor], trusted: Sequence[Tensor]) -> str | None:
    """What is wrong with ``ours``, in words, or None. Both were rounded to the dtype on ways of their own.

    Compared a chunk at a time: in float64, whole results would take many times their memory.
    """
    for index, (a, b) in enumerate(zip(ours, trusted, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {index} is {tuple(a.shape)} {a.dtype}, wants {tuple(b.shape)} {b.dtype}"
        if b.numel() == 0:
            continue
        rows = max(1, CHUNK * len(b) // b.numel())
        parts = [_apart(*part) for part in zip(a.split(rows), b.split(rows), strict=True)]
        same, count, squares, size, far, big = (torch.stack(values) for values in zip(*parts, strict=True))
        if not same.all():
            return f"result {index} is NaN or Inf where blas is not, or the other way round"
        count = count.sum().clamp(min=1)
        eps, tiny = torch.finfo(b.dtype).eps, torch.finfo(b.dtype).tiny
        # tf32-free float32 sums in another order differ by more than one eps, half types by about one
        slack = 64 if eps < 1e-4 else 4
        if (squares.sum() / count).sqrt() > slack * eps * (size.sum() / count).sqrt() + tiny:
            return f"result {index} differs from blas by {far.max().item():.3g}"
        if far.max() > 16 * slack * eps * big.max() + tiny:
            return f"result {index} differs from blas by {far.max().item():.3g} in places"
    return None


def _apart(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
    """Whether the same is finite, how much, squares of the difference and of b, and the largest of each"""
    finite = b.isfinite()
    same = (a.isfinite() == finite).all()
    size = torch.where(finite, b, 0).double()
    apart = torch.where(finite, a, 0).double() - size
    return same, finite.sum(), apart.square().sum(), size.square().sum(), apart.abs().max(), size.abs().max()


def time_queued(runs: list[Run], device: torch.device, rounds: int = 5, warmup: int = 2) -> list[float]:
    """Median seconds of a call of each, in turns, as a step runs them: queued one after the other, without waiting.

    So the slower one counts, host or card.
    """
    calls = CALLS if device.type == "cuda" else 1
    times: list[list[float]] = [[] for _ in runs]
    for index in range(warmup + rounds):
        for run, values in zip(runs, times, strict=True):
            if device.type == "cuda":
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                for _ in range(calls):
                    run()
                end.record()
                end.synchronize()
                seconds = begin.elapsed_time(end) / 1e3
            else:
                start = time.perf_counter()
                run()
                seconds = time.perf_counter() - start
            if index >= warmup:
                values.append(seconds / calls)
    return [statistics.median(values) for values in times]
