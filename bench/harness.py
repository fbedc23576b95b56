"""Timing and bookkeeping shared by all benchmarks: interleaved runs, peaks, and where a number came from."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from forgetless.study.machine import commit, processor

HERE = Path(__file__).parent
#: Committed results lie beside this file; outside of a source checkout, in the current folder.
RESULTS = HERE / "results" if (HERE.parent / "pyproject.toml").exists() else Path("bench-results")
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")
#: Raised by one whenever a reader of the old form would misunderstand the new one.
SCHEMA = 1
#: Fewer rounds than this are not summarised, whatever the time budget says.
FEWEST = 3

Run = Callable[[], Any]
#: A provider is one callable, or several that are timed one by one (forward, backward).
Provider = Run | Sequence[Run]


# ---------------------------------------------------------------------------------- where and what


def machine() -> dict[str, Any]:
    """What ran: processor, cores, threads, GPU, versions, commit."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": found,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def tag(device: torch.device) -> str:
    """What a result file is named after: "cpu", or the GPU's name."""
    if device.type != "cuda":
        return device.type
    return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")


def clocks() -> str | None:
    """Clocks, power and temperature of the GPU as its driver reports them now; None where it does not."""
    fields = "clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu,clocks_throttle_reasons.active"
    run = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv"]
    try:
        done = subprocess.run(run, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


# ----------------------------------------------------------------------------------------- timing


def interleave(
    providers: Mapping[str, Provider],
    rounds: int,
    warmup: int = 1,
    before: Run | None = None,
    device: torch.device | str = "cpu",
    seconds: float | None = None,
) -> dict[str, Any]:
    """Seconds per call of each provider, one call of each per round, so that a noisy machine is noisy for all.

    Every round has an order of its own, the same in every run: what a provider finds in caches and in the allocator is
    left there by its predecessor, and a fixed order would always give it the same one.

    On CUDA the time is that between two events on the stream, after a write that empties the L2 cache, within an NVTX
    range of the provider's name. Nothing is collected by Python's garbage collector meanwhile.

    Args:
        providers: what to time; a sequence of callables is timed part by part.
        rounds: at most so many, after ``warmup`` that are not counted.
        before: called, untimed, before each call.
        seconds: stop after this time, but not before ``FEWEST`` rounds.

    Returns:
        name -> median, low (minimum), spread (median absolute deviation), rounds, each (the rounds one by one); for
        several parts also "parts", a list of the same for each part.
    """
    device = torch.device(device)
    parts = {name: [run] if callable(run) else list(run) for name, run in providers.items()}
    times: dict[str, list[list[float]]] = {name: [] for name in parts}
    clock = _cuda_times if device.type == "cuda" else _cpu_times
    flush = _l2_flush(device) if device.type == "cuda" else None
    order, draw = list(parts.items()), random.Random(0)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    begin = time.perf_counter()
    try:
        for index in range(warmup + rounds):
            if index == warmup:
                begin = time.perf_counter()
            draw.shuffle(order)
            for name, runs in order:
                if before is not None:
                    before()
                if flush is not None:
                    flush()
                found = clock(name, runs)
                if index >= warmup:
                    times[name].append(found)
            late = seconds is not None and time.perf_counter() - begin > seconds
            if late and index + 1 - warmup >= min(FEWEST, rounds):
                break
    finally:
        if enabled:
            gc.enable()
    result: dict[str, Any] = {}
    for name, rows in times.items():
        result[name] = summary([sum(row) for row in rows])
        if len(parts[name]) > 1:
            result[name]["parts"] = [summary(list(column)) for column in zip(*rows, strict=True)]
    return result


def _cpu_times(name: str, runs: list[Run]) -> list[float]:
    marks = [time.perf_counter()]
    for run in runs:
        run()
        marks.append(time.perf_counter())
    return [b - a for a, b in zip(marks, marks[1:], strict=False)]


def _cuda_times(name: str, runs: list[Run]) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)]
    with torch.cuda.nvtx.range(name):
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) * 1e-3 for a, b in zip(marks, marks[1:], strict=False)]


def _l2_flush(device: torch.device) -> Run:
    size = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    buffer = torch.empty(max(2 * size, 64 << 20), dtype=torch.uint8, device=device)
    return buffer.zero_


def graphed(run: Run) -> Run:
    """The call as one CUDA graph: what is left when the host costs nothing. Raises RuntimeError where it cannot be."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()

    def replay(kept: Any = kept) -> None:  # the graph's outputs live as long as the graph
        graph.replay()

    return replay


def summary(values: list[float]) -> dict[str, Any]:
    middle, spread = middle_of(values)
    each = [four_digits(value) for value in values]
    return {"median": middle, "low": min(values), "spread": spread, "rounds": len(values), "each": each}


def middle_of(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median absolute deviation from it."""
    middle = statistics.median(values)
    return middle, statistics.median(abs(value - middle) for value in values)


def four_digits(value: float) -> float:
    return float(f"{value:.4g}")


