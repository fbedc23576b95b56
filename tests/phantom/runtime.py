"""torch.cuda of a phantom card."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from .trace import Trace, place

MEMORY = 80 << 30


class Event:
    """A mark on the stream: the host's clock, since the card is done at once."""

    trace: Trace

    def __init__(self, enable_timing: bool = False, **_: Any):
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.trace.waits.append(f"an event at {place()}")


class Stream:
    cuda_stream = 0

    def wait_stream(self, other: Any) -> None:
        pass


_data_ptr = torch.UntypedStorage.data_ptr


def storage_address(storage: torch.UntypedStorage) -> int:
    """One of its own for each storage, as the allocator would give it."""
    return storage._cdata if storage.device.type == "meta" else _data_ptr(storage)


@contextlib.contextmanager
def cuda_of(trace: Trace) -> Iterator[None]:
    """Within the block, torch.cuda speaks of the phantom card."""
    card, stream = trace.card, Stream()
    state = torch.zeros(16, dtype=torch.uint8)
    properties = SimpleNamespace(
        name=card.name, major=trace.arch // 10, minor=trace.arch % 10, multi_processor_count=card.processors,
        total_memory=MEMORY, L2_cache_size=50 << 20, shared_memory_per_block_optin=card.shared, warp_size=32,
    )  # fmt: skip
    answers: dict[str, Any] = {
        "_lazy_init": None, "is_available": True, "device_count": 1, "current_device": 0, "is_bf16_supported": True,
        "get_device_capability": (trace.arch // 10, trace.arch % 10), "get_device_name": card.name,
        "get_device_properties": properties, "current_stream": stream, "is_current_stream_capturing": False,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "reset_peak_memory_stats": None,
        "empty_cache": None, "mem_get_info": (MEMORY, MEMORY), "get_rng_state": state, "set_rng_state": None,
        "get_rng_state_all": [state], "set_rng_state_all": None, "set_device": None, "manual_seed_all": None,
        "device": contextlib.nullcontext(), "device_of": contextlib.nullcontext(),
    }  # fmt: skip

    def synchronize(device: Any = None) -> None:
        trace.waits.append(f"torch.cuda.synchronize at {place()}")

    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, lambda *_, answer=answer, **__: answer))
        for name, value in {"synchronize": synchronize, "Event": type("Event", (Event,), {"trace": trace})}.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.UntypedStorage, "data_ptr", storage_address))
        stack.enter_context(mock.patch.object(torch.cuda.nvtx, "range", lambda *_: contextlib.nullcontext()))
        yield
