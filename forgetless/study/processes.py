"""Several processes of one job, as torchrun starts them: which this is, and what they agree on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .options import BadInput


def count() -> int:
    """How many processes the job has."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def one_process(command: str) -> None:
    """Refuse several processes with ``BadInput``."""
    if count() > 1:
        raise BadInput(f"{command} runs in one process, got {count()}: start it without torchrun")


def own_device(name: str) -> str:
    """The device of this process, if the one named means all GPUs of the machine.

    Raises:
        BadInput: several processes would share one GPU.
    """
    device = torch.device(name)
    if count() == 1 or device.type == "cpu":
        return name
    if device.index is not None:
        raise BadInput(f"--device {name} is one device for {count()} processes: give --device {device.type}")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= torch.accelerator.device_count():
        raise BadInput(f"{torch.accelerator.device_count()} {device.type} devices here, process {local} has none")
    return f"{device.type}:{local}"


def mean(values: list[float]) -> list[float]:
    """Of every process's numbers. All must call it; NaN in one process is NaN in all."""
    if count() == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    if torch.distributed.get_backend() != "gloo":
        shared = shared.to(torch.accelerator.current_accelerator())
    torch.distributed.all_reduce(shared)
    return (shared / count()).tolist()


class Stop:
    """Whether this process has been told to stop."""

    asked = False


@contextmanager
def stopping_together() -> Iterator[Stop]:
    """With several processes, note a signal and let the work ask: one that left at once would have others wait for it.

    With one, signals are what they were.
    """
    stop = Stop()
    if count() == 1 or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(*_: object) -> None:
        stop.asked = True

    before = {kind: signal.signal(kind, note) for kind in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
