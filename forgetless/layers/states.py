"""Modules that stand for a base layer: what is in it goes by the names that the base model knows."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from ..offload import execution_device


class Standing(nn.Module):
    """A module in the place of its ``base``, whose tensors keep their names in state dicts, with or without "base."."""

    base: Any

    def __init__(self) -> None:
        super().__init__()
        self.register_state_dict_post_hook(_hide_base)
        self.register_load_state_dict_pre_hook(_show_base)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """A weight or bias that is set, as tying does, is the base layer's."""
        if name in ("weight", "bias"):
            setattr(self.base, name, param)
        else:
            super().register_parameter(name, param)

    @property
    def device(self) -> torch.device:
        """Where the layer executes: its weight may be kept elsewhere."""
        here = cast(Tensor, self.weight).device
        return (execution_device(self.base) or here) if here.type == "meta" else here

    def _fqn_modifiers(self) -> dict[str, str]:
        """For torch.distributed.checkpoint: what goes by its own name in a state dict -> the submodule it is in."""
        base = self.base
        return dict.fromkeys((*base._parameters, *base._buffers, *base._modules), "base")


def _hide_base(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:  # all, so that they keep their order
        state[prefix + key.removeprefix(prefix).removeprefix("base.")] = state.pop(key)


def _show_base(layer: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        own = key.removeprefix(prefix)
        if not own.startswith(("base.", "adapter.")):
            state[f"{prefix}base.{own}"] = state.pop(key)
