"""Where a number comes from: the machine, the versions of the packages, and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
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


def versions() -> dict[str, str]:
    """Python's version and that of every package in ``PACKAGES`` that is installed."""
    result = {"python": platform.python_version()}
    for name in PACKAGES:
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
