"""What is trained beside the adapters, such as a new head, embeddings or norms: PEFT's ``modules_to_save``."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..layers.linear import AdaptedLinear
from ..names import bare_modules


@dataclass
class Beside:
    """What of a model is saved beside its adapters.

    Attributes:
        tensors: name in the base model's state dict -> tensor.
        trained: names of the parameters among them that are trained.
        modules: names of the modules that are saved whole.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    trained: list[str] = field(default_factory=list)
    modules: list[str] = field(default_factory=list)


def trained_beside(model: nn.Module) -> Beside:
    """The parameters outside of adapters that want a gradient, with the modules that hold them."""
    result = Beside()
    for name, module in _outside(model).items():
        own = _own(name, module)
        trained = [key for key, tensor in own.items() if tensor.requires_grad]
        if not trained:
            continue
        result.trained += trained
        if any(name.startswith(f"{whole}.") for whole in result.modules):
            continue
        if name and not any(isinstance(part, AdaptedLinear) for part in module.modules()):
            result.modules.append(name)
            result.tensors |= {f"{name}.{key}": tensor for key, tensor in module.state_dict().items()}
        else:
            result.tensors |= {key: own[key] for key in trained}
    return result


def warn_of_lost(beside: Beside) -> None:
    """Name what is saved and what PEFT, which takes whole modules, does not read."""
    lost = [key for key in beside.trained if not key.startswith(tuple(f"{name}." for name in beside.modules))]
    if lost:
        warnings.warn(
            f"{', '.join(lost)}: trained and saved, but PEFT does not read parameters of the model itself or of "
            "layers that have an adapter; fl.load does",
            stacklevel=3,
        )


def places(model: nn.Module) -> dict[str, Tensor]:
    """Name in the base model's state dict -> parameter or buffer, of all that is outside of adapters."""
    return {key: t for name, module in _outside(model).items() for key, t in _own(name, module).items()}


def _outside(model: nn.Module) -> dict[str, nn.Module]:
    """Bare name -> module outside of adapters; an adapted layer stands for its base."""
    modules = bare_modules(model)
    layers = [module for module in modules.values() if isinstance(module, AdaptedLinear)]
    inside = {id(part) for layer in layers for part in layer.modules() if part is not layer}
    return {name: module for name, module in modules.items() if id(module) not in inside}


def _own(name: str, module: nn.Module) -> dict[str, Tensor]:
    """State dict key -> parameter or buffer of this module alone, of an adapted layer those of its base."""
    source, recurse = (module.base, True) if isinstance(module, AdaptedLinear) else (module, False)
    pairs = [*source.named_parameters(recurse=recurse), *source.named_buffers(recurse=recurse)]
    return {f"{name}.{key}" if name else key: tensor for key, tensor in pairs}
