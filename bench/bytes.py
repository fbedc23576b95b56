"""Bytes: what autograd saves, the peak of the allocator or of the process, and what the machine has left."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

MIB = 2**20


def saved_bytes(forward: Callable[[], Any], modules: Sequence[nn.Module] = ()) -> int:
    """Bytes that a forward pass saves for its backward pass: distinct storages, without the modules' own state.

    The graph is walked after the pass; a hook on what is saved would change what is saved.
    """
    state = [t for module in modules for t in (*module.parameters(), *module.buffers())]
    own = {t.untyped_storage().data_ptr() for t in state}
    out = forward()
    saved: dict[int, int] = {}
    stack: list[Any] = list({t.grad_fn for t in tree_leaves(out) if isinstance(t, Tensor)} - {None})
    seen = {None, *stack}
    while stack:
        node = stack.pop()
        # built-in nodes name each saved tensor, nodes written in Python have a tuple
        names = [name for name in dir(node) if name.startswith("_saved_") or name == "saved_tensors"]
        for t in tree_leaves([getattr(node, name) for name in names]):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in own:
                saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        more = {following for following, _ in node.next_functions} - seen
        seen |= more
        stack += more
    return sum(saved.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that torch's allocator had out during the call, above those before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _quiet(), torch.autograd.profiler.profile(profile_memory=True, use_kineto=False) as profile:
        run()
    assert profile.kineto_results is not None
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    size = top = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        size += event.nbytes()
        top = max(top, size)
    return top


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The profiler of some torch builds writes to standard error, from C++."""
    sys.stderr.flush()
    saved, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(null, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(null)


def peak_rss(run: Callable[[], Any]) -> int | None:
    """Peak resident bytes of this process during the call, above those before it; None where the system has no count.

    Memory that the process has freed but not given back hides growth: glibc is told to give it back, but use a fresh
    process for each number.
    """
    from forgetless.study.machine import Peak  # here: of this checkout, while a worker may have another one's library

    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    peak = Peak(torch.device("cpu"))
    before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    run()
    return int(peak.mib() * MIB) - before


def available_bytes(device: torch.device) -> int:
    """Free memory of the device, or of the machine; 4 GiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return int(Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]) * 1024
    except (OSError, IndexError):
        return 4 << 30
