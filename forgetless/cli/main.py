"""The ``forgetless`` command: parses the command line, then imports what the command needs and runs it."""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from collections.abc import Sequence

from .. import __version__
from .arguments import fail, parser

#: Packages that compare, finetune and report need beyond those of the library.
EXTRA = ("accelerate", "matplotlib", "polib", "rich", "scipy", "transformers")
#: Commands that parse their own arguments: name -> (module with ``main(argv) -> int``, help).
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code: 0 done, 1 diverged, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    tools = {name: tool for name, tool in TOOLS.items() if installed(tool[0])}
    if words and words[0] in tools:
        return int(importlib.import_module(tools[words[0]][0]).main(words[1:]) or 0)
    top = parser({name: text for name, (_, text) in tools.items()}, __version__)
    try:
        given = top.options(words)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    command = given.pop("command", None)
    if command is None:
        top.print_help()
        return 2
    missing = [name for name in EXTRA if not installed(name)]
    if missing:
        return fail(f"{', '.join(missing)} not installed; install with: pip install 'forgetless[study]'")
    from .commands import run

    return run(command, given, shlex.join(["forgetless", *words]))
