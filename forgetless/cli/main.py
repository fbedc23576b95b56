"""The ``forgetless`` command: finds what is installed, then hands over to the command that was asked for."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence

#: What the study needs beyond the library.
EXTRA = ("accelerate", "matplotlib", "rich", "transformers", "typer")
#: Commands that live elsewhere: name -> (module with ``main(argv) -> int``, what it does).
TOOLS = {
    "bench": ("forgetless_bench.cli", "Time kernels, layers and whole steps on this machine."),
    "tune": ("forgetless.cli.tune", "Measure the best plans for this GPU and store them."),
    "doctor": ("forgetless.cli.doctor", "Check that the fused kernels work on this machine."),
}


def installed(module: str) -> bool:
    """Whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its package is missing
        return False


def fail(message: str) -> int:
    """One line on standard error; the exit code of bad input."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 diverged, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments and arguments[0] in TOOLS and installed(TOOLS[arguments[0]][0]):
        tool = importlib.import_module(TOOLS[arguments[0]][0])
        return int(tool.main(arguments[1:]) or 0)
    missing = [name for name in EXTRA if not installed(name)]
    if missing:
        return fail(f"{', '.join(missing)} not installed; install with: pip install 'forgetless[study]'")
    from .commands import run

    return run(arguments)