def compiler_missing(device: torch.device) -> str | None:
    """Why torch.compile is of no use here, or None."""
    try:
        with torch.enable_grad():
            compiled = torch.compile(lambda x: (x * 2.0).sin())
            compiled(torch.ones(4, device=device, requires_grad=True)).sum().backward()
    except Exception as error:  # whatever the compiler stack raises, it is the reason that is printed
        text = str(error).strip()
        return f"torch.compile: {type(error).__name__}: {text.splitlines()[0] if text else ''}"
    return None


def peaks(device: torch.device, dtypes: Sequence[torch.dtype], smoke: bool = False) -> dict[str, float]:
    """The machine's own peaks, measured: the best TFLOP/s of square products per dtype, and the best GB/s of a copy.

    A copy of n bytes moves 2 n.
    """
    sizes = (64,) if smoke else ((4096, 8192) if device.type == "cuda" else (1024, 2048))
    rounds = 2 if smoke else 7
    found = {}
    for dtype in dtypes:
        best = 0.0
        for n in sizes:
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            low = interleave({"mm": lambda a=a, b=b, out=out: torch.mm(a, b.T, out=out)}, rounds, 2, None, device)
            best = max(best, 2 * n**3 / low["mm"]["low"] * 1e-12)
        found[f"tflops_{short(dtype)}"] = best
    source = torch.ones((1 << 20) if smoke else (1 << 30 if device.type == "cuda" else 1 << 28), dtype=torch.uint8)
    source = source.to(device)
    target = torch.empty_like(source)
    low = interleave({"copy": lambda: target.copy_(source)}, rounds, 2, None, device)["copy"]["low"]
    return {**found, "gbs_copy": 2 * source.numel() / low * 1e-9}


# --------------------------------------------------------------------------------- options, output


def parser(doc: str | None, bench: str, rounds: int) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(
        prog=f"forgetless bench {bench}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help=f"interleaved rounds, default {rounds}")
    made.add_argument("--seconds", type=float, help="stop a comparison after so long, but not before 3 rounds")
    made.add_argument("--smoke", action="store_true", help="tiny sizes: shows that it runs, measures nothing")
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--out", type=Path, help="folder, or .json file; default bench/results (--smoke: nowhere)")
    return made


def start(bench: str, options: argparse.Namespace, arguments: Sequence[str] | None) -> dict[str, Any]:
    """The part of a result that does not depend on what is measured."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    device = torch.device(options.device)
    found: dict[str, Any] = {
        "benchmark": bench,
        "schema": SCHEMA,
        "smoke": options.smoke,
        "command": shlex.join(["python", "-m", "bench", bench, *_public(given)]),
        "machine": machine(),
        "notes": [],
    }
    if device.type == "cuda":
        found["clocks_before"] = clocks()
    return found


def _public(arguments: list[str]) -> list[str]:
    """Without ``--out``: a folder of somebody's machine is nobody's business."""
    kept = []
    skip = False
    for argument in arguments:
        if skip or argument.startswith("--out="):
            skip = False
        elif argument == "--out":
            skip = True
        else:
            kept.append(argument)
    return kept


def finish(result: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Print the notes and write the file."""
    device = torch.device(options.device)
    if device.type == "cuda":
        result["clocks_after"] = clocks()
    for note in result["notes"]:
        print(f"note: {note}")
    if options.out is None and options.smoke:
        print("smoke run: nothing is written, nothing was measured")
        return result
    out = options.out or RESULTS
    path = out if out.suffix == ".json" else out / f"{result['benchmark']}-{tag(device)}.json"
    write_json(path, result)
    print(f"written to {path}")
    return result


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]

    def line(row: Sequence[str]) -> str:
        rest = "  ".join(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        return f"{row[0]:<{widths[0]}}  {rest}".rstrip()

    return "\n".join([line(columns), *map(line, rows)])


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def share(ours: float, theirs: float, floor: float) -> float | None:
    """(ours - floor) / (theirs - floor): our part of their overhead. None where theirs is nothing."""
    return (ours - floor) / (theirs - floor) if theirs > floor else None


def shares(ours: Mapping[str, Any], theirs: Mapping[str, Any], floor: Mapping[str, Any]) -> dict[str, float | None]:
    """Our part of their overhead, of three summaries from one ``interleave``.

    The share is taken within every round, where all three ran one after the other, and the median over the rounds is
    reported: a machine that is slow for a while is slow for all of a round. Rounds in which theirs is not above the
    floor say nothing and are left out; where they are half of all or more, there is no share.

    Returns:
        share and spread (median over the rounds, median absolute deviation; or None), rounds (those that say
        something), of_medians (the share of the three medians; or None).
    """
    rounds = zip(ours["each"], theirs["each"], floor["each"], strict=True)
    found = [one for one in (share(*times) for times in rounds) if one is not None]
    middle, spread = middle_of(found) if 2 * len(found) > len(ours["each"]) else (None, None)
    of_medians = share(ours["median"], theirs["median"], floor["median"])
    return {"share": middle, "spread": spread, "rounds": len(found), "of_medians": of_medians}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write through a temporary file, then rename; a list of numbers takes one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, scratch = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    text = json.dumps(data, indent=1, allow_nan=False)
    text = re.sub(r"\[\n[-+.\deE,\s]*\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text + "\n")
    os.chmod(scratch, 0o644)
    os.replace(scratch, path)
