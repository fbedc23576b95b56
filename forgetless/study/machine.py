"""Where a number comes from: the machine, the versions of the packages, the commit, and the peak of memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
#: A change of these alone does not make it another program.
RESULTS = (":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)README.md")
PACKAGES = ("forgetless", "torch", "triton", "transformers", "accelerate", "numpy")


def machine(device: torch.device) -> dict[str, Any]:
    """The system, the processor, its threads, and the device; nothing that names a person, a host or a folder."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """Python's version and that of every one of these packages that is installed."""
    result = {"python": platform.python_version()}
    for name in packages:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**result, "torch": torch.__version__}


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.split(":", 1)[1].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this source tree, with "+" if tracked files differ from it; None outside of a git checkout."""
    if not (ROOT / ".git").exists():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", ":/", *RESULTS])
    try:
        head, changes = (
            subprocess.run(
                ["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10, check=True
            ).stdout.strip()
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + ("+" if changes else "")


class Peak:
    """Peak memory in MiB since construction: of the process on a CPU, of the allocator on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif sys.platform == "linux":
            try:
                ctypes.CDLL(None).malloc_trim(0)  # what earlier methods freed is not this one's
                with open("/proc/self/clear_refs", "w") as file:
                    file.write("5")
            except (OSError, AttributeError):
                pass

    def mib(self) -> float:
        """The peak so far; where the system cannot reset it, the peak of the whole process."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        try:
            with open("/proc/self/status") as file:
                return next(int(row.split()[1]) / 1024 for row in file if row.startswith("VmHWM"))
        except (OSError, StopIteration):
            import resource  # not on Windows

            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / (2**20 if sys.platform == "darwin" else 1024)
