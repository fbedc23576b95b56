"""Names of modules as the bare model has them, whatever it is wrapped in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

#: What torch.compile, FSDP1 and torch's activation checkpointing call the module that they wrap.
_WRAPPED = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def checked(model: nn.Module) -> nn.Module:
    """The model, or ValueError where it is none: the name of a model, say."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is {model!r}, wants a torch.nn.Module such as AutoModelForCausalLM.from_pretrained gives"
        )
    return model


def wraps(module: nn.Module, key: str) -> bool:
    """Whether ``module`` is a wrapper, and its child ``key`` the module that it runs: no part of a name."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    return key in _WRAPPED or key == "module" and isinstance(module, parallel)


def bare_name(model: nn.Module, name: str) -> str:
    """The name of a submodule without what wrappers put into it."""
    parts: list[str] = []
    module: Any = model
    for part in name.split(".") if name else ():
        if not wraps(module, part):
            parts.append(part)
        module = module._modules[part]
    return ".".join(parts)


def bare_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Bare name -> module, the model itself as "": all names of a shared module, and no wrapper."""
    # what is wrapped comes after its wrapper, which has the same name
    return {bare_name(model, name): module for name, module in checked(model).named_modules(remove_duplicate=False)}


def outer_modules(model: nn.Module, leaf: type[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Bare name and module, each once and in the model's order, but for what is inside those of the class ``leaf``.

    Faster than ``named_modules``: it is asked for every step.
    """
    seen: set[nn.Module | None] = {None}
    todo: list[tuple[str, nn.Module | None]] = [("", checked(model))]
    while todo:
        name, module = todo.pop()
        if module is None or module in seen:
            continue
        seen.add(module)
        yield name, module
        if module._modules and not isinstance(module, leaf):
            start = f"{name}." if name else ""
            inner = [(name if wraps(module, key) else start + key, child) for key, child in module._modules.items()]
            todo += reversed(inner)
