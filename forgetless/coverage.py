"""How much of a model its adapters reach: by parameter, and by what its passes call."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import nn

from .layers.experts import SUFFIX
from .layers.linear import AdaptedLinear
from .layers.quantized import kind_of
from .names import outer_modules
from .report import listed
from .targets import excluded, heads_of, is_head

#: ``fl.adapt`` warns from this share of the weights on.
SHARE = 0.1


def passed_over(model: nn.Module) -> dict[str, float]:
    """Name -> share of the model's weights, of each matrix that no adapter sits on, the largest first.

    Weights are parameters of two dimensions or more, packed ones counted unpacked. Names of like layers are one, with
    ``*`` for their numbers.
    """
    return _shares(model, lambda name, module: not isinstance(module, AdaptedLinear))


def warn_passed_over(model: nn.Module, exclude: str | Iterable[str]) -> None:
    """Warn of what "all-linear" left out, embeddings, the head and what the user excluded aside."""
    asked, heads = excluded(model, exclude), heads_of(model)

    def silent(name: str, module: nn.Module) -> bool:
        return isinstance(module, (AdaptedLinear, nn.Embedding)) or name in asked or is_head(name, module, heads)

    left = _shares(model, lambda name, module: not silent(name, module))
    if sum(left.values()) >= SHARE:
        reached = sum(_shares(model, lambda name, module: isinstance(module, AdaptedLinear)).values())
        warnings.warn(
            f"targets 'all-linear' reached {reached:.0%} of the weights of {type(model).__name__}; passed over: "
            f"{listed(left, 8)}; fl.explain lists all, exclude= says that some are meant to be left out",
            stacklevel=3,
        )


def uncalled(layers: dict[str, AdaptedLinear]) -> list[str]:
    """Names of layers that no forward pass has called, though there was one."""
    return [name for name, layer in layers.items() if layer.passes and layer.passes.completed and not layer.called]


def warn_uncalled(layers: dict[str, AdaptedLinear]) -> None:
    """Name them in a warning."""
    names = uncalled(layers)
    if names:
        warnings.warn(
            f"no forward pass has called {', '.join(names[:8])}{f' and {len(names) - 8} more' if names[8:] else ''}: "
            "what uses them reads their weights itself, or nothing does; their updates are not in the model's outputs",
            stacklevel=3,
        )


def _shares(model: nn.Module, counts: Callable[[str, nn.Module], bool]) -> dict[str, float]:
    rows = list(_matrices(model))
    total = sum(size for _, _, size in rows)
    shares: dict[str, float] = {}
    for name, module, size in rows:
        if counts(name.rpartition(".")[0], module):
            key = re.sub(r"(?<![^.])\d+(?![^.])", "*", name)
            shares[key] = shares.get(key, 0.0) + size / total
    return dict(sorted(shares.items(), key=lambda item: -item[1]))


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, int]]:
    """Name, module and numbers of each weight of two dimensions or more, once."""
    seen: set[int] = set()
    for name, module in outer_modules(model, AdaptedLinear):
        prefix = f"{name}." if name else ""
        layer: Any = module
        if isinstance(module, AdaptedLinear) or kind_of(module) is not None:
            if id(module) not in seen:
                yield f"{prefix}weight", module, layer.in_features * layer.out_features
            continue
        for key, p in module._parameters.items():
            if p is not None and p.dim() > 1 and id(p) not in seen:
                stack = module._modules.get(key + SUFFIX)  # experts stay where they are
                seen.update((id(p), id(stack)))
                yield prefix + key, stack or module, p.numel()
