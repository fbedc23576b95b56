"""Modules whose tensors accelerate keeps elsewhere (``device_map``, ``cpu_offload``, ``disk_offload``).

Between calls such a tensor is on the meta device, without numbers; a hook of accelerate's on the module brings them to
the device that it executes on, and takes them away again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module executes; None for a module that accelerate does not offload."""
    hook: Any = module.__dict__.get("_hf_hook")
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "offload", False):
            return torch.device(one.execution_device)
    return None


def check_here(layer: Any) -> None:
    """Refuse to run or to train an adapter without numbers on a layer that has them."""
    parameters = layer.adapter._parameters.values()
    if any(p is not None and p.is_meta for p in parameters) and layer.device.type != "meta":
        raise ValueError(f"the adapter of {layer.name} is offloaded: offload the model first, then fl.adapt or fl.load")


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within it, the tensors of the module and its submodules have their numbers; what is written to them is lost."""
    offloaded: list[Any] = [part for part in module.modules() if execution_device(part) is not None]
    try:
        for part in offloaded:
            part._hf_hook.pre_forward(part)
        yield
    finally:
        for part in offloaded:
            part._hf_hook.post_forward(part, None)
