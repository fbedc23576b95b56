"""Triton's driver of a phantom card: everything but the launch itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver

from .trace import Launch, Trace

#: The largest grid that CUDA launches.
GRID = (2**31 - 1, 65535, 65535)


class _Utilities:
    """What Triton asks of a driver's library."""

    def __init__(self, trace: Trace):
        self.trace = trace

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads of a block)"""
        self.trace.compiled.append(name)
        return 1, 1, 64, 0, 1024

    def unload_module(self, module: int) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        card = self.trace.card
        return {
            "max_shared_mem": card.shared, "multiprocessor_count": card.processors, "warpSize": 32,
            "max_num_regs": 65536,
        }  # fmt: skip


class Driver(DriverBase):
    """The driver of one card."""

    def __init__(self, trace: Trace):
        self.trace, self.utils = trace, _Utilities(trace)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What launches one compiled kernel."""
        trace, kernel = self.trace, metadata.name

        def launch(x: int, y: int, z: int, stream: int, function: int, *arguments: Any, **_: Any) -> None:
            if not all(0 <= size <= most for size, most in zip((x, y, z), GRID, strict=True)):
                raise RuntimeError(f"Triton Error [CUDA]: invalid argument: grid {(x, y, z)}")
            for one in arguments:
                if isinstance(one, torch.Tensor) and not one.is_cuda:
                    raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
            trace.launches.append(Launch(kernel, (x, y, z)))

        return launch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.trace.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("a phantom card has no launcher in C")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("a phantom card has no clock")


@contextlib.contextmanager
def driving(phantom: Driver) -> Iterator[None]:
    """Within the block, Triton runs on this driver."""
    driver.set_active(phantom)
    try:
        yield
    finally:
        driver._active = None
