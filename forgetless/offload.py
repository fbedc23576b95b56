"""Modules whose tensors accelerate keeps elsewhere (``device_map``, ``cpu_offload``, ``disk_offload``).

Between calls such a tensor is on the meta device, without numbers; a hook of accelerate's on the module brings them to
the device that it executes on, and takes them away again. Adapters are not called, so they stay: see ``Stays``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Stays(nn.Module):
    """A module that is never called, so that no hook would bring its tensors back: they stay where it executes.

    accelerate takes the tensors of every module away when it attaches its hooks. Here they are put back at once, the
    same parameters as before, which an optimizer may know.

    Attributes:
        beside: a module that accelerate knows by another name than its state dict has, the base of an adapted layer.
    """

    beside: nn.Module | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_old_forward":  # a hook will be attached
            self.__dict__["before"] = {**self._parameters, **self._buffers}
        super().__setattr__(name, value)
        if name == "_hf_hook":
            _take_back(self, self.__dict__.pop("before", {}))
            if self.beside is not None:
                _rename(self.beside)


def _hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module that offload its tensors"""
    hook: Any = module.__dict__.get("experts", module).__dict__.get("_hf_hook")  # a stack is in its experts module
    return [one for one in getattr(hook, "hooks", [hook]) if getattr(one, "offload", False)]


def _take_back(module: nn.Module, before: dict[str, Tensor]) -> None:
    """Put tensors that were taken away back, from before or from where they are kept; what has no numbers stays so."""
    tables: Any = (module._parameters, module._buffers)
    for one in _hooks(module):
        device = torch.device(one.execution_device)
        for table in tables:
            for name, t in table.items():
                if t is None or not t.is_meta:
                    continue
                own = before.get(name)
                if own is not None and not own.is_meta:
                    own.data = own.data.to(device)
                    table[name] = own
                elif name in one.weights_map:
                    kept = one.weights_map[name].to(device, t.dtype)
                    is_parameter = isinstance(t, nn.Parameter)
                    table[name] = nn.Parameter(kept.clone(), t.requires_grad) if is_parameter else kept
        one.offload = False


def _rename(base: nn.Module) -> None:
    """Let the hooks of a base layer look for its tensors by the names of the base model: without "base."."""
    for path, part in base.named_modules():
        own = f"{path}." if path else ""
        for one in _hooks(part):
            kept = one.weights_map
            prefix = getattr(kept, "prefix", "")
            bare = prefix.removesuffix(f"base.{own}") + own
            names = [f"{bare}{name}" for name, t in part.named_parameters(recurse=False)]
            if prefix.endswith(f"base.{own}") and all(name in kept.dataset for name in names):
                kept.prefix = bare


def execution_device(module: nn.Module) -> torch.device | None:
    """Where an offloaded module executes; None for a module that accelerate does not offload."""
    for one in _hooks(module):
        return torch.device(one.execution_device)
    return None


def check_here(layer: Any, adapter: Any) -> None:
    """Refuse to run or to train an adapter without numbers on a layer that has them."""
    if _lacks_numbers(adapter) and layer.device.type != "meta":
        raise ValueError(f"the adapter of {layer.name} is on the meta device and its layer is not: fl.load an adapter")


def check_not_around(layers: list[Any]) -> None:
    """Refuse adapters that a module around them takes away: the gradients would reach no optimizer."""
    for layer in layers:
        if _lacks_numbers(getattr(layer, "adapter", None)):  # what PEFT adapted has none
            raise ValueError(
                f"the adapter of {layer.name} is offloaded with the module around it, and cannot be trained there; "
                "leave preload_module_classes out"
            )


def _lacks_numbers(adapter: Any) -> bool:
    return adapter is not None and any([p is not None and p.is_meta for p in adapter._parameters.values()])


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Within it, the tensors of the module and its submodules have their numbers; what is written to them is lost."""
    module = module.__dict__.get("experts", module)
    offloaded: list[Any] = [part for part in module.modules() if execution_device(part) is not None]
    try:
        for part in offloaded:
            part._hf_hook.pre_forward(part)
        yield
    finally:
        for part in offloaded:
            part._hf_hook.post_forward(part, None)
