"""Peak memory, of one method and not of what ran before it."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys

import torch


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
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak / (2**20 if sys.platform == "darwin" else 1024)
