"""Compile every kernel for every card we know, without one: what fits, what spills, what uses tensor cores.

The launchers themselves are run, on tensors without storage and under a driver that names a card but has none: what is
compiled is what a real call would compile, arguments, tiles, divisibility and all.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from forgetless_kernels import tiles

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class _NoDriver:
    """Answers what the compiler asks of a driver; each architecture is a device of its own."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextlib.contextmanager
def compiling_for(arch: int) -> Iterator[list]:
    """Within the block, launches compile for ``arch`` and run nothing; the list collects the compiled kernels."""
    kernels: list = []
    run, arch_of = JITFunction.run, tiles.arch_of

    @functools.wraps(run)
    def warm(self, *args, grid, warmup, **kwargs):
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    before = driver._active
    driver.set_active(_NoDriver(arch))
    JITFunction.run, tiles.arch_of = warm, lambda device: arch
    try:
        yield kernels
    finally:
        JITFunction.run, tiles.arch_of = run, arch_of
        driver._active = before


def usage(kernel) -> dict:
    """Registers, stack, shared memory and the instructions that matter of one compiled kernel"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "kernel": kernel.metadata.name,
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "stack": int(re.search(r"STACK:(\d+)", text)[1]),
        "shared": kernel.metadata.shared,
        "mma": len(re.findall(r"^.*\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)", ptx, re.M)),
        "stores": len(re.findall(r"\bst\.global|cp\.async\.bulk\.tensor\.\S*global\.shared|cp\.async\.bulk\.tensor[^\n]*\.global\.shared", ptx)),
        "warps": kernel.metadata.num_warps,
    }
