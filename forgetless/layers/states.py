"""State dicts of adapted models: what is in the base layer goes by the names that the base model knows."""

from __future__ import annotations

from typing import Any

from torch import nn


def keep_base_names(layer: nn.Module) -> None:
    """Leave "base." out of the keys of the state dict of ``layer``, and take such keys with it and without it."""
    layer.register_state_dict_post_hook(_hide_base)
    layer.register_load_state_dict_pre_hook(_show_base)


def _hide_base(layer: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:  # all, so that they keep their order
        state[prefix + key.removeprefix(prefix).removeprefix("base.")] = state.pop(key)


def _show_base(layer: nn.Module, state: dict[str, Any], prefix: str, *others: Any) -> None:
    for key in [key for key in state if key.startswith(prefix)]:
        own = key.removeprefix(prefix)
        if not own.startswith(("base.", "adapter.")):
            state[f"{prefix}base.{own}"] = state.pop(key)
