"""Run a module on a phantom card: ``python -m phantom 90 bench gpu --minutes 9``."""

from __future__ import annotations

import runpy
import sys
from unittest import mock

import phantom

if __name__ == "__main__":
    arch, module, *sys.argv[1:] = sys.argv[1:]
    with phantom.card(int(arch)):
        from forgetless_bench import gpu  # what it starts runs on such a card too

        python = (*gpu.PYTHON, "phantom", arch)
        with mock.patch.object(gpu, "PYTHON", python):
            runpy.run_module(module, run_name="__main__", alter_sys=True)
