"""PEFT's layers on our op (``swap``), and our methods as PEFT's (``plugin``), looked up when they are asked for."""

from typing import Any

__all__ = ["CLoRAConfig", "CURLoRAConfig", "LaLoRAConfig"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import plugin

    return getattr(plugin, name)
