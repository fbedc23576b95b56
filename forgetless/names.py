"""Names of modules as the bare model has them, whatever it is wrapped in."""

from __future__ import annotations

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
    parallel = isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    return key in _WRAPPED or (parallel and key == "module")


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
