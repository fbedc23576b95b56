"""Where a number came from: the processor and the commit. Needs nothing but the standard library."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: A change of these alone does not make it another program.
RESULTS = (":(top,exclude)bench/results", ":(top,exclude)docs", ":(top,exclude)README.md")


def processor() -> str:
    """The processor's name as the system gives it."""
    try:
        rows = Path("/proc/cpuinfo").read_text().splitlines()
        return next(row.split(":", 1)[1].strip() for row in rows if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str | None:
    """The git commit of this source tree, with "+" where tracked files differ from it; None outside of one."""
    if not (ROOT / ".git").exists():
        return None
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", ":/", *RESULTS])
    try:
        found = [
            subprocess.run(["git", "-C", str(ROOT), *command], capture_output=True, text=True, timeout=10, check=True)
            for command in commands
        ]
    except (OSError, subprocess.SubprocessError):
        return None
    head, changes = (done.stdout.strip() for done in found)
    return head + ("+" if changes else "")
