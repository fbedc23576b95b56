"""Run a module on a phantom card: ``python -m phantom 90 bench gpu --minutes 9``."""

from __future__ import annotations

import contextlib
import importlib
import runpy
import sys
from unittest import mock

import phantom

if __name__ == "__main__":
    arch, module, *sys.argv[1:] = sys.argv[1:]
    with phantom.card(int(arch)), contextlib.ExitStack() as stack:
        if module in ("bench", "forgetless_bench"):  # the processes that it starts have such a card too
            gpu = importlib.import_module(f"{module}.gpu")
            stack.enter_context(mock.patch.object(gpu, "PYTHON", (*gpu.PYTHON, "phantom", arch)))
        runpy.run_module(module, run_name="__main__", alter_sys=True)
