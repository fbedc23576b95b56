"""Timing and bookkeeping shared by all benchmarks: interleaved runs, medians, and where a number came from."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "transformers", "peft", "numpy")


def machine() -> dict[str, Any]:
    """What ran: processor, cores, threads, GPU, versions, commit."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": found,
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    try:
        here = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        dirty = subprocess.run(["git", "status", "--porcelain"], cwd=here, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")


def interleave(
    providers: dict[str, Callable[[], Any]],
    rounds: int,
    warmup: int = 1,
    before: Callable[[], None] | None = None,
) -> dict[str, dict[str, float]]:
    """Seconds per call of each provider, one call of each per round, so that a noisy machine is noisy for all.

    Returns:
        name -> median, low (minimum), spread (median absolute deviation), in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        for index in range(warmup + rounds):
            for name, run in providers.items():
                if before is not None:
                    before()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if index >= warmup:
                    times[name].append(time.perf_counter() - start)
    finally:
        if enabled:
            gc.enable()
    return {name: summary(values) for name, values in times.items()}


def summary(values: list[float]) -> dict[str, float]:
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    return {"median": middle, "low": min(values), "spread": spread}


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write through a temporary file, then rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(scratch, path)
