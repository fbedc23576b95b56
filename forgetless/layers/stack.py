"""Experts that a mixture model keeps as one 3-D parameter, and transformers' registry of ways to run them.

transformers decorates such a module with ``use_experts_implementation``: its forward asks the registry of
``transformers.integrations.moe`` for the function that its config names. An adapted module asks for ours, by a config
of its own that names it; the model's config, and modules that are not adapted, stay as they are.

Nothing is imported: where no model of transformers was made there are no such modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..names import bare_name
from ..ops.dispatch import backend

#: Our name in transformers' registry.
IMPLEMENTATION = "forgetless"

#: experts module, hidden states (T, K), experts of each token (T, k), their weights (T, k) -> (T, K)
Forward = Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]


class Stack(nn.Module):
    """One 3-D parameter of an experts module, as the layer that is adapted. It is not in the model.

    Args:
        experts: the module that holds it.
        key: its name there, "gate_up_proj", "up_proj" or "down_proj".
    """

    def __init__(self, experts: nn.Module, key: str):
        super().__init__()
        self.__dict__.update(experts=experts, key=key)  # not as a submodule
        self.training = experts.training

    experts: Any
    key: str

    @property
    def weight(self) -> Tensor:
        """As the module stores it: (E, N, K), or (E, K, N) if transposed."""
        return getattr(self.experts, self.key)

    @property
    def bias(self) -> Tensor | None:  # (E, N)
        return getattr(self.experts, f"{self.key}_bias") if self.experts.has_bias else None

    @property
    def transposed(self) -> bool:
        return self.experts.is_transposed

    def matrices(self) -> Tensor:  # (E, N, K)
        """The weight of each expert, a view."""
        return self.weight.mT if self.transposed else self.weight


def keys_of(module: nn.Module) -> list[str]:
    """Names of the stacks of an experts module, in its own order; none for any other module, or an unknown kind."""
    known: Any = module
    flags = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")
    if "transformers.integrations.moe" not in sys.modules or not all(hasattr(module, name) for name in flags):
        return []
    if getattr(known, "has_post_expert_norm", False) or getattr(known, "_is_expert_parallel", False):
        return []
    names = ["gate_up_proj" if known.has_gate else "up_proj", "down_proj"]
    whole = all(_is_stack(module, name, known.num_experts) for name in names)
    return [name for name, _ in module.named_parameters(recurse=False) if name in names] if whole else []


def _is_stack(module: nn.Module, name: str, experts: int) -> bool:
    t = getattr(module, name, None)
    return type(t) is nn.Parameter and t.dim() == 3 and t.shape[0] == experts and t.is_floating_point()


def stacks(model: nn.Module) -> dict[str, Stack]:
    """Name -> stack, of all experts modules of the model: "model.layers.0.mlp.experts.gate_up_proj"."""
    return {
        f"{bare_name(model, name)}.{key}".removeprefix("."): Stack(module, key)
        for name, module in model.named_modules()
        for key in keys_of(module)
    }


class _Config:
    """The config of an experts module as it is, but for the implementation that it names."""

    def __init__(self, config: Any, implementation: str):
        self.config = config
        self._experts_implementation = implementation
        self.checked = False  # whether our forward was compared with the module's own

    def __getattr__(self, name: str) -> Any:
        if name == "config":
            raise AttributeError(name)
        return getattr(self.config, name)


def run_by(experts: Any, forward: Forward) -> None:
    """Let the module run by ``forward`` from now on; again is harmless."""
    sys.modules["transformers.integrations.moe"].ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, forward)
    if not isinstance(experts.config, _Config):
        experts.config = _Config(experts.config, IMPLEMENTATION)


def give_back(experts: Any) -> None:
    """Let the module run as its model's config says; again is harmless."""
    if isinstance(experts.config, _Config):
        experts.config = experts.config.config


def verify_once(experts: Any, plain: Forward) -> None:
    """``verify`` in the first call of a module that was taken over, or in the first one with numbers."""
    config = experts.config
    if isinstance(config, _Config) and not config.checked and not torch.compiler.is_compiling():
        config.checked = verify(experts, plain)


@torch.no_grad()
def verify(experts: Any, plain: Forward) -> bool:
    """Compare ``plain``, our forward without adapters, with the module's own on two tokens; False without numbers.

    Raises:
        ValueError: they differ.
    """
    weight, config = experts.down_proj, experts.config
    if weight.is_meta:
        return False
    device, E = weight.device, experts.num_experts
    features = weight.shape[2 if experts.is_transposed else 1]
    x = torch.arange(2 * features, device=device).view(2, -1).sin().to(weight.dtype)
    index = torch.arange(4, device=device).view(2, 2) % E
    shares = torch.linspace(0.3, 0.7, 4, device=device, dtype=weight.dtype).view(2, 2)
    with torch.autocast(device.type, enabled=False), backend("blas"):  # no kernel is compiled for two tokens
        ours = plain(experts, x, index, shares).double()
        try:
            experts.config = _Config(config, "eager")  # "eager" is the forward that was decorated
            own = type(experts).forward(experts, x, index, shares).double()
        finally:
            experts.config = config
    if not own.isfinite().all():
        return False  # not loaded yet
    if not (ours - own).norm() <= 32 * torch.finfo(weight.dtype).eps * own.norm():
        raise ValueError(
            f"the experts of {type(experts).__name__} do not compute what their flags say (has_gate, has_bias, "
            f"is_transposed, _apply_gate): off by {(ours - own).norm() / own.norm():.2g}; leave them out of targets"
        )
    return True
